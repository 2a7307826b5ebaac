"""What MLflow shows of evaluations, and groups of runs: once, whatever was cut short, and as its page wants it."""

import io
import json
from collections import Counter
from pathlib import Path

import pytest
from mlflow.entities import ViewType
from PIL import Image

from commands import upload
from learner.config import config_yaml
from learner.run import main
from records.run_folder import Records
from records.storage import Storage
from reports import evaluation_views
from reports.evaluation_views import IMAGES_TAG, NOTE, TABLES_TAG, judged, table
from reports.mlflow_mirror import GROUP, GROUP_PARENT, PARENT, Mirror

FIGURE = {"value": 0.81, "low": 0.8, "high": 0.82, "base": 0.7, "floor": 0.01}
NAMES = ("reward", "accuracy", "vendi", "vendi_per_prompt", "distance", "fid", "kid", "fid_per_prompt")


def judgement(epochs: int, **changed) -> dict:
    """As commands/evaluate.py writes it."""
    return {
        "format": 1, "name": "run", "adapter_sha256": "0" * 64, "epochs_done": epochs, "settings": {"images": 4},
        "held_out": {"my judge#2": FIGURE}, **dict.fromkeys(NAMES), "reward": FIGURE, "fid": FIGURE, **changed,
    }  # fmt: skip


def picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (600, 300), "red").save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def uploaded(small_settings, tmp_path_factory):
    """A finished run of two epochs, judged after the second, sent twice."""
    folder = tmp_path_factory.mktemp("views")
    settings = [*small_settings, "run.runner=inprocess", "evaluation.every=2", f"run.dir={folder / 'run'}"]
    assert main(settings) == 0
    storage = Storage(str(folder / "run"))
    storage.write("evaluation/step-000002.json", json.dumps(judgement(2)).encode())
    storage.write("evaluation/step-000002.png", picture())
    for _ in range(2):
        assert upload.main([str(folder / "run")]) == 0
    return storage, f"sqlite:///{folder}/mlflow.db"


@pytest.fixture
def mirror(uploaded):
    storage, uri = uploaded
    mirror = Mirror(storage, uri, "tributary")
    mirror.connect()
    return mirror


def names(mirror, folder: str) -> list[str]:
    return [Path(file.path).name for file in mirror.client.list_artifacts(mirror.run_id, folder)]


def artifacts(mirror) -> Path:
    return Path(mirror.client.get_run(mirror.run_id).info.artifact_uri.removeprefix("file://"))


def test_pictures_have_steps_and_are_there_once(mirror):
    found = [tuple(name.split("+")[:3]) for name in names(mirror, "images")]
    assert Counter(found) == {
        ("evaluation~samples", "step", "0"): 2,  # each with its small copy
        ("evaluation~samples", "step", "2"): 2,
        ("judged~base_and_tuned", "step", "2"): 2,
    }
    assert mirror.client.get_run(mirror.run_id).data.tags[IMAGES_TAG] == "true"


def test_a_picture_cut_short_is_completed(mirror):
    before = set(names(mirror, "images"))
    for file in (artifacts(mirror) / "images").glob("*+step+2+*.webp"):
        file.unlink()
    mirror.sync()
    assert set(names(mirror, "images")) == before
    for file in (artifacts(mirror) / "images").glob("*.webp"):
        assert max(Image.open(file).size) <= 256


def test_tables_can_be_read_back(mirror, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mirror.uri)  # load_table goes by it alone
    found = mirror.client.load_table(mirror.experiment_id, "evaluation/after-000002-epochs.json", [mirror.run_id])
    rewards = Records.open(mirror.storage).evaluation_rewards(1)
    assert list(found["reward"]) == pytest.approx(list(rewards), abs=1e-9) and len(found) == 4  # once
    assert set(found["epoch"]) == {2} and list(found["image"]) == [0, 1, 2, 3] and found["prompt"].str.len().min() > 0
    listed = json.loads(mirror.client.get_run(mirror.run_id).data.tags[TABLES_TAG])
    assert [each["path"] for each in listed] == [
        "evaluation/after-000002-epochs.json", "evaluation/after-000000-epochs.json", "judged/after-000002-epochs.json",
    ]  # fmt: skip
    assert all((artifacts(mirror) / each["path"]).is_file() and each["type"] == "table" for each in listed)


def test_a_table_has_parts_and_judges(tmp_path):
    storage = Storage(str(tmp_path))
    found = {
        "prompt": ["a", "b"],
        "reward": [1.0, None],
        "reward_parts": {"x": [2.0, 3.0]},
        "held_out": {"j": [4.0, None]},
    }
    storage.write("evaluation/epoch-000004.json", json.dumps(found).encode())
    assert json.loads(table(storage, 4)) == {
        "columns": ["prompt", "reward", "x", "held out: j", "image", "epoch"],
        "data": [["a", 1.0, 2.0, 4.0, 0, 5], ["b", None, 3.0, None, 1, 5]],
    }


def test_judgements_are_metrics_of_their_step(mirror):
    history = mirror.client.get_metric_history(mirror.run_id, "judged/fid_floor")
    assert [(metric.step, metric.value) for metric in history] == [(2, 0.01)]
    found = {key for key in mirror.client.get_run(mirror.run_id).data.metrics if key.startswith("judged/")}
    assert found == {
        f"judged/{name}{suffix}"
        for name in ("reward", "fid", "held_out/my judge_2")
        for suffix in ("", "_base", "_floor")
    } | {"judged/epochs_done"}


