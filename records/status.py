"""What is known of a run from its files alone, wherever they can be read, while it is in progress or after it. Imports
neither numpy nor pyarrow: a look takes no time."""

from __future__ import annotations

import json
import os
import socket
from statistics import median
from typing import Any

from records.storage import Storage, StorageError

RUN, METRICS, HEARTBEAT, REPORT, CHECKPOINTS = "run.json", "metrics.jsonl", "status.json", "report.html", "checkpoints"
EPOCHS = 6  # last ones, of the estimate


def look(storage: Storage, now: float) -> dict[str, Any]:
    """The run's state at time `now` (seconds since 1970), with all that a program may want to know; what is not known
    is None.

    Raises:
        StorageError: there is no run, it cannot be read, or a file is damaged.
    """
    about = _object(storage, RUN, storage.read(RUN), "name")
    lines = []
    if storage.exists(METRICS):
        lines = [_object(storage, METRICS, line, "epoch", "seconds") for line in storage.read(METRICS).splitlines()]
    beat = {}
    if storage.exists(HEARTBEAT):
        keys = "state", "process", "host", "since", "time", "quiet_seconds"
        beat = _object(storage, HEARTBEAT, storage.read(HEARTBEAT), *keys)
    trained = [line for line in lines if line["epoch"] >= 0]
    done, total = len(trained), beat.get("epochs")
    usual = median(line["seconds"] for line in trained[-EPOCHS:]) if trained else None
    state, reason = _state(about, beat, now)
    steps = sorted((name for name in storage.entries(CHECKPOINTS) if name.startswith("step-")), key=_step)
    newest = "latest" if storage.local else steps[-1] if steps else None
    return {
        "name": about["name"],
        "run_id": about.get("run_id"),
        "directory": str(storage),
        "state": state,
        "reason": reason,
        "process": beat.get("process"),
        "host": beat.get("host"),
        "since": beat.get("since"),
        "last_sign_seconds": max(0.0, now - beat["time"]) if "time" in beat else None,
        "doing": {key: beat.get(key) for key in ("doing", "done", "total")} if state == "running" else None,
        "epochs_done": done,
        "epochs": total,
        "step": lines[-1].get("step") if lines else 0,
        "policy_version": lines[-1].get("policy_version") if lines else 0,
        "epoch_seconds": usual,
        "seconds_left": usual * max(0, total - done) if usual is not None and total and state == "running" else None,
        "lost_trajectories": sum(line.get("lost_trajectories") or 0 for line in trained),
        **{key: beat.get(key) for key in ("staleness", "epochs_in_work", "actors", "waiting", "running")},
        "events": beat.get("events", 0),
        "last_events": beat.get("last_events", []),
        "lora": f"{storage}/{CHECKPOINTS}/{newest}/lora" if steps and newest else None,
        "report": f"{storage}/{REPORT}" if storage.exists(REPORT) else None,
        "mlflow": beat.get("mlflow"),
        "mlflow_run_id": about.get("mlflow_run_id"),
        "lines": [{key: value for key, value in line.items() if key != "updates"} for line in lines],
    }


def _step(name: str) -> int:
    number = name.removeprefix("step-")
    return int(number) if number.isdigit() else -1


def _state(about: dict[str, Any], beat: dict[str, Any], now: float) -> tuple[str, str | None]:
    """starting, running, finished, failed, stopped, silent (no sign of life for longer than it promised), gone (its
    process is no more) or unknown; and why."""
    if about.get("finished"):  # whatever else was to be done then
        return "finished", None
    state = beat.get("state", "unknown")
    if state in ("starting", "running"):
        if beat["host"] == socket.gethostname() and not _lives(beat["process"]):
            return "gone", None
        if now - beat["time"] > beat["quiet_seconds"]:
            return "silent", None
    return state, beat.get("reason")


def _lives(process: int) -> bool:
    """Of this machine."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def _object(storage: Storage, name: str, text: bytes, *keys: str) -> dict[str, Any]:
    """
    Raises:
        StorageError: it is no JSON object with these keys.
    """
    try:
        content = json.loads(text)
    except ValueError as error:
        raise StorageError(f"{name} in {storage} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise StorageError(f"{name} in {storage} is damaged: it holds a {type(content).__name__}, not an object")
    if missing := [key for key in keys if key not in content]:
        raise StorageError(f"{name} in {storage} is damaged, or of another Tributary: it has no {', '.join(missing)}")
    return content
