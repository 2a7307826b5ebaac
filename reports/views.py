"""All views of a run that is going on, told by the epoch loop: lines of output, progress bar, status.json, report.html,
MLflow, last words. A view that fails warns; it never ends the run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from learner.config import Config
from learner.protocol.runner import Vitals
from records import checkpoint
from records.heartbeat import Heartbeat
from records.run_folder import BEFORE, Records
from records.words import printable, short
from reports import html, summary
from reports.progress import Bar
from reports.tracking import Tracker, tracking_uri

ENDS = {"FINISHED": "finished", "FAILED": "failed", "KILLED": "stopped"}  # as MLflow says it, and status.json


class RunViews:
    """See learner/controller.py's Views."""

    def __init__(self, records: Records, config: Config, say: Callable[[str], None]) -> None:
        self._records, self._config, self._say = records, config, say
        self._bar = Bar()
        self._heartbeat: Heartbeat | None = None
        self._tracker: Tracker | None = None
        self._warned: set[str] = set()

    def open(self) -> None:
        """There is something to do: from here on MLflow and status.json follow the run, until `close`."""
        config, storage = self._config, self._records.storage
        uri = tracking_uri(config, storage) if config.mlflow.enabled else None
        quiet = config.run.ready_seconds if config.run.runner == "ray" else config.run.train_seconds
        if uri:
            self._tracker = self._try("MLflow", lambda: Tracker(self._records, config, self.say))
        self._heartbeat = self._try("status.json", lambda: Heartbeat(storage, config.train.epochs, uri, quiet))

    def settled(self, config: Config) -> None:
        """What is measured before training is known."""
        self._config = config

    def say(self, text: str) -> None:
        self._bar.around(self._say, "\n".join(short(printable(line)) for line in text.split("\n")))

    def event(self, text: str) -> None:
        self.say(text)
        self._beat(lambda heartbeat: heartbeat.event(short(text)))

    def running(self, vitals: Callable[[], Vitals]) -> None:
        turns = self._config.run.runner == "ray"
        self._beat(lambda heartbeat: heartbeat.running(lambda: asdict(vitals()), turns))

    def progress(self, what: str, done: int, total: int) -> None:
        self._try("progress bar", lambda: self._bar.show(what, done, total))
        self._beat(lambda heartbeat: heartbeat.progress(what, done, total))

    def turn(self) -> None:
        self._beat(Heartbeat.turn)

    def epoch_closed(self, line: dict[str, Any], seconds: float) -> None:
        self._beat(lambda heartbeat: heartbeat.turn(closed=True))
        last = line["epoch"] + 1 == self._config.train.epochs  # then it is drawn at the end
        if line["epoch"] != BEFORE and line["eval_reward_mean"] is not None and not last:
            self._draw_report()
        self._track(Tracker.notify)
        self._try("summary", lambda: self.say(_epoch_line(self._config, line, seconds)))

    def finished(self) -> None:
        """Pictures, report, what changed in plain words, what to type next: from the records alone."""
        records, config, storage = self._records, self._config, self._records.storage
        evaluated = records.evaluated()

        def save_pictures() -> str:
            storage.write("before.png", records.sheet(BEFORE))
            storage.write("after.png", records.sheet(evaluated[-1]))
            return f"pictures: {storage}/before.png, {storage}/after.png"

        pictures = len(evaluated) > 1 and self._try("pictures", save_pictures)
        report = self._draw_report()
        changed = self._try("summary", lambda: summary.describe(records, config)) or []
        commands = self._try("summary", lambda: summary.next_commands(records, config)) or []
        for text in (*changed, pictures, f"LoRA: {checkpoint.lora_folder(storage)}", report, *commands):
            if text:
                self.say(text)

    def close(self, status: str, reason: str | None = None) -> None:
        """`status` is FINISHED, FAILED or KILLED, `reason` why it failed."""
        self._bar.close()
        self._beat(lambda heartbeat: heartbeat.end(ENDS[status], reason))
        self._track(lambda tracker: tracker.finish(status))

    def _draw_report(self) -> str | None:
        """What is said of it at the end."""
        storage = self._records.storage

        def draw() -> str:
            storage.write(html.FILE, html.render(self._records, self._config))
            return f"report: {storage}/{html.FILE}"

        return self._try(html.FILE, draw, f" (later: {summary.interpreter()} -m learner.report {storage})")

    def _beat(self, call: Callable[[Heartbeat], None]) -> None:
        if (heartbeat := self._heartbeat) is not None:
            self._try("status.json", lambda: call(heartbeat))

    def _track(self, call: Callable[[Tracker], None]) -> None:
        if (tracker := self._tracker) is not None:
            self._try("MLflow", lambda: call(tracker))

    def _try(self, view: str, call: Callable[[], Any], remedy: str = "") -> Any:
        """What the call returns; None where it fails. A warning is said once, however often a view fails."""
        try:
            return call()
        except Exception as error:
            warning = f"warning: no {view}: {type(error).__name__}: {error}{remedy}"
            if warning not in self._warned:
                self._warned.add(warning)
                self.say(warning)
            return None


def _epoch_line(config: Config, line: dict[str, Any], seconds: float) -> str:
    """What is said of a closed epoch."""
    if line["epoch"] == BEFORE:
        images = summary.plural(config.evaluation.images, "fixed image")
        return f"before training: evaluated reward {summary.ascii_number(line['eval_reward_mean'])} on {images}"
    words = {
        "sampling": "sample",
        "scoring": "score",
        "training": "train",
        "evaluation": "evaluate",
        "the rest": "rest",
    }
    parts = summary.seconds_of({**line, "seconds": seconds}, config).items()
    text = (
        f"epoch {line['epoch'] + 1}/{config.train.epochs}  "
        f"reward {line['reward_mean']:.3f} +- {line['reward_std']:.3f}  "
        f"loss {line['loss']:.4g}  beta {line['beta']:.3g}  {seconds:.1f} s "
        f"({', '.join(f'{words[name]} {part:.1f}' for name, part in parts if part)})"
    )
    if line.get("quarantined"):
        text += f"  {line['quarantined']} set aside"
    if line["eval_reward_mean"] is not None:
        text += f"  evaluated {line['eval_reward_mean']:.3f}"
    if line.get("eval_gap") is not None:
        text += f"  gap {line['eval_gap']:.3g} nats"
    return f"{text}  COLLAPSE? {line['collapse']}" if line.get("collapse") else text
