"""No password in a URL is kept or shown."""

import pytest

from learner.config import ConfigError, load_config
from learner.run import main
from records.passwords import without_passwords


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("at https://me:pw@host:1/a, user@host", "at https://host:1/a, user@host"),
        ("https://token@host", "https://host"),
        ("postgresql://me:p/w@host/db", "postgresql://host/db"),
        ("<a href='http://h:1/a'>a@b</a>", "<a href='http://h:1/a'>a@b</a>"),
        ('{"uri": "http://h:1/a", "who": "a@b"}', '{"uri": "http://h:1/a", "who": "a@b"}'),
    ],
)
def test_user_and_password_are_left_out_and_nothing_else(text, shown):
    assert without_passwords(text) == shown


@pytest.mark.parametrize("key", ["mlflow.uri", "run.dir", "reward.options"])
def test_a_password_in_a_setting_is_refused_and_not_shown(key, tmp_path, capsys):
    url = "sftp://me:open-sesame@127.0.0.1/x" if key == "run.dir" else "https://me:open-sesame@127.0.0.1/x"
    value = f"{{url: '{url}'}}" if key == "reward.options" else url
    for more in ([], ["--plan"], ["--print-config"]):
        assert main([f"run.root={tmp_path}", f"{key}={value}", *more]) == 2
        said = "".join(capsys.readouterr())
        assert f"{key}: settings are kept" in said and "environment" in said and "open-sesame" not in said
    assert main([f"train.epochs={value}"]) == 2 and "open-sesame" not in "".join(capsys.readouterr())


def test_what_is_no_password_is_taken():
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_PASSWORD"):
        load_config({}, {"mlflow.uri": "https://token@host"})
    azure = "abfs://container@account.dfs.core.windows.net/runs"
    assert load_config({}, {"run.dir": azure, "prompts.path": ["a ring at http://a:b@c"]}).run.dir == azure
