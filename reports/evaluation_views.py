"""Evaluations in MLflow: pictures by step, tables, the figures of `python -m learner.evaluate`, and the description.

evaluation/samples          pictures of the fixed images, by step           (MLflow's step slider)
evaluation/after-N-epochs   a table of them: prompt, reward, ...
judged/...                  metrics and pictures, where there is evaluation/step-*.json
judged/after-N-epochs       a table of the same figures
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mlflow import MlflowClient
from mlflow.entities import Metric, RunTag
from PIL import Image

from evaluation.metrics import mean_of_good, paired_interval
from records.run_folder import BEFORE, EVALUATION, Records
from records.storage import Storage

SHEETS, PAIRS = "evaluation/samples", "judged/base_and_tuned"  # keys of pictures
SMALL = (256, 256)  # pixels of the copy that MLflow's page shows; a click opens the whole picture
IMAGES_TAG, TABLES_TAG = "mlflow.loggedImages", "mlflow.loggedArtifacts"  # without them MLflow's page looks for none
SHOWN_TABLES = 60  # in TABLES_TAG, which takes 8000 characters
JUDGED_SENTINEL = "judged/epochs_done"  # the last metric of its batch
CHARTED = ("value", "base", "floor")  # numbers of a figure that are metrics; a chart each, so not all
NUMBERS = ("value", "low", "high", "base", "floor", "gain", "gain_low", "gain_high")
NOTE, OWN_NOTE = "mlflow.note.content", "tributary.description"  # ours while its hash is in the second


@dataclass(frozen=True)
class Judged:
    """An evaluation/step-*.json, as commands/evaluate.py writes them."""

    file: str  # without .json
    figures: dict[str, Any]

    @property
    def epochs(self) -> int:
        return int(self.figures["epochs_done"])

    def rows(self) -> Iterable[tuple[str, dict[str, float | None]]]:
        """Name and numbers of each figure there is."""
        held_out = {f"held_out/{label}": figure for label, figure in (self.figures.get("held_out") or {}).items()}
        for name, figure in {**self.figures, **held_out}.items():
            if isinstance(figure, dict) and "value" in figure:
                yield name, figure

    def metrics(self) -> dict[str, float]:
        """judged/NAME the value, judged/NAME_base and judged/NAME_floor beside it; MLflow takes few signs in names."""
        return {
            re.sub(r"[^\w\-. :/]", "_", f"judged/{name}{'' if key == 'value' else f'_{key}'}"): float(number)
            for name, figure in self.rows()
            for key in CHARTED
            if (number := figure.get(key)) is not None
        }

    def table(self) -> bytes:
        return _table(
            ["figure", *NUMBERS], [[name, *map(_short, map(figure.get, NUMBERS))] for name, figure in self.rows()]
        )


def judged(storage: Storage) -> list[Judged]:
    """What is whole of them, in order."""
    found = []
    for name in storage.entries(EVALUATION):
        if name.startswith("step-") and name.endswith(".json"):
            with contextlib.suppress(ValueError, KeyError, TypeError):  # of no run's epoch, or not ours
                one = Judged(
                    f"{EVALUATION}/{name.removesuffix('.json')}", json.loads(storage.read(f"{EVALUATION}/{name}"))
                )
                found += [one] if one.epochs >= 0 else []
    return found


def table(storage: Storage, epoch: int) -> bytes:
    """The fixed images after an epoch, a row each; in a part's or judge's column, its own raw reward."""
    name = "epoch-before" if epoch == BEFORE else f"epoch-{epoch:06d}"
    found = json.loads(storage.read(f"{EVALUATION}/{name}.json"))
    columns: dict[str, Sequence[Any]] = {
        "prompt": found["prompt"],
        "reward": found["reward"],  # second: what MLflow's page compares runs by, prompt by prompt
        **found.get("reward_parts", {}),
        **{f"held out: {label}": values for label, values in found.get("held_out", {}).items()},
        "image": range(len(found["prompt"])),
        "epoch": [epoch + 1] * len(found["prompt"]),
    }
    return _table(list(columns), [list(row) for row in zip(*columns.values(), strict=True)])


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> bytes:
    """A file as MLflow's log_table writes it, and load_table reads it. Not by log_table, which adds rows to what an
    upload that was cut short has left."""
    return json.dumps({"columns": columns, "data": rows}).encode()


class EvaluationViews:
    """Sends what the server lacks of a run's evaluations."""

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self._client, self._run_id = client, run_id
        self._judged = {metric.step for metric in client.get_metric_history(run_id, JUDGED_SENTINEL)}
        self._sent: dict[str, bytes] = {}  # tables of judgements, by this process: an epoch may be judged anew
        self._tags: dict[str, str] = {}  # set by this process

    def send(self, records: Records, evaluated: Sequence[int]) -> None:
        """Pictures, tables and figures; `evaluated` are the closed epochs that were."""
        storage = records.storage
        times = {line["epoch"] + 1: int(line["time"] * 1000) for line in records.lines}
        begun = int(records.about["created"] * 1000)
        all_judged = judged(storage)
        there = self._names("images")
        for epoch in evaluated:
            self._send_picture(SHEETS, epoch + 1, times.get(epoch + 1, begun), records.sheet(epoch), there)
        for one in all_judged:
            time = times.get(one.epochs, begun)
            if storage.exists(f"{one.file}.png"):
                self._send_picture(PAIRS, one.epochs, time, storage.read(f"{one.file}.png"), there)
            if one.epochs not in self._judged:  # MLflow takes no metric back: a second judgement is in the table alone
                metrics = [Metric(key, value, time, one.epochs) for key, value in one.metrics().items()]
                last = Metric(JUDGED_SENTINEL, one.epochs, time, one.epochs)
                self._client.log_batch(self._run_id, metrics=[*metrics, last])
                self._judged.add(one.epochs)
        old = self._names("evaluation")
        missing = [epoch for epoch in evaluated if _file(epoch + 1) not in old]
        send_files(
            self._client, self._run_id, "evaluation", {_file(epoch + 1): table(storage, epoch) for epoch in missing}
        )
        judgements = {_file(one.epochs): one.table() for one in all_judged}
        news = {name: content for name, content in judgements.items() if self._sent.get(name) != content}
        send_files(self._client, self._run_id, "judged", news)
        self._sent = judgements
        tables = [f"evaluation/{_file(epoch + 1)}" for epoch in reversed(evaluated)]
        tables += [f"judged/{name}" for name in reversed(judgements)]
        if evaluated or all_judged:
            self._tag(IMAGES_TAG, "true")
            self._tag(TABLES_TAG, json.dumps([{"path": path, "type": "table"} for path in tables[:SHOWN_TABLES]]))

    def describe(self, records: Records, evaluated: Sequence[int]) -> None:
        """The run's description, unless somebody has written another: the evaluated reward, with the pictures before
        and after. MLflow's page has them by step too, but below every setting of the run."""
        if BEFORE not in evaluated or len(evaluated) < 2:
            return
        before, after = (records.evaluation_rewards(epoch) for epoch in (BEFORE, evaluated[-1]))
        gain, (low, high) = mean_of_good(after - before), paired_interval(before, after)
        text = (
            f"Evaluated reward **{mean_of_good(before):.3f} -> {mean_of_good(after):.3f}** on {len(after)} fixed "
            f"images after {evaluated[-1] + 1} epochs: {gain:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}\n\n"
        )
        there = sorted(self._names("images"))
        for title, epoch in (("before", BEFORE), ("after", evaluated[-1])):
            files = [self._link(name) for name in there if name.startswith(_stem(SHEETS, epoch + 1))]
            if files:  # the small one is the first: + sorts before .
                text += f"[![{title}]({files[0]})]({files[-1]}) "
        tags = self._client.get_run(self._run_id).data.tags
        if NOTE not in tags or tags.get(OWN_NOTE) == _sha256(tags[NOTE]):
            both = [RunTag(OWN_NOTE, _sha256(text)), RunTag(NOTE, text)]
            self._client.log_batch(self._run_id, tags=both)

    def _link(self, picture: str) -> str:
        """As MLflow's own page asks for it."""
        return f"get-artifact?path={quote(f'images/{picture}', safe='')}&run_uuid={self._run_id}"

    def _names(self, folder: str) -> set[str]:
        return {file.path.rsplit("/", 1)[-1] for file in self._client.list_artifacts(self._run_id, folder)}

    def _send_picture(self, key: str, step: int, time: int, content: bytes, there: set[str]) -> None:
        mine = sorted(name for name in there if name.startswith(_stem(key, step)))
        picture = Image.open(io.BytesIO(content))
        if not mine:
            self._client.log_image(self._run_id, picture, key=key, step=step, timestamp=time, synchronous=True)
        elif not any(name.endswith(".webp") for name in mine):  # log_image was killed before its second file
            file = io.BytesIO()
            picture.thumbnail(SMALL)
            picture.save(file, "WEBP")
            name = f"{mine[0].removesuffix('.png')}+compressed.webp"
            send_files(self._client, self._run_id, "images", {name: file.getvalue()})

    def _tag(self, key: str, value: str) -> None:
        if self._tags.get(key) != value:
            self._client.set_tag(self._run_id, key, value)
            self._tags[key] = value


def send_files(client: MlflowClient, run_id: str, folder: str, files: Mapping[str, bytes]) -> None:
    """As artifacts; what has the same name there is replaced."""
    with tempfile.TemporaryDirectory() as aside:
        for name, content in files.items():
            (Path(aside) / name).write_bytes(content)
        if files:
            client.log_artifacts(run_id, aside, folder or None)


def _short(number: float | None) -> float | None:
    """For reading."""
    return None if number is None else float(f"{number:.5g}")


def _file(epochs: int) -> str:
    return f"after-{epochs:06d}-epochs.json"


def _stem(key: str, step: int) -> str:
    """How log_image begins a picture's file name."""
    return f"{key.replace('/', '~')}+step+{step}+"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
