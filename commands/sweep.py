"""Runs one configuration after the other and compares them: `python -m learner.sweep FILE.yaml [key=value ...]`.

    config: configs/shapes_alignment.yaml       # default: the demo's
    runs: [{objective.beta: 10}, {objective.beta: 30, learner.learning_rate: 1e-3}]
    grid: {run.seed: [1, 2], lora.rank: [4, 16]} # every combination, of each of `runs`

Each run has the whole cluster (RAY_ADDRESS, or a Ray of its own here), and is one of a group in MLflow. Stopped? The
same command goes on: what is finished is not run again. At the end learner.compare judges them all.
"""

from __future__ import annotations

import argparse
import itertools
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cluster import signals
from commands import compare
from learner.config import DEFAULT_CONFIG, ConfigError, read_config, resolve
from records.run_folder import RUN, Records
from records.storage import Storage, StorageError

KEYS = ("config", "runs", "grid")
MOST = 64  # a longer list is a mistake more often than a wish
POLL_SECONDS = 0.5
END_SECONDS = 15.0  # for a run to end cleanly once we are told to


@dataclass(frozen=True)
class Planned:
    """One run: its folder's name, and what it sets beside the configuration."""

    name: str
    settings: tuple[str, ...]  # key=value


def plan(tree: Any, overrides: Sequence[str], source: Path) -> tuple[Path, list[Planned]]:
    """The configuration file and the runs that a sweep's YAML means, each checked.

    Raises:
        ConfigError: a line for each fault.
    """
    if not isinstance(tree, dict) or (set(tree) - set(KEYS)):
        extra = sorted(map(str, set(tree) - set(KEYS))) if isinstance(tree, dict) else []
        raise ConfigError(
            f"{source}: expected the keys {', '.join(KEYS)}" + (f", got {', '.join(extra)}" if extra else "")
        )
    config = resolve(str(tree.get("config", DEFAULT_CONFIG)))
    runs, grid = tree.get("runs") or [{}], tree.get("grid") or {}
    if not isinstance(runs, list) or not all(isinstance(one, dict) for one in runs):
        raise ConfigError(f"{source}: runs: expected a list of settings such as {{objective.beta: 10}}")
    if not isinstance(grid, dict) or not all(isinstance(values, list) and values for values in grid.values()):
        raise ConfigError(f"{source}: grid: expected settings with lists of values, such as run.seed: [1, 2]")
    combined = [
        {**one, **dict(zip(grid, values, strict=True))} for one in runs for values in itertools.product(*grid.values())
    ]
    if len(combined) > MOST:
        raise ConfigError(f"{source}: {len(combined)} runs; at most {MOST}")
    found, faults = [], []
    for index, settings in enumerate(combined):
        given = tuple(f"{key}={yaml.safe_dump(value, default_flow_style=True).splitlines()[0]}"
                      for key, value in settings.items())  # fmt: skip
        label = "-".join(f"{key.split('.')[-1]}_{value}" for key, value in settings.items())
        name = f"{index:02d}" + (f"-{re.sub(r'[^A-Za-z0-9_.-]+', '_', label)[:80]}" if label else "")
        found.append(Planned(name, given))
        if "run.dir" in settings:
            faults.append(f"{source}: run {name}: run.dir is the sweep's own business (--out)")
        faults += [f"{source}: run {name}: {fault}" for fault in read_config(config, [*overrides, *given])[1]]
    if faults:
        raise ConfigError("\n".join(dict.fromkeys(faults)))
    return config, found


def run(config: Path, planned: Sequence[Planned], overrides: Sequence[str], out: Storage, group: str) -> list[str]:
    """Run what is not finished yet, one after the other. Returns the names of those that failed."""
    failed = []
    for number, one in enumerate(planned, 1):
        print(f"run {number} of {len(planned)}: {one.name}", flush=True)
        command = [
            sys.executable, "-m", "learner.run", "--config", str(config), *overrides, *one.settings,
            f"run.dir={out}/{one.name}", "run.resume=auto", f"mlflow.group={group}",
        ]  # fmt: skip
        if (status := _follow(command)) != 0:
            failed.append(one.name)
            print(f"learner.sweep: {one.name} ended with status {status}; going on", file=sys.stderr, flush=True)
    return failed


def finished(out: Storage, planned: Sequence[Planned]) -> list[str]:
    """Folders of those that are done."""
    folders = [f"{out}/{one.name}" for one in planned]
    return [folder for folder in folders if _is_finished(Storage(folder))]


def _is_finished(storage: Storage) -> bool:
    try:
        return storage.exists(RUN) and bool(Records.open(storage).about["finished"])
    except StorageError:
        return False


def _follow(command: Sequence[str]) -> int:
    """Run a command to its end; if we are told to end, it is, and cleanly.

    Raises:
        KeyboardInterrupt: we were.
    """
    process = subprocess.Popen(command)
    try:
        while True:
            try:
                return process.wait(POLL_SECONDS)
            except subprocess.TimeoutExpired:
                continue
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)  # after a Ctrl-C it has had one already: the second does no harm
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m learner.sweep", description=__doc__.splitlines()[0],
                                     formatter_class=argparse.RawDescriptionHelpFormatter, epilog=__doc__)  # fmt: skip
    parser.add_argument("file", type=Path, help="YAML file of the sweep")
    parser.add_argument("--out", help="folder or URL of the runs (default: runs/NAME, NAME from the file)")
    parser.add_argument("--plan", action="store_true", help="print the runs, and stop")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of every run")
    args = parser.parse_intermixed_args(arguments)
    signals.running()
    try:
        try:
            tree = yaml.safe_load(args.file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"cannot read {args.file}: {' '.join(str(error).split())}") from error
        config, planned = plan(tree, args.overrides, args.file)
        if args.plan:
            print("\n".join(f"{one.name}  {' '.join(one.settings)}" for one in planned))
            return 0
        out = Storage(args.out or str(Path("runs") / args.file.stem))
    except (ConfigError, StorageError) as error:
        for line in str(error).splitlines():
            print(f"learner.sweep: {line}", file=sys.stderr)
        return 2
    try:
        failed = run(config, planned, args.overrides, out, args.file.stem)
        done = finished(out, planned)
        status = compare.main([*done, "--out", f"{out}/comparison", *args.overrides]) if done else 0
    except KeyboardInterrupt:
        print("learner.sweep: interrupted; the same command goes on", file=sys.stderr)
        return signals.status()
    if failed:
        print(f"learner.sweep: failed: {', '.join(failed)}; the same command tries them again", file=sys.stderr)
    return 1 if failed else status
