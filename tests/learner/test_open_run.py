"""Killed at any point and started again by the same command: bitwise the unbroken run, no holes, no repeats. Over
emulated parts; that the learner's own state goes on bitwise is test_every_objective.py's."""

import shutil
from contextlib import contextmanager
from unittest.mock import Mock

import pytest
from emulated_run import outcome, totals

from learner import controller
from learner.config import load_config, saved_config
from learner.config.schema import CONFIG_VERSION
from learner.inprocess import InProcessRunner
from learner.open_run import open_run
from learner.prompts import evaluation_prompts, training_prompts
from learner.run import main
from learner.update import NonFiniteGradient
from records import checkpoint
from records.heartbeat import Heartbeat, look
from records.run_folder import Records
from records.storage import Storage, StorageError
from reports import html, summary
from reports.progress import Bar
from reports.tracking import Tracker


@pytest.fixture
def go(light):
    return lambda folder, *settings: main([*light, f"run.dir={folder}", *settings])


class Killed(BaseException):
    pass


@pytest.fixture
def finished(unbroken, tmp_path):
    return shutil.copytree(unbroken, tmp_path / "run", symlinks=True)


@pytest.fixture
def stopped(finished):
    shutil.rmtree(finished / "checkpoints/step-000006")
    Records.open(Storage(str(finished))).note(finished=False)
    return finished


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


@pytest.mark.parametrize("after", [False, pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    ("owner", "name", "count"),
    [
        (InProcessRunner, "evaluate", 1),  # before anything is on disk
        (InProcessRunner, "train_epoch", 1),  # before the first epoch
        (InProcessRunner, "train_epoch", 2),
        (InProcessRunner, "checkpoint_files", 3),
        (InProcessRunner, "evaluate", 2),
        (Records, "save_trajectories", 2),
        (Records, "append", 3),
        (checkpoint, "save", 3),
        (checkpoint, "prune", 3),  # closed
        (html, "render", 1),
        (controller, "finish", 1),  # all done but the end
    ],
)
def test_a_run_killed_anywhere_ends_as_the_unbroken_one(go, owner, name, count, after, unbroken, tmp_path):
    folder = tmp_path / "run"
    with killed(owner, name, count, after):
        go(folder)
    assert go(folder) == 0
    assert outcome(folder) == outcome(unbroken)
    whole = {"issued": 48, "sampled": 48, "scored": 48, "trained": 48, "quarantined": 0, "lost": 0}
    assert totals(folder) == whole
    for picture in ("before.png", "after.png"):
        assert (folder / picture).read_bytes() == (unbroken / picture).read_bytes()


def test_a_finished_run_is_left_alone(go, unbroken, finished, capsys):
    def times() -> dict:
        return {path: path.stat().st_mtime_ns for path in (finished / "checkpoints").rglob("*")}

    before = times()
    assert go(finished) == 0
    assert "nothing is left to do" in capsys.readouterr().out and before == times()
    assert outcome(finished) == outcome(unbroken)


def test_without_run_dir_the_newest_unfinished_run_of_the_same_settings_goes_on(light, unbroken, tmp_path, capsys):
    arguments = [*light, f"run.root={tmp_path}"]
    with killed(InProcessRunner, "train_epoch", 2):
        main(arguments)
    assert main([*arguments, "run.seed=7"]) == 0  # other settings: another run
    assert main(arguments) == 0
    assert "going on from checkpoints/step-000002: 1 of 3 epochs" in capsys.readouterr().out
    assert main(arguments) == 0  # all are finished: a new one
    folders = sorted((tmp_path / "runs").iterdir(), key=lambda path: Records.open(Storage(str(path))).about["created"])
    assert len(folders) == 3 and outcome(folders[0]) == outcome(folders[2]) == outcome(unbroken)


def test_more_epochs_prolong_a_finished_run_with_what_may_be_changed(go, unbroken, tmp_path):
    folder = tmp_path / "run"
    assert go(folder, "train.epochs=1") == 0 and go(folder, "mlflow.experiment=another") == 0
    assert saved_config(Records.open(Storage(str(folder)))).mlflow.experiment == "another"
    # The shorter run was evaluated after its last epoch; otherwise nothing differs (the preset does not anneal).
    for key in ("LoRA", "learner", "cursor", "ledger", "rows"):
        assert outcome(folder)[key] == outcome(unbroken)[key]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["lora.rank=3", "objective.beta=7"], ("lora.rank: the run in", ", not 3; use that", "objective.beta: ")),
        (["run.resume=never"], ("already holds a run",)),
        (["run.dir=FILE"], ("is a file",)),
        (["train.epochs=2"], ("train.epochs: 2, but the run in", "has done 3 already")),
        (["prompts.path=[a red ring]"], ("prompts.path: the run in",)),
        (["mlflow.group=free"], None),
    ],
)
def test_what_a_run_cannot_go_on_with_is_refused_key_by_key_and_by_a_plan(
    go, overrides, said, unbroken, tmp_path, capsys
):
    (tmp_path / "file").write_text("")
    overrides = [text.replace("FILE", f"{tmp_path}/file") for text in overrides]
    assert go(unbroken, *overrides, "--plan") == (2 if said else 0)
    planned = capsys.readouterr()
    if not said:
        assert planned.out == f"{unbroken}, going on\n"
        return
    assert go(unbroken, *overrides) == 2 and capsys.readouterr().err == planned.err
    assert all(words in planned.err for words in said)


