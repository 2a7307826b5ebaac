"""How a run is doing, on a terminal: `python -m learner.status RUN`, while it is in progress or after it.

It reads the run's files alone (records/heartbeat.py), from wherever they can be read: neither Ray nor torch is needed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from typing import IO, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from commands.outcome import attempt, warner
from records.heartbeat import EPOCHS, FILE, look
from records.storage import Storage
from records.words import printable
from reports.summary import clock, duration, interpreter

EVENTS = 5
BARS = "▁▂▃▄▅▆▇█"
COLOURS = {"starting": "cyan", "running": "green", "finished": "green", "unknown": "yellow", "stopped": "yellow"}


def show(status: dict[str, Any], file: IO[str] | None = None) -> None:
    """Print what `look` returned; plain text where the file, by default stdout, is no terminal."""
    colour = COLOURS.get(status["state"], "red")
    lines = [Text.assemble((printable(status["name"]), "bold"), f"  {printable(status['directory'])}")]
    for label, words in _rows(status):
        lines.append(Text.assemble((f"{label:<10} ", "bold"), (printable(words), colour if label == "state" else "")))
    console = Console(file=file, markup=False, emoji=False, highlight=False)
    console.print(*lines, sep="\n", soft_wrap=True)  # long paths stay in one piece
    if status["lines"]:
        console.print("", _table(status["lines"][-EPOCHS:]), sep="\n")


def _rows(status: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Lines of a label and what it says."""
    trained = [line for line in status["lines"] if line["epoch"] >= 0]
    yield "state", _state_in_words(status)
    total = f" of {status['epochs']}" if status["epochs"] else ""
    progress = f"{status['epochs_done']}{total} epoch{'' if status['epochs'] == 1 else 's'} done"
    if doing := status["doing"]:
        progress += f", {doing['doing']}" + (f" {doing['done']}/{doing['total']}" if doing["total"] > 1 else "")
    progress += f"; step {status['step']}, policy version {status['policy_version']}"
    if status["epoch_seconds"] is not None:
        progress += f"; {duration(status['epoch_seconds'])} an epoch"
    if status["seconds_left"] is not None:
        progress += f", about {duration(status['seconds_left'])} left"
    yield "progress", progress
    rewards = [line["reward_mean"] for line in trained if line.get("reward_mean") is not None]
    if len(rewards) > 1:
        yield "reward", f"{rewards[0]:.3f} {_sparkline(rewards)} {rewards[-1]:.3f}"
    if status["actors"]:
        yield "actors", ", ".join(f"{count} {role}" for role, count in status["actors"].items())
        waiting, running = status["waiting"], status["running"].items()
        queues = (f"{role} {waiting.get(role, 0)} waiting, {n} running" for role, n in running)
        yield "chunks", f"{'; '.join(queues)}; epochs in work: {status['epochs_in_work']}"
    if status["staleness"] and trained:
        mean, most = status["staleness"]
        yield "staleness", f"{mean:.2g} versions on average, {most} at most, in the last epoch"
    if status["lost_trajectories"]:
        yield "lost", f"{status['lost_trajectories']} trajectories, made again"
    if status["events"]:
        yield "events", f"{status['events']} since this start (faults survived, nodes), the last:"
        yield from (("", f"{clock(event['time'])} {event['text']}") for event in status["last_events"][-EVENTS:])
    yield from ((label, status[key]) for label, key in (("LoRA", "lora"), ("report", "report")) if status[key])
    if status["mlflow"]:
        yield "MLflow", _mlflow(status["mlflow"], status["mlflow_run_id"])


def _state_in_words(status: dict[str, Any]) -> str:
    who, state = f"process {status['process']} on {status['host']}", status["state"]
    ago = duration(status["last_sign_seconds"]) if status["last_sign_seconds"] is not None else ""
    way_on = "the same command goes on"
    if state == "unknown":
        return f"no {FILE}: not begun, or by an older Tributary"
    return {
        "starting": f"starting, by {who}, last sign of life {ago} ago",
        "running": f"running by {who} since {clock(status['since'])}, last sign of life {ago} ago",
        "silent": f"no sign of life for {ago} from {who}",
        "gone": f"ended without a word: {who} is gone, its last sign of life was {ago} ago; {way_on}",
        "finished": "finished" + (f" {ago} ago" if ago else ""),
        "failed": f"failed {ago} ago: {status['reason'] or 'see its output'}; {way_on}",
        "stopped": f"stopped {ago} ago; {way_on}",
    }[state]


def _table(lines: Sequence[dict[str, Any]]) -> Table:
    """The last epochs, numbered from 1 as in a run's output; 0 is the evaluation before training."""
    table = Table(box=None, padding=(0, 0, 0, 3))
    for name in ("epoch", "step", "reward", "evaluated", "loss", "seconds"):
        table.add_column(name, justify="right")
    for line in lines:
        figures = (line.get(key) for key in ("reward_mean", "eval_reward_mean", "loss", "seconds"))
        words = ("" if figure is None else f"{figure:.4g}" for figure in figures)
        table.add_row(str(line["epoch"] + 1), str(line.get("step", "")), *words)
    return table


def _sparkline(values: Sequence[float], width: int = 40) -> str:
    """The last `width` values, or means of equal parts of more."""
    size = -(-len(values) // width)
    means = [sum(values[i : i + size]) / len(values[i : i + size]) for i in range(0, len(values), size)]
    low, high = min(means), max(means)
    return "".join(BARS[int((value - low) / ((high - low) or 1) * (len(BARS) - 1))] for value in means)


def _mlflow(uri: str, run_id: str | None) -> str:
    page = f"/#/runs/{run_id}" if run_id else ""
    if uri.startswith("http"):
        return uri.rstrip("/") + page
    return f"{interpreter()} -m mlflow ui --backend-store-uri {uri}" + (f", then {page}" if page else "")


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0, whatever the run's state; 2: no such run."""
    parser = argparse.ArgumentParser(prog="python -m learner.status", description="Show how a run is doing.")
    parser.add_argument("run", help="run directory or URL")
    parser.add_argument("--json", action="store_true", help="for programs: everything that is known, as one object")
    args = parser.parse_args(arguments)

    def work() -> None:
        status = look(Storage(args.run), time.time(), warner("status"))
        if args.json:
            print(json.dumps(status, indent=1))
        else:
            show(status)

    return attempt("status", work, args.run)