def test_a_second_judgement_doubles_no_metric_but_changes_the_table(mirror):
    content = json.dumps(judgement(2, reward={**FIGURE, "value": 0.9}, vendi=FIGURE)).encode()
    mirror.storage.write("evaluation/step-000002.json", content)
    for _ in range(2):
        mirror.sync()
    history = mirror.client.get_metric_history(mirror.run_id, "judged/reward")
    assert [metric.value for metric in history] == [0.81]
    rows = json.loads((artifacts(mirror) / "judged/after-000002-epochs.json").read_text())["data"]
    assert {row[0]: row[1] for row in rows} == {"reward": 0.9, "fid": 0.81, "vendi": 0.81, "held_out/my judge#2": 0.81}


def test_what_is_no_judgement_of_an_epoch_is_passed_over(tmp_path):
    storage = Storage(str(tmp_path))
    for name, content in {
        "step-000004.json": json.dumps(judgement(4)),
        "step-000006.json": '{"format": 1',
        "step-000008.json": json.dumps(judgement(8) | {"epochs_done": None}),
        "epoch-000001.json": json.dumps({"prompt": [], "reward": []}),
        "step-000004.png": "",
    }.items():
        storage.write(f"evaluation/{name}", content.encode())
    assert [one.epochs for one in judged(storage)] == [4]


def test_the_description_is_ours_until_somebody_writes_another(mirror):
    text = mirror.client.get_run(mirror.run_id).data.tags[NOTE]
    assert text.startswith("Evaluated reward **") and text.count("get-artifact?path=images%2Fevaluation~samples") == 4
    assert text.index("step%2B0") < text.index("step%2B2") and "compressed.webp&" in text and ".png&" in text
    mirror.client.set_tag(mirror.run_id, NOTE, "my own words")
    mirror.finish("FINISHED")
    assert mirror.client.get_run(mirror.run_id).data.tags[NOTE] == "my own words"
    mirror.client.delete_tag(mirror.run_id, NOTE)
    mirror.finish("FINISHED")
    mirror.client.set_tag(mirror.run_id, evaluation_views.OWN_NOTE, evaluation_views._sha256(text[:-1]))
    mirror.client.set_tag(mirror.run_id, NOTE, text[:-1])  # as an older upload of ours left it
    mirror.finish("FINISHED")
    assert mirror.client.get_run(mirror.run_id).data.tags[NOTE] == text


def test_a_run_lasts_as_long_as_it_did_however_late_it_is_sent(mirror):
    mirror.finish("FINISHED")
    records, info = Records.open(mirror.storage), mirror.client.get_run(mirror.run_id).info
    assert info.start_time == int(records.about["created"] * 1000)
    assert info.end_time == int(records.lines[-1]["time"] * 1000)


@pytest.fixture
def member(uploaded, small_config, tmp_path):
    """Factory of mirrors of runs of a group, on the server of the other tests."""

    def make(name: str, group: str = "sweep") -> Mirror:
        storage = Storage(str(tmp_path / name))
        config = small_config(f"mlflow.group={group}")
        Records.create(storage, name, config_yaml(config), {"config_digest": config.digest(), "prompts_sha256": ""})
        return Mirror(storage, uploaded[1], tmp_path.name)

    return make


def parent_of(mirror) -> str:
    return mirror.client.get_run(mirror.run_id).data.tags[PARENT]


def test_a_group_has_one_parent(member):
    first, second, other = member("first"), member("second"), member("other", "other")
    for mirror in (first, second, other, first):
        mirror.connect()
    assert parent_of(first) == parent_of(second) != parent_of(other)
    parent = first.client.get_run(parent_of(first))
    assert (parent.info.run_name, parent.info.status, parent.data.tags[GROUP_PARENT]) == ("sweep", "FINISHED", "sweep")
    assert len(first.client.search_runs([first.experiment_id])) == 5
    assert first.client.get_run(first.run_id).data.tags[GROUP] == "sweep"


def test_of_two_parents_made_at_once_the_older_stays(member, monkeypatch):
    first, second = member("first"), member("second")
    first.connect()
    real, looks = second._parents, []

    def looked_before_the_first_had_made_one(group):
        looks.append(group)
        return real(group) if len(looks) > 1 else []

    monkeypatch.setattr(second, "_parents", looked_before_the_first_had_made_one)
    second.connect()
    assert parent_of(second) == parent_of(first)
    assert real("sweep") == [parent_of(first)]  # its own is gone
    gone = first.client.search_runs([first.experiment_id], run_view_type=ViewType.DELETED_ONLY)
    assert [run.info.run_name for run in gone] == ["sweep"]


def test_an_older_parent_that_turns_up_is_taken_at_the_end(member):
    mirror = member("first")
    mirror.connect()
    before = parent_of(mirror)
    older = mirror.client.create_run(mirror.experiment_id, start_time=1, tags={GROUP_PARENT: "sweep"}).info.run_id
    mirror.finish("KILLED")
    assert parent_of(mirror) == older != before


def test_the_experiment_opens_as_model_training(mirror):
    experiment = mirror.client.get_experiment(mirror.experiment_id)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