def test_after_a_gradient_that_is_not_finite_a_lower_rate_goes_on_and_nothing_else(go, tmp_path, monkeypatch, capsys):
    run, lower = tmp_path / "run", ["learner.learning_rate=1e-5", "objective.beta=7"]
    assert go(run, "train.epochs=1") == 0 and go(run, *lower) == 2  # it had not failed
    with monkeypatch.context() as patched:
        patched.setattr(InProcessRunner, "train_epoch", Mock(side_effect=NonFiniteGradient("inf")))
        assert go(run) == 1
    for other in (["learner.learning_rate=1"], ["learner.learning_rate=1e-5", "lora.rank=3"]):
        assert go(run, *other) == 2
    capsys.readouterr()
    assert go(run, *lower) == 0 and go(run, *lower) == 0
    assert "warning: learner.learning_rate is 1e-05 now, it was 0.0025 (noted in run.json)" in capsys.readouterr().err
    about, line = Records.open(Storage(str(run))).about, {"epoch": 1, "key": "learner.learning_rate"}
    assert about["changes"][0] == line | {"before": 0.0025, "after": 1e-5} and len(about["changes"]) == 2
    assert go(run) == 2  # not higher again


def test_of_a_long_error_the_beginning_is_said_and_all_of_it_kept(go, tmp_path, monkeypatch, capsys):
    words = "\x1b[2J" + "no, " * 200_000
    monkeypatch.setattr(InProcessRunner, "train_epoch", Mock(side_effect=NonFiniteGradient(words)))
    assert go(tmp_path) == 1
    said = capsys.readouterr()
    assert (
        "\x1b" not in said.err and len(said.err) < 3000 and said.err.rstrip().endswith("where traceback.txt says more")
    )
    assert words in (tmp_path / "traceback.txt").read_text()
    reason = look(Storage(str(tmp_path)), 0)["reason"]
    assert len(reason) < 3000


def test_metrics_that_were_emptied_between_runs_are_missed_and_said(go, stopped, capsys):
    (stopped / "metrics.jsonl").write_text("")
    assert go(stopped) == 0
    assert f"warning: metrics.jsonl in {stopped} lacks 2 of 2 epochs" in capsys.readouterr().err
    assert go(stopped) == 0 and "lacks 2 of 3 epochs" in capsys.readouterr().err


