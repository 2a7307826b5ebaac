"""Killed at any point and started again by the same command: bitwise the unbroken run, no holes, no repeats."""

import json
import shutil
from contextlib import contextmanager

import pyarrow.parquet as pq
import pytest

from learner import controller
from learner.config import CONFIG_VERSION, ConfigError, saved_config
from learner.inprocess import InProcessRunner
from learner.run import main
from records import checkpoint
from records.heartbeat import Heartbeat
from records.run_folder import Records
from records.storage import Storage, StorageError
from reports import html, summary
from reports.progress import Bar
from reports.tracking import Tracker

TIMES = ("time", "seconds", "sample_seconds", "score_seconds", "train_seconds")


class Killed(BaseException):
    """Nothing of ours catches it: as sudden as a test in one process can be."""


@pytest.fixture(scope="module")
def settings(small_settings):
    return [*small_settings, "run.runner=inprocess", "train.epochs=3", "evaluation.every=2", "flow.replay_epochs=2"]


@pytest.fixture(scope="module")
def unbroken(settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "unbroken"
    assert main([*settings, f"run.dir={folder}"]) == 0
    return folder


@pytest.fixture(scope="module")
def two_epochs(settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "two epochs"
    assert main([*settings, "train.epochs=2", f"run.dir={folder}"]) == 0
    return folder


@pytest.fixture
def stopped(two_epochs, tmp_path):
    """A run of its own that has done two of three epochs."""
    return shutil.copytree(two_epochs, tmp_path / "run", symlinks=True)


def lines(folder) -> list[dict]:
    """metrics.jsonl without the clock."""
    read = Records.open(Storage(str(folder))).lines
    return [{key: value for key, value in line.items() if key not in TIMES} for line in read]


def rows(folder) -> list[tuple]:
    columns = ["epoch", "trajectory_id", "policy_version", "adapter_sha256", "prompt", "reward", "log_pf_sum", "beta"]
    return [tuple(row.values()) for row in pq.read_table(folder / "trajectories", columns=columns).to_pylist()]


def lora(folder) -> list[bytes]:
    return [file.read_bytes() for file in sorted((folder / "checkpoints/latest/lora").iterdir())]


def assert_same(one, other) -> None:
    assert lora(one) == lora(other) and lines(one) == lines(other)
    assert rows(one) == rows(other) and len(rows(one)) == 24 and len(set(rows(one))) == 24
    for name in ("before.png", "after.png", "evaluation/epoch-000002.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes()
    totals = json.loads((other / "checkpoints/latest/state.json").read_text())["ledger"]["totals"]
    assert totals == {"issued": 24, "sampled": 24, "scored": 24, "trained": 24, "quarantined": 0, "lost": 0}


@contextmanager
def killed(owner, name: str, count: int, after: bool = False):
    """What is done within is killed before, or after, the `count`-th call of this function."""
    real, calls = getattr(owner, name), []

    def blow(*args, **kwargs):
        calls.append(name)
        if len(calls) == count and not after:
            raise Killed
        result = real(*args, **kwargs)
        if len(calls) == count:
            raise Killed
        return result

    with pytest.MonkeyPatch.context() as patched, pytest.raises(Killed):
        patched.setattr(owner, name, blow)
        yield


SHORT = [(InProcessRunner, "checkpoint_files", 3), (InProcessRunner, "evaluate", 2)]  # (where it strikes, which call)
BLOWS = [
    (InProcessRunner, "evaluate", 1),  # before anything is on disk
    (InProcessRunner, "train_epoch", 1),  # before the first epoch
    (InProcessRunner, "train_epoch", 2),
    (Records, "save_trajectories", 2),
    (Records, "append", 3),
    (checkpoint, "save", 3),
    (checkpoint, "prune", 3),  # closed
    (html, "render", 1),
    (controller, "finish", 1),  # all done but the end
]
BLOWS = [*SHORT, *(pytest.param(*blow, marks=pytest.mark.long) for blow in BLOWS)]


@pytest.mark.parametrize(("owner", "name", "count"), BLOWS)
@pytest.mark.parametrize("after", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_killed_anywhere_ends_as_the_unbroken_one(owner, name, count, after, settings, unbroken, tmp_path):
    folder = tmp_path / "run"
    with killed(owner, name, count, after):
        main([*settings, f"run.dir={folder}"])
    assert main([*settings, f"run.dir={folder}"]) == 0
    assert_same(unbroken, folder)


def test_a_finished_run_is_left_alone(settings, unbroken, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(unbroken, folder, symlinks=True)
    before = {path: path.stat().st_mtime_ns for path in (folder / "checkpoints").rglob("*")}
    assert main([*settings, f"run.dir={folder}"]) == 0
    assert "nothing is left to do" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "checkpoints").rglob("*")}
    assert_same(unbroken, folder)


@pytest.mark.long
def test_without_run_dir_the_newest_unfinished_run_of_the_same_settings_goes_on(settings, unbroken, tmp_path, capsys):
    arguments = [*settings, f"run.root={tmp_path}"]
    with killed(InProcessRunner, "train_epoch", 2):
        main(arguments)
    assert main([*arguments, "run.seed=7"]) == 0  # other settings: another run
    assert main(arguments) == 0
    assert "going on from checkpoints/step-000001: 1 of 3 epochs" in capsys.readouterr().out
    assert main(arguments) == 0  # all are finished: a new one
    folders = sorted((tmp_path / "runs").iterdir(), key=lambda path: Records.open(Storage(str(path))).about["created"])
    assert len(folders) == 3
    assert_same(unbroken, folders[0])
    assert_same(unbroken, folders[2])


@pytest.mark.long
def test_more_epochs_prolong_a_finished_run(settings, unbroken, tmp_path):
    folder = tmp_path / "run"
    assert main([*settings, "train.epochs=1", f"run.dir={folder}"]) == 0
    assert main([*settings, f"run.dir={folder}"]) == 0
    # The shorter run was evaluated after its last epoch; otherwise nothing differs (the preset does not anneal).
    assert lora(folder) == lora(unbroken) and rows(folder) == rows(unbroken)


def test_other_settings_are_refused_key_by_key(settings, unbroken, capsys):
    arguments = [*settings, f"run.dir={unbroken}", "lora.rank=3", "objective.beta=7"]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "lora.rank: the run in" in said and "has 2, not 3" in said and "objective.beta" in said
    assert main([*settings, f"run.dir={unbroken}", "run.resume=never"]) == 2
    assert "already holds a run" in capsys.readouterr().err


def test_other_prompts_are_refused(settings, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red ring\na blue ring\n")
    arguments = [*settings, f"run.dir={tmp_path / 'run'}", f"prompts.path={prompts}", "train.epochs=1"]
    assert main(arguments) == 0
    prompts.write_text("a red ring\n")
    assert main(arguments) == 2
    assert "prompts.path" in capsys.readouterr().err


def test_a_run_in_use_is_refused(settings, tmp_path, capsys):
    from learner.config import load_config
    from learner.open_run import open_run

    config = load_config(overrides=[*settings, f"run.dir={tmp_path / 'run'}"])
    opened = open_run(config, tmp_path, ["a"], print)
    with pytest.raises(ConfigError, match="in use by process"):
        open_run(config, tmp_path, ["a"], print)
    opened.close()
    open_run(config, tmp_path, ["a"], print).close()


def test_a_checkpoint_becomes_the_beginning_of_another_run(settings, unbroken, tmp_path, capsys):
    start = unbroken / "checkpoints/step-000002"
    assert main([*settings, f"run.resume={start}"]) == 2
    assert "is not the newest checkpoint" in capsys.readouterr().err
    arguments = [*settings, f"run.resume={start}", f"run.dir={tmp_path / 'branch'}"]
    for _ in range(2):  # and again, by the same command
        assert main(arguments) == 0
        assert lora(tmp_path / "branch") == lora(unbroken) and lines(tmp_path / "branch") == lines(unbroken)
        assert rows(tmp_path / "branch") == rows(unbroken)
    ids = {row["run_id"] for row in pq.read_table(tmp_path / "branch/trajectories", columns=["run_id"]).to_pylist()}
    assert len(ids) == 2  # who made which


def test_a_run_by_its_path(settings, unbroken, stopped, tmp_path, capsys):
    assert main([*settings, f"run.resume={stopped}"]) == 0
    assert_same(unbroken, stopped)
    assert main([*settings, f"run.resume={tmp_path / 'nowhere'}"]) == 2
    assert "nowhere is neither a run nor a checkpoint" in capsys.readouterr().err


def test_a_torn_checkpoint_is_passed_over_and_the_end_is_the_same(settings, unbroken, stopped, capsys):
    torn = stopped / "checkpoints/step-000002/learner.pt"
    torn.write_bytes(torn.read_bytes()[:1000])
    assert main([*settings, f"run.dir={stopped}"]) == 0
    assert "sha256 differs" in capsys.readouterr().err
    assert_same(unbroken, stopped)


@pytest.mark.parametrize(
    ("file", "before", "after", "said"),
    [
        ("run.json", '"format": 5', '"format": 99', "format 99"),
        ("config.yaml", f"config_version: {CONFIG_VERSION}", "config_version: 99", "version 99"),
        ("run.json", '"run_id"', "", "run.json in"),
        ("metrics.jsonl", '{"epoch": 1', '{"epo', "metrics.jsonl in"),
        ("config.yaml", "steps: 4", "steps: four", "config.yaml is damaged"),
    ],
)
def test_a_run_of_another_version_or_damaged_is_refused(
    file, before, after, said, settings, unbroken, tmp_path, capsys
):
    folder = tmp_path / "run"
    shutil.copytree(unbroken, folder, symlinks=True)
    text = (folder / file).read_text()
    assert before in text
    (folder / file).write_text(text.replace(before, after))
    assert main([*settings, f"run.dir={folder}"]) == 2
    error = capsys.readouterr().err
    assert said in error and str(folder) in error and "Traceback" not in error


def test_fewer_epochs_than_are_done_are_refused(settings, unbroken, capsys):
    assert main([*settings, f"run.dir={unbroken}", "train.epochs=2"]) == 2
    assert "train.epochs: 2, but the run in" in capsys.readouterr().err


def test_settings_that_may_change_are_those_of_the_newest_command(settings, unbroken, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(unbroken, folder, symlinks=True)
    assert main([*settings, f"run.dir={folder}", "mlflow.experiment=another"]) == 0
    assert saved_config(Records.open(Storage(str(folder)))).mlflow.experiment == "another"


def test_a_branch_that_was_cut_short_is_made_again(settings, unbroken, tmp_path):
    arguments = [*settings, f"run.resume={unbroken / 'checkpoints/step-000002'}", f"run.dir={tmp_path / 'branch'}"]
    for name, count in (("write", 3), ("write", 6), ("write_folder", 1)):
        with killed(Storage, name, count):
            main(arguments)
        assert not (tmp_path / "branch/run.json").exists()
    assert main(arguments) == 0
    assert lora(tmp_path / "branch") == lora(unbroken) and lines(tmp_path / "branch") == lines(unbroken)


@pytest.mark.long
def test_checkpoints_passed_over_do_not_crowd_out_the_new_ones(settings, unbroken, tmp_path):
    arguments = [*settings, "run.keep_checkpoints=1", "evaluation.images=0", f"run.dir={tmp_path / 'run'}"]
    assert main([*arguments, "train.epochs=2"]) == 0
    folder = tmp_path / "run/checkpoints"
    storage = Storage(str(tmp_path / "run"))
    held = checkpoint.load(storage, 2, Records.open(storage).run_id)
    checkpoint.save(storage, {**held.manifest, "step": 1}, held.files)  # whole, and older
    shutil.copytree(folder / "step-000002", folder / "step-000009")
    (folder / "step-000009/learner.pt").write_bytes(b"torn")
    assert main(arguments) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-000003"]
    assert (folder / "latest").resolve() == (folder / "step-000003").resolve()


def test_a_copied_run_whose_latest_is_a_folder_goes_on(settings, unbroken, two_epochs, tmp_path):
    copied = shutil.copytree(two_epochs, tmp_path / "copied")  # follows the link
    assert (copied / "checkpoints/latest").is_dir() and not (copied / "checkpoints/latest").is_symlink()
    assert main([*settings, f"run.resume={copied}"]) == 0
    assert lora(copied) == lora(unbroken)


def test_a_branch_is_that_of_the_named_checkpoint_only(settings, unbroken, tmp_path, capsys):
    start, other = (unbroken / f"checkpoints/step-{step:06d}" for step in (2, 0))
    branch = tmp_path / "branch"
    assert main([*settings, f"run.resume={start}", f"run.dir={branch}", "train.epochs=1"]) == 2
    assert "has done 2 already" in capsys.readouterr().err and not branch.exists()
    assert main([*settings, f"run.resume={start}", f"run.dir={branch}"]) == 0
    assert main([*settings, f"run.resume={other}", f"run.dir={branch}"]) == 2
    assert "did not begin from" in capsys.readouterr().err
    assert main([*settings, f"run.dir={branch}"]) == 0


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["run.dir=UNBROKEN", "sampler.steps=8"], "sampler.steps: the run in"),
        (["run.dir=UNBROKEN", "run.resume=never"], "already holds a run"),
        (["run.resume=/nothing"], "/nothing is neither"),
        (["run.dir=FILE"], "is a file"),
        (["run.dir=UNBROKEN"], None),
        (["run.resume=UNBROKEN/checkpoints/step-000002", "run.dir=/no/branch"], None),
    ],
)
def test_a_plan_refuses_what_the_run_would(overrides, said, settings, unbroken, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    places = {"UNBROKEN": str(unbroken), "FILE": str(tmp_path / "file")}
    for name, place in places.items():
        overrides = [override.replace(name, place) for override in overrides]
    assert main([*settings, *overrides, "--plan"]) == (2 if said else 0)
    captured = capsys.readouterr()
    assert said in captured.err if said else "step-00000" in captured.out.splitlines()[0]


def test_the_latest_checkpoint_by_its_link(settings, unbroken, tmp_path):
    arguments = [*settings, f"run.resume={unbroken}/checkpoints/latest", f"run.dir={tmp_path / 'branch'}"]
    assert main(arguments) == 0
    assert lora(tmp_path / "branch") == lora(unbroken)


@pytest.mark.long
def test_a_run_without_evaluation(settings, tmp_path):
    assert main([*settings, "evaluation.images=0", f"run.dir={tmp_path / 'run'}"]) == 0
    assert [line["epoch"] for line in lines(tmp_path / "run")] == [0, 1, 2]
    assert "3 of 3" in (tmp_path / "run/report.html").read_text()


def test_a_view_or_an_old_checkpoint_that_fails_costs_one_warning(settings, unbroken, tmp_path, monkeypatch, capsys):
    def fails(*_):
        raise StorageError("busy")

    views = [(Bar, "show", "progress bar"), (Heartbeat, "turn", "status.json"), (Tracker, "finish", "MLflow"),
             (html, "render", "report.html"), (summary, "describe", "summary")]  # fmt: skip
    for owner, name, _ in views:
        monkeypatch.setattr(owner, name, fails)
    monkeypatch.setattr(checkpoint, "prune", fails)
    assert main([*settings, f"run.dir={tmp_path / 'run'}"]) == 0
    said = capsys.readouterr().out
    assert all(said.count(f"warning: no {view}: StorageError: busy") == 1 for *_, view in views)
    assert said.count("warning: an old checkpoint stays: busy") == 4
    assert lora(tmp_path / "run") == lora(unbroken)


def test_a_run_is_laid_out_as_format_5_says(unbroken):
    """Runs of other versions of this code are gone on with only while this holds."""
    files = "run.json", "checkpoints/latest/state.json"
    about, manifest = (json.loads((unbroken / name).read_text()) for name in files)
    assert set(about) == {
        "format", "run_id", "name", "created", "finished", "config_digest", "prompts_sha256", "environment", "cluster",
    }  # fmt: skip
    assert set(manifest) == {
        "format", "run_id", "mlflow_run_id", "step", "next_epoch", "prompts_drawn", "policy_version", "adapter_sha256",
        "ranks", "batch_sizes", "ledger", "config_digest", "files", "sha256",
    }  # fmt: skip
    assert set(manifest["batch_sizes"]) == {"chunk", "flow_batch", "micro_batch", "score"}
    adapter = {"lora/pytorch_lora_weights.safetensors", "lora/kohya.safetensors"}
    assert set(manifest["files"]) == {"learner.pt", "replay-0.pt", "config.yaml", *adapter}
    assert {path.name for path in unbroken.iterdir()} == {
        "run.json", "run.lock", "config.yaml", "metrics.jsonl", "status.json", "trajectories", "evaluation",
        "checkpoints", "before.png", "after.png", "report.html",
    }  # fmt: skip
    names = {path.name for path in (unbroken / "evaluation").iterdir()}
    epochs = ("epoch-before", "epoch-000001", "epoch-000002")
    assert names == {f"{epoch}.{kind}" for epoch in epochs for kind in ("json", "parquet", "png")}


def test_a_run_lives_on_an_fsspec_url_too(settings, unbroken):
    url = "memory://bucket/run"
    with killed(InProcessRunner, "train_epoch", 2):
        main([*settings, f"run.dir={url}"])
    assert main([*settings, f"run.dir={url}"]) == 0
    storage = Storage(url)
    newest = checkpoint.load(storage, 3, Records.open(storage).run_id)
    assert [
        newest.files[f"lora/{file.name}"] for file in sorted((unbroken / "checkpoints/latest/lora").iterdir())
    ] == lora(unbroken)
    assert storage.exists("report.html") and storage.entries("trajectories")[-1] == "epoch-000002.parquet"


@pytest.mark.long
def test_a_resumed_run_keeps_the_batches_that_memory_once_had(small_settings, tmp_path, capsys):
    """Open in the config, they are found once, kept in the checkpoint, and may be made smaller by hand."""
    run = tmp_path / "run"
    settings = [*small_settings, "run.runner=inprocess", "evaluation.images=0", f"run.dir={run}"]
    open_ended = [*settings, "learner.micro_batch=null"]

    def sizes() -> dict:
        return json.loads((run / "checkpoints/latest/state.json").read_text())["batch_sizes"]

    assert main([*open_ended, "train.epochs=1"]) == 0
    assert (sizes()["micro_batch"], sizes()["score"]) == (8, 32)
    storage = Storage(str(run))
    held = checkpoint.load(storage, 1, Records.open(storage).run_id)
    small = {**held.manifest["batch_sizes"], "micro_batch": 2, "score": 3}  # as if a small GPU had begun the run
    checkpoint.save(storage, {**held.manifest, "batch_sizes": small}, held.files)
    assert main([*open_ended, "train.epochs=2"]) == 0
    assert (sizes()["micro_batch"], sizes()["score"]) == (2, 3)
    assert "last bits" not in capsys.readouterr().err
    assert main([*settings, "learner.micro_batch=1", "train.epochs=3"]) == 0
    assert (sizes()["micro_batch"], sizes()["score"]) == (1, 3)
    assert "learner.micro_batch is 1 now, it was 2: last bits differ" in capsys.readouterr().err
