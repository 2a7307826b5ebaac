"""The look at a run from outside: what it says in each state, and the sign of life that it rests on."""

import errno
import io
import json
import os
import socket
import subprocess
import time
from dataclasses import asdict
from unittest.mock import Mock

import pytest

from commands import status
from learner.inprocess import InProcessRunner
from learner.protocol.runner import Vitals
from learner.run import main
from records import heartbeat
from records.heartbeat import Heartbeat
from records.shapes import Beat
from records.storage import Storage, StorageError

VITALS = Vitals(
    3, 2, (0.5, 1), {"sampler": 2, "scorer": 1, "learner": 1}, {"sampler": 5, "scorer": 0}, {"sampler": 2, "scorer": 1}
)
ABOUT = {
    "format": 6, "run_id": "abc", "name": "mine", "created": 0, "finished": False, "config_digest": "",
    "prompts_sha256": "", "mlflow_run_id": "f00",
}  # fmt: skip


@pytest.fixture(params=["local", "memory"])
def storage(request, tmp_path):
    """Of a run that has done 3 of 10 epochs, 8 s each."""
    storage = Storage(str(tmp_path / "mine") if request.param == "local" else f"memory://{tmp_path}/mine")
    storage.write_json("run.json", ABOUT)
    line = {"epoch": -1, "step": 0, "policy_version": 0, "loss": None, "reward_mean": None, "eval_reward_mean": 0.25}
    lines = [line | {"seconds": 0.0, "time": 0, "trajectories": 0, "updates": []}]
    for n in range(3):
        line = {"epoch": n, "step": 2 * n + 2, "policy_version": n + 1, "seconds": 8.0, "loss": 0.5, "updates": [{}]}
        line |= {"time": n, "trajectories": 8, "eval_reward_mean": None}
        lines.append(line | {"reward_mean": 0.1 * n + 0.5, "lost_trajectories": 4 * n})
    storage.write("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    storage.write_folder("checkpoints/step-000006", {"state.json": b"{}"})
    return storage


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(heartbeat, "SECONDS", 0.0)
    monkeypatch.setattr(heartbeat, "OBJECT_STORE_SECONDS", 0.0)


def beating(storage, uri: str | None = None, quiet_seconds: float = 30.0) -> Heartbeat:
    beat = Heartbeat(storage, 10, uri, quiet_seconds)
    beat.running(lambda: asdict(VITALS), turns=False)
    return beat


def look(storage, later: float = 0.0) -> dict:
    return status.look(storage, time.time() + later)


def text_of(found: dict) -> str:
    status.show(found, file := io.StringIO())
    return file.getvalue()


def test_a_run_that_goes_on(storage, at_once):
    beat = beating(storage, "http://me:secret@mlflow:5000")
    for number in range(12):
        beat.event(f"sampler {number}\x1b[2J died")
    beat.progress("sampling and scoring", 3, 8)
    found = look(storage)
    assert (found["state"], found["process"], found["host"]) == ("running", os.getpid(), socket.gethostname())
    assert (found["epochs_done"], found["epochs"], found["step"], found["policy_version"]) == (3, 10, 6, 3)
    assert (found["epoch_seconds"], found["seconds_left"]) == (8.0, 56.0)
    assert (found["lost_trajectories"], found["events"], len(found["last_events"])) == (12, 12, heartbeat.EVENTS)
    assert found["staleness"] == [0.5, 1] and found["waiting"] == {"sampler": 5, "scorer": 0}
    text = text_of(found)
    for words in (
        f"running by process {os.getpid()} on {socket.gethostname()} since 20",
        "3 of 10 epochs done, sampling and scoring 3/8; step 6, policy version 3; 8 s an epoch, about 56 s left",
        "0.500 ▁▄█ 0.700", "2 sampler, 1 scorer, 1 learner", "sampler 5 waiting, 2 running", "epochs in work: 2",
        "0.5 versions on average, 1 at most", "12 trajectories", "12 since this start", "sampler 11 [2J died",
        "http://mlflow:5000/#/runs/f00", f"{storage}/checkpoints/{'latest' if storage.local else 'step-000006'}/lora",
    ):  # fmt: skip
        assert words in text
    assert "sampler 6" not in text and "secret" not in text + storage.read(heartbeat.FILE).decode()
    assert [row.split() for row in text.splitlines()[-5:]] == [
        ["epoch", "step", "reward", "evaluated", "loss", "seconds"], ["0", "0", "0.25", "0"],
        ["1", "2", "0.5", "0.5", "8"], ["2", "4", "0.6", "0.5", "8"], ["3", "6", "0.7", "0.5", "8"],
    ]  # fmt: skip


def test_a_start_that_takes_its_time_says_what_it_is_at(storage, at_once):
    beat = Heartbeat(storage, 10, None, 1000.0)
    beat.progress("starting samplers and reward actors", 1, 3)
    found = look(storage)
    assert found["state"] == "starting" and "starting samplers and reward actors 1/3" in text_of(found)


def test_silence_is_said_after_as_long_as_the_driver_may_be_quiet(storage):
    beat = Heartbeat(storage, 10, None, 1000.0)
    assert look(storage, 900)["state"] == "starting" and look(storage, 1100)["state"] == "silent"
    beat.running(lambda: asdict(VITALS), turns=True)
    assert look(storage, 900)["state"] == "silent"
    beating(storage)
    least = heartbeat.QUIET * (heartbeat.SECONDS if storage.local else heartbeat.OBJECT_STORE_SECONDS)
    assert look(storage, least - 2)["state"] == "running"
    found = look(storage, least + 100)
    assert found["state"] == "silent" and found["seconds_left"] is None
    assert f"no sign of life for {round((least + 100) / 60)} min from process {os.getpid()}" in text_of(found)


def test_a_process_of_this_machine_that_is_gone_is_known_at_once(storage):
    with subprocess.Popen(["true"]) as process:
        pass
    beating(storage)
    for host, state in ((socket.gethostname(), "gone"), ("another", "running")):
        beat = storage.read_json(heartbeat.FILE, Beat) | {"process": process.pid, "host": host}
        storage.write_json(heartbeat.FILE, beat)
        found = look(storage)
        assert found["state"] == state and ("the same command goes on" in text_of(found)) == (state == "gone")


def test_how_it_ended(storage):
    found = look(storage)
    assert found["state"] == "unknown" and found["epochs"] is None and "3 epochs done" in text_of(found)
    for state, reason, words in (("failed", "nan for a fox", ": nan for a fox; the same"), ("stopped", None, "")):
        beating(storage).end(state, reason)
        found, said = look(storage, 10_000), f"{state} 2 h 47 min ago{words}"
        assert found["state"] == state and found["actors"] is None and said in text_of(found)
    beating(storage)  # a driver that had no time to say so
    storage.write_json("run.json", ABOUT | {"finished": True})
    assert look(storage, 10_000)["state"] == "finished"


def test_writes_are_rare_but_for_an_epochs_end(storage, monkeypatch):
    beat, written = beating(storage), []
    monkeypatch.setattr(Storage, "write", lambda self, name, content: written.append(json.loads(content)))
    clock = time.monotonic()
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: clock)
    for _ in range(100):
        beat.turn()
        beat.progress("training", 0, 1)
    assert written == []
    beat.turn(closed=True)
    assert len(written) == (1 if storage.local else 0)  # an object store takes its time
    clock += heartbeat.SECONDS if storage.local else heartbeat.OBJECT_STORE_SECONDS
    beat.turn()
    beat.turn()
    assert len(written) == (2 if storage.local else 1)


