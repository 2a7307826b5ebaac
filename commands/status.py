"""A look at a run from a terminal: `python -m learner.status RUN`, while it goes on or after it.

It reads the run's files alone, from wherever they can be read; neither Ray nor torch, so it is there at once.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

from records.heartbeat import FILE as HEARTBEAT
from records.storage import Storage, StorageError

RUN, METRICS, REPORT, CHECKPOINTS = "run.json", "metrics.jsonl", "report.html", "checkpoints"
EPOCHS = 6  # last ones in the table, and of the estimate
EVENTS = 5
BARS = "▁▂▃▄▅▆▇█"


def look(storage: Storage, now: float) -> dict[str, Any]:
    """What is known of a run at time `now` (seconds since 1970); what is not is None. For people: `render`.

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


def render(found: dict[str, Any]) -> str:
    """For a terminal."""
    trained = [line for line in found["lines"] if line["epoch"] >= 0]
    total = found["epochs"]
    where = f"{found['epochs_done']}{f' of {total}' if total else ''} epochs done"
    if doing := found["doing"]:
        where += f", {doing['doing']}" + (f" {doing['done']}/{doing['total']}" if doing["total"] > 1 else "")
    where += f"; step {found['step']}, policy version {found['policy_version']}"
    if found["epoch_seconds"] is not None:
        where += f"; {_duration(found['epoch_seconds'])} an epoch"
    if found["seconds_left"] is not None:
        where += f", about {_duration(found['seconds_left'])} left"
    rows = [("state", _state_in_words(found)), ("progress", where)]
    rewards = [line["reward_mean"] for line in trained if line.get("reward_mean") is not None]
    if len(rewards) > 1:
        rows.append(("reward", f"{rewards[0]:.3f} {_sparkline(rewards)} {rewards[-1]:.3f}"))
    if found["actors"]:
        rows.append(("actors", ", ".join(f"{count} {role}" for role, count in found["actors"].items())))
        queues = (
            f"{role} {found['waiting'][role]} waiting, {count} running" for role, count in found["running"].items()
        )
        rows.append(("chunks", f"{'; '.join(queues)}; epochs in work: {found['epochs_in_work']}"))
    if found["staleness"] and trained:
        mean, most = found["staleness"]
        rows.append(("staleness", f"{mean:.2g} versions on average, {most} at most, in the last epoch"))
    if found["lost_trajectories"]:
        rows.append(("lost", f"{found['lost_trajectories']} trajectories, made again"))
    if found["events"]:
        rows.append(("events", f"{found['events']} since this start (faults survived, nodes), the last:"))
        for event in found["last_events"][-EVENTS:]:
            rows.append(("", f"{_clock(event['time'])} {event['text']}"))
    rows += [(label, found[key]) for label, key in (("LoRA", "lora"), ("report", "report")) if found[key]]
    if found["mlflow"]:
        rows.append(("MLflow", _mlflow(found["mlflow"], found["mlflow_run_id"])))
    text = [f"{found['name']}  {found['directory']}", *(f"{label:<10} {words}" for label, words in rows)]
    return "\n".join(_printable(line) for line in [*text, *_table(found["lines"][-EPOCHS:])])


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


def _state_in_words(found: dict[str, Any]) -> str:
    who, state = f"process {found['process']} on {found['host']}", found["state"]
    ago = _duration(found["last_sign_seconds"]) if found["last_sign_seconds"] is not None else ""
    way_on = "the same command goes on"
    if state == "unknown":
        return f"no {HEARTBEAT}: not begun, or by an older Tributary"
    return {
        "starting": f"starting, by {who}, last sign of life {ago} ago",
        "running": f"running by {who} since {_clock(found['since'])}, last sign of life {ago} ago",
        "silent": f"no sign of life for {ago} from {who}",
        "gone": f"ended without a word: {who} is gone, its last sign of life was {ago} ago; {way_on}",
        "finished": "finished" + (f" {ago} ago" if ago else ""),
        "failed": f"failed {ago} ago: {found['reason'] or 'see its output'}; {way_on}",
        "stopped": f"stopped {ago} ago; {way_on}",
    }[state]


def _table(lines: Sequence[dict[str, Any]]) -> list[str]:
    """The last epochs, numbered from 1 as in a run's output; 0 is the evaluation before training."""
    columns = {
        "epoch": lambda line: str(line["epoch"] + 1),
        "step": lambda line: str(line.get("step", "")),
        "reward": lambda line: _number(line.get("reward_mean")),
        "evaluated": lambda line: _number(line.get("eval_reward_mean")),
        "loss": lambda line: _number(line.get("loss")),
        "seconds": lambda line: _number(line.get("seconds")),
    }
    if not lines:
        return []
    return ["", "".join(f"{name:>11}" for name in columns)] + [
        "".join(f"{show(line):>11}" for show in columns.values()) for line in lines
    ]


def _sparkline(values: Sequence[float], width: int = 40) -> str:
    """The last `width` values, or means of equal parts of more."""
    size = -(-len(values) // width)
    means = [sum(values[i : i + size]) / len(values[i : i + size]) for i in range(0, len(values), size)]
    low, high = min(means), max(means)
    return "".join(BARS[int((value - low) / ((high - low) or 1) * (len(BARS) - 1))] for value in means)


def _mlflow(uri: str, run_id: str | None) -> str:
    if uri.startswith("http"):
        return f"{uri.rstrip('/')}/#/runs/{run_id}" if run_id else uri
    look = f"mlflow ui --backend-store-uri {uri}"
    return f"{look}, then /#/runs/{run_id}" if run_id else look


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02} min"


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _printable(line: str) -> str:
    """Error texts come from anywhere: no control characters for the terminal."""
    return "".join(sign if sign.isprintable() else " " for sign in line)


def _object(storage: Storage, name: str, text: bytes, *keys: str) -> dict[str, Any]:
    """
    Raises:
        StorageError: it is no JSON object with these keys.
    """
    try:
        found = json.loads(text)
    except ValueError as error:
        raise StorageError(f"{name} in {storage} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise StorageError(f"{name} in {storage} is damaged: it holds a {type(found).__name__}, not an object")
    if missing := [key for key in keys if key not in found]:
        raise StorageError(f"{name} in {storage} is damaged, or of another Tributary: it has no {', '.join(missing)}")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0, whatever the run's state; 2: no such run."""
    parser = argparse.ArgumentParser(prog="python -m learner.status", description="Show how a run is doing.")
    parser.add_argument("run", help="run directory or URL")
    parser.add_argument("--json", action="store_true", help="for programs: everything that is known, as one object")
    args = parser.parse_args(arguments)
    try:
        storage = Storage(args.run)
        if not storage.exists(RUN):
            raise StorageError(f"there is no {RUN} in it; give a run's directory")
        found = look(storage, time.time())
        text = json.dumps(found, indent=1) if args.json else render(found)
    except StorageError as error:
        print(f"learner.status: {args.run}: {error}", file=sys.stderr)
        return 2
    except (AttributeError, LookupError, TypeError, ValueError) as error:  # a value of another kind
        print(f"learner.status: {args.run}: its files are damaged, or of another Tributary: {error!r}", file=sys.stderr)
        return 2
    print(text)
    return 0