def test_a_prompt_file_that_has_changed_is_refused(go, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    for text, status in (("a red ring\na blue ring\n", 0), ("a red ring\n", 2)):
        prompts.write_text(text)
        assert go(tmp_path / "run", f"prompts.path={prompts}", "train.epochs=1") == status
    assert "prompts.path" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["report.html", "config.yaml", ".hidden.new", "checkpoints/step-000001/x", "run.lock"])
@pytest.mark.parametrize("more", [[], ["--plan"], ["run.resume=never"]])
def test_somebody_elses_folder_is_left_alone(go, name, more, tmp_path, capsys):
    (tmp_path / "theirs" / name).parent.mkdir(parents=True)
    (tmp_path / "theirs" / name).write_text("theirs")
    assert go(tmp_path / "theirs", *more) == 2
    said = f"run.dir: {tmp_path}/theirs holds {name.split('/')[0]} and no run of this Tributary; choose an empty or new"
    assert said in capsys.readouterr().err
    (left,) = [path for path in (tmp_path / "theirs").rglob("*") if path.is_file()]
    assert left.read_text() == "theirs"


def test_records_without_their_checkpoints_are_not_written_over(go, stopped, capsys):
    before = (stopped / "metrics.jsonl").read_bytes()
    shutil.rmtree(stopped / "checkpoints")
    assert go(stopped) == 2 and "none of their checkpoints: put checkpoints/ back" in capsys.readouterr().err
    assert (stopped / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("count", [1, 2])
def test_a_run_that_was_killed_as_its_folder_was_begun_begins_there(go, count, unbroken, tmp_path):
    folder = tmp_path / "run"
    (folder / "lost+found").mkdir(parents=True)
    assert go(folder) == 2
    (folder / "lost+found").rmdir()
    with killed(Storage, "write", count):
        go(folder)
    assert not (folder / "run.json").exists() and (folder / "run.lock").exists()
    assert go(folder) == 0 and outcome(folder) == outcome(unbroken)


def test_files_of_ones_own_in_a_runs_folder_stay(go, stopped):
    own = [
        stopped / name for name in (".notes.old", "trajectories/2024.parquet", "checkpoints/mine/x", "evaluation/7.txt")
    ]
    for file in own:
        file.parent.mkdir(exist_ok=True)
        file.write_text("mine")
    shutil.rmtree(stopped / "checkpoints/step-000004")
    assert go(stopped) == 0
    assert all(file.read_text() == "mine" for file in own)


def test_a_run_in_use_is_refused(light, tmp_path):
    config = load_config(overrides=[*light, f"run.dir={tmp_path / 'run'}"])
    opened = open_run(config, tmp_path, ["a"], print)
    with pytest.raises(StorageError, match="in use by process"):
        open_run(config, tmp_path, ["a"], print)
    opened.close()
    open_run(config, tmp_path, ["a"], print).close()


def test_torn_checkpoints_are_passed_over_and_dropped_and_the_end_is_the_same(go, unbroken, stopped, capsys):
    torn = stopped / "checkpoints/step-000004/learner.json"
    torn.write_bytes(torn.read_bytes()[:100])
    foreign = shutil.copytree(torn.parent, stopped / "checkpoints/step-000005")
    assert go(stopped) == 2
    said = capsys.readouterr()
    assert "step-000005 is not its own" in said.err and "step-000005 is not this run's" in said.err
    shutil.rmtree(foreign)
    assert go(stopped) == 0
    said = capsys.readouterr()
    assert "sha256 differs" in said.err
    assert "going on from checkpoints/step-000002" in said.out
    assert outcome(stopped) == outcome(unbroken)


@pytest.mark.parametrize(
    ("file", "before", "after", "said"),
    [
        ("run.json", '"format": 6', '"format": 99', "format 99"),
        ("config.yaml", f"config_version: {CONFIG_VERSION}", "config_version: 99", "version 99"),
        ("config.yaml", "steps: 10", "steps: ten", "config.yaml is damaged"),
    ],
)
def test_a_run_of_another_version_is_refused(go, file, before, after, said, finished, capsys):
    """Files as that version wrote them."""
    text, records = (finished / file).read_text(), Records.open(Storage(str(finished)))
    assert before in text
    if file == "config.yaml":
        records.save_settings(text.replace(before, after).encode())
    else:
        records.note(format=99)
    assert go(finished) == 2
    error = capsys.readouterr().err
    assert said in error and str(finished) in error and "Traceback" not in error


def test_a_copied_run_whose_latest_is_a_folder_goes_on(go, unbroken, stopped, tmp_path):
    (stopped / "checkpoints/latest").unlink()
    (stopped / "checkpoints/latest").symlink_to("step-000004")
    copied = shutil.copytree(stopped, tmp_path / "copied")  # follows the link
    assert (copied / "checkpoints/latest").is_dir() and not (copied / "checkpoints/latest").is_symlink()
    assert go(copied) == 0 and outcome(copied) == outcome(unbroken)


def test_a_view_or_an_old_checkpoint_that_fails_costs_one_warning(go, unbroken, tmp_path, monkeypatch, capsys):
    fails = Mock(side_effect=StorageError("busy"))
    views = [(Bar, "show", "progress bar"), (Heartbeat, "turn", "status.json"), (Tracker, "__init__", "MLflow"),
             (html, "render", "report.html"), (summary, "describe", "summary")]  # fmt: skip
    for owner, name, _ in views:
        monkeypatch.setattr(owner, name, fails)
    monkeypatch.setattr(checkpoint, "prune", fails)
    assert go(tmp_path / "run", "mlflow.enabled=true") == 0
    said = capsys.readouterr().out
    assert all(said.count(f"warning: no {view}: StorageError: busy") == 1 for *_, view in views)
    assert said.count("warning: an old checkpoint stays: busy") == 4
    assert outcome(tmp_path / "run")["LoRA"] == outcome(unbroken)["LoRA"]


def test_a_run_lives_on_an_fsspec_url_too(go, unbroken):
    url = "memory://bucket/run"
    with killed(InProcessRunner, "train_epoch", 2):
        go(url)
    assert go(url) == 0
    storage = Storage(url)
    newest = checkpoint.load(storage, 6, Records.open(storage).run_id)
    assert newest.files["lora/flat.bin"] == outcome(unbroken)["LoRA"]["flat.bin"]
    assert storage.exists("report.html") and storage.entries("trajectories")[-1] == "epoch-000002.parquet"


def test_a_resumed_run_keeps_the_ranks_and_batches_that_it_began_with(light, tmp_path):
    """Open in the config, they are found once, kept in the checkpoint, and may be made smaller by hand."""
    said, storage = [], Storage(str(tmp_path / "run"))
    settings = [*light, "train.epochs=1", "learner.ranks=null", "learner.micro_batch=null", f"run.dir={storage}"]
    assert main(settings) == 0
    saved = checkpoint.load(storage, 2, Records.open(storage).run_id)
    begun = {**saved.manifest, "ranks": 2, "batch_sizes": {"micro_batch": 2, "score": 3}}  # as if by two small GPUs
    checkpoint.save(storage, begun, saved.files)

    def as_begun(*overrides: str) -> tuple:
        config = load_config(overrides=[*settings, *overrides])
        run = open_run(config, tmp_path, [*training_prompts(config), *evaluation_prompts(config)], said.append)
        run.close()
        return run.as_begun.learner.ranks, run.as_begun.learner.micro_batch, run.as_begun.reward.batch

    assert as_begun() == (2, 2, 3) and said == []
    assert as_begun("learner.micro_batch=1", "reward.batch=3") == (2, 1, 3)
    (warning,) = said
    assert "learner.micro_batch is 1 now, it was 2" in warning