def test_a_full_disk_is_no_reason_to_stop(storage, monkeypatch, at_once):
    beat, full = beating(storage), StorageError("no space left")
    full.__cause__ = OSError(errno.ENOSPC, "full")
    monkeypatch.setattr(Storage, "write", Mock(side_effect=full))
    beat.progress("training", 0, 1)
    beat.turn(closed=True)
    beat.end("failed")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("run.json", b"{"), ("run.json", b"[]"), ("metrics.jsonl", b"{}\n{"), ("metrics.jsonl", b"{}\n"),
    ],
)  # fmt: skip
def test_what_is_damaged_is_named(tmp_path, refused, name, content):
    Storage(str(tmp_path)).write_json("run.json", ABOUT)
    (tmp_path / name).write_bytes(content)
    said = refused("status", tmp_path)
    assert str(tmp_path) in said and name in said


def test_what_is_no_run_is_said_in_one_line(tmp_path, refused):
    (tmp_path / "file").write_text("")
    for place in ("{}/nothing", "{}", "{}/file", "memory://{}/nothing"):
        assert "give a run's directory" in refused("status", place.format(tmp_path))
    refused("status", "nosuch://bucket/run")


def test_texts_of_others_are_neither_markup_nor_control_codes(storage, at_once, monkeypatch):
    beat = beating(storage)
    beat.event("[red]sampler[/red] :bomb: \x1b[2J died at /a/very/long/path" + "/x" * 100)
    beat.end("failed", "[bold]no[/bold]")
    text = text_of(look(storage))
    assert "[red]sampler[/red] :bomb:  [2J died" in text and "/x" * 100 + "\n" in text and "[bold]no[/bold]" in text
    assert "\x1b" not in text
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal
    assert "\x1b[31mfailed" in text_of(look(storage))


def test_a_finished_run_is_seen(finished_run, capsys):
    assert status.main([str(finished_run), "--json"]) == 0
    seen = json.loads(capsys.readouterr().out)
    assert (seen["state"], seen["epochs_done"], seen["epochs"]) == ("finished", 2, 2)
    assert os.path.exists(seen["lora"]) and os.path.exists(seen["report"])
    assert status.main([str(finished_run)]) == 0 and "finished" in capsys.readouterr().out


def test_a_run_is_seen_while_it_trains_and_says_why_it_fails(small_settings, tmp_path, monkeypatch):
    storage, seen = Storage(str(tmp_path / "mine")), []
    files, train = InProcessRunner.checkpoint_files, InProcessRunner.train_epoch

    def spying(self):
        seen.append(look(storage))
        if len(seen) == 2:
            monkeypatch.setattr(heartbeat, "SECONDS", 1000.0)  # from here on only an epoch's end is written
        return files(self)

    def fails(self, epoch, *rest):
        if epoch == 0:
            return train(self, epoch, *rest)
        seen.append(look(storage))
        raise StorageError("the storage's own words")

    monkeypatch.setattr(InProcessRunner, "checkpoint_files", spying)
    monkeypatch.setattr(InProcessRunner, "train_epoch", fails)
    monkeypatch.setattr(heartbeat, "SECONDS", 0.0)
    assert main([*small_settings, "sampler.steps=2", "run.runner=inprocess", f"run.dir={storage}"]) == 1
    seen_doing = [(each["state"], each["doing"]["doing"]) for each in seen]
    assert seen_doing == [("running", doing) for doing in ("evaluating", "training", "training")]
    assert [each["epochs_in_work"] for each in seen[:2]] == [0, 1]
    assert seen[2]["doing"] == {"doing": "training", "done": 8, "total": 8}  # transitions
    failed = look(storage)
    assert (failed["state"], failed["reason"]) == ("failed", "StorageError: the storage's own words")
