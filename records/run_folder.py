"""The durable record of a run: settings, metrics, trajectories, evaluations, pictures. MLflow is only a view of it.
What belongs to an epoch is on disk before the checkpoint that closes the epoch; `drop_after` removes what a killed
driver wrote beyond its last checkpoint, so that there are neither holes nor repeats."""

import io
import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic_core import from_json, to_json

from records.checkpoint import FORMAT
from records.storage import Storage

RUN, METRICS, CONFIG = "run.json", "metrics.jsonl", "config.yaml"
TRACEBACK = "traceback.txt"  # of what ended the run early, the last time
TRAJECTORIES, EVALUATION = "trajectories", "evaluation"
EPOCH_FOLDERS = (TRAJECTORIES, EVALUATION, "quarantine")  # of files epoch-N...
NEEDED = ("format", "run_id", "name", "created", "finished", "config_digest", "prompts_sha256")  # in run.json
BEFORE = -1  # the "epoch" of the evaluation before training

SCHEMA = {
    "run_id": pa.string(),
    "epoch": pa.int32(),
    "trajectory_id": pa.int64(),
    "policy_version": pa.int32(),  # that sampled it
    "adapter_sha256": pa.string(),  # as it stood in the sampler's module
    "prompt": pa.string(),
    "reward": pa.float32(),  # raw, of the image; null of a bad one
    "reward_parts": pa.map_(pa.string(), pa.float32()),  # of a weighted_sum, each reward's own by its label
    "log_pf_sum": pa.float64(),  # nats, over all transitions and dimensions
    "log_pb_sum": pa.float64(),
    "beta": pa.float64(),  # that the epoch trained with
    "thumbnail_png": pa.binary(),
    "sampler_node": pa.string(),
    "chunk": pa.int32(),
    "sample_seconds": pa.float32(),  # of the whole chunk
    "score_seconds": pa.float32(),
    "bad": pa.string(),  # why it was set aside and not trained on
}

# Of evaluation/*.parquet: the fixed images, a row each.
IMAGES = {
    "number": pa.int64(),  # names the noise
    "prompt": pa.string(),
    "reward": pa.float32(),  # raw, of the reward trained on; null of a bad image
    "reward_parts": pa.map_(pa.string(), pa.float32()),
    "held_out": pa.map_(pa.string(), pa.float32()),  # raw, of rewards not trained on, by label
    "features": pa.list_(pa.float32()),  # rewards/judges.py
    "thumbnail_png": pa.binary(),
    "bad": pa.string(),
}


@dataclass
class Records:
    """The files of one run."""

    storage: Storage
    about: dict[str, Any]  # run.json
    lines: list[dict[str, Any]]  # metrics.jsonl

    @classmethod
    def create(cls, storage: Storage, name: str, settings: bytes, facts: Mapping[str, Any]) -> Self:
        """Begin a run here: `settings` become config.yaml, `facts` (config_digest, prompts_sha256 ...) go to run.json.
        Raises a StorageError if the folder cannot be made or written."""
        identity = {"format": FORMAT, "run_id": uuid.uuid4().hex, "name": name}
        records = cls(storage, {**identity, "created": time.time(), "finished": False, **facts}, [])
        storage.write(CONFIG, settings)
        records.note()
        return records

    @classmethod
    def open(cls, storage: Storage) -> Self:
        """Raises a StorageError where there is no run, or a file is damaged."""
        return cls(storage, storage.read_json(RUN, *NEEDED), storage.read_json_lines(METRICS, "epoch"))

    @property
    def run_id(self) -> str:
        return self.about["run_id"]

    def note(self, **facts: Any) -> None:
        """Add to run.json."""
        self.about |= facts
        self.storage.write_json(RUN, self.about)

    def append(self, line: dict[str, Any]) -> None:
        """One epoch's line, on disk before this returns. Non-finite numbers become null."""
        self.keep([*self.lines, _finite(line)])

    def keep(self, lines: Sequence[dict[str, Any]]) -> None:
        """Make metrics.jsonl these lines. Rewritten whole: object stores cannot append, no line is ever half there."""
        self.lines = list(lines)
        self.storage.write(METRICS, "".join(json.dumps(line) + "\n" for line in lines).encode())

    def drop_after(self, epochs: int) -> None:
        """Keep what belongs to the first `epochs` epochs and the evaluation before them; -1 keeps nothing."""
        if any(line["epoch"] >= epochs for line in self.lines):
            self.keep([line for line in self.lines if line["epoch"] < epochs])
        for folder in EPOCH_FOLDERS:
            for name in self.storage.entries(folder):
                if _epoch_of(name) >= epochs:
                    self.storage.remove(f"{folder}/{name}")

    def save_trajectories(self, epoch: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """trajectories/epoch-NNNNNN.parquet: a row a trajectory, columns of SCHEMA."""
        self.storage.write(f"{TRAJECTORIES}/{_name(epoch)}.parquet", parquet(rows, SCHEMA))

    def save_evaluation(self, epoch: int, rows: Sequence[Mapping[str, Any]], sheet: bytes) -> None:
        """evaluation/epoch-N.png, a contact sheet of the fixed images; .parquet, a row an image, columns of IMAGES; and
        .json, for paired comparisons: columns prompt and reward, and by label reward_parts and held_out."""
        table: dict[str, Any] = {key: [row[key] for row in rows] for key in ("prompt", "reward")}
        for key in ("reward_parts", "held_out"):
            if labels := list(dict(rows[0][key])):
                table[key] = {label: [dict(row[key])[label] for row in rows] for label in labels}
        name = f"{EVALUATION}/{_name(epoch)}"
        self.storage.write(f"{name}.png", sheet)
        self.storage.write(f"{name}.parquet", parquet(rows, IMAGES))
        self.storage.write_json(f"{name}.json", _finite(table))

    def evaluated(self) -> list[int]:
        """Epochs whose evaluation is here, in order; BEFORE is the one before training."""
        names = self.storage.entries(EVALUATION)
        return sorted(_epoch_of(name) for name in names if name.startswith("epoch-") and name.endswith(".json"))

    def evaluation(self, epoch: int) -> dict[str, Any]:
        """What save_evaluation's .json holds; null of bad images."""
        return self.storage.read_json(f"{EVALUATION}/{_name(epoch)}.json", "prompt", "reward")

    def evaluation_file(self, epoch: int, kind: Literal["png", "parquet"]) -> bytes:
        return self.storage.read(f"{EVALUATION}/{_name(epoch)}.{kind}")


def parquet(rows: Sequence[Mapping[str, Any]], columns: dict[str, pa.DataType]) -> bytes:
    """A Parquet file of these rows."""
    file, schema = io.BytesIO(), pa.schema(columns, metadata={"tributary_format": str(FORMAT)})
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), file)
    return file.getvalue()


def _name(epoch: int) -> str:
    return "epoch-before" if epoch == BEFORE else f"epoch-{epoch:06d}"


def _epoch_of(name: str) -> int:
    number = name.split(".")[0].removeprefix("epoch-").split("-")[0]
    return int(number) if number.isdigit() else BEFORE


def _finite(value: Any) -> Any:
    """As JSON has it: without NaN and infinities, which become null."""
    return from_json(to_json(value, inf_nan_mode="null"))
