"""The durable record of a run: settings, metrics, trajectories, evaluations, pictures. MLflow is only a view of it.
What belongs to an epoch is on disk before the checkpoint that closes the epoch; `drop_after` removes what a killed
driver wrote beyond its last checkpoint, so that there are neither holes nor repeats."""

import io
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from pydantic_core import from_json, to_json

from records import checkpoint, facts
from records.checkpoint import FORMAT
from records.facts import CONFIG, METRICS, RUN, Warn
from records.shapes import Evaluation
from records.storage import Storage, StorageError

TRACEBACK = "traceback.txt"  # of what ended the run early, the last time
TRAJECTORIES, EVALUATION = "trajectories", "evaluation"
EPOCH_FOLDERS = (TRAJECTORIES, EVALUATION, "quarantine")  # of files epoch-N...
WANTED = ("prompt", "reward", "reward_parts", "held_out")  # of the columns of IMAGES, in the .json
OWN_FILE = re.compile(r"epoch-(\d{6,}|before)(-trajectory-\d+)?\.(json|parquet|png|safetensors)")  # in these folders
BEFORE = -1  # the "epoch" of the evaluation before training

SCHEMA = {
    "run_id": pa.string(),
    "epoch": pa.int32(),
    "trajectory_id": pa.int64(),
    "policy_version": pa.int32(),  # that sampled it
    "adapter_sha256": pa.string(),  # as it stood in the sampler's module
    "prompt": pa.string(),
    "metadata": pa.string(),  # JSON: the other columns of the prompt's line; null where there are none
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
    # Nats from the base model (diffusion/trajectory.py: Nats); null, or no such columns, where it was not measured.
    "kl": pa.list_(pa.float32()),  # of each transition
    "log_ratio": pa.float32(),  # of the whole path as it was drawn
}


@dataclass
class Records:
    """The files of one run."""

    storage: Storage
    about: dict[str, Any]  # run.json
    lines: list[dict[str, Any]]  # metrics.jsonl
    warn: Warn = lambda text: None  # of what is damaged and can be done without

    @classmethod
    def create(cls, storage: Storage, name: str, settings: bytes, known: Mapping[str, Any]) -> Self:
        """Begin a run here: `settings` become config.yaml, `known` (config_digest, prompts_sha256 ...) go to run.json.
        Raises a StorageError if the folder cannot be made or written."""
        identity = {"format": FORMAT, "run_id": uuid.uuid4().hex, "name": name}
        records = cls(storage, {**identity, "created": time.time(), "finished": False, **known}, [])
        records.save_settings(settings)
        return records

    @classmethod
    def open(cls, storage: Storage, warn: Warn = lambda text: None) -> Self:
        """`warn` hears of damage that is made good, or can be done without. Raises a StorageError where there is no
        run, or it cannot."""
        about = facts.about(storage, warn)
        closed = checkpoint.newest(storage, about["run_id"])
        return cls(storage, about, facts.lines(storage, closed, warn), warn)

    @property
    def run_id(self) -> str:
        return self.about["run_id"]

    def note(self, **facts: Any) -> None:
        """Add to run.json."""
        self.about |= facts
        self.storage.write_json(RUN, self.about)

    def settings(self) -> bytes:
        """config.yaml. Raises a StorageError."""
        return facts.settings(self.storage, self.about, self.warn)

    def save_settings(self, settings: bytes, **known: Any) -> None:
        self.storage.write(CONFIG, settings)
        self.note(config_sha256=sha256(settings).hexdigest(), **known)

    def append(self, line: dict[str, Any]) -> None:
        """One epoch's line, on disk before this returns. Non-finite numbers become null."""
        self.keep([*self.lines, _finite(line)])

    def keep(self, lines: Sequence[dict[str, Any]]) -> None:
        """Make metrics.jsonl these lines. Rewritten whole: object stores cannot append, no line is ever half there."""
        self.lines = list(lines)
        self.storage.write(METRICS, facts.text(lines))

    @property
    def steps(self) -> set[int]:
        """Of the checkpoints that this run has had: 0 and, from metrics.jsonl, those of its epochs' ends."""
        return {0, *(line["step"] for line in self.lines if "step" in line)}

    def drop_after(self, epochs: int) -> None:
        """Keep what belongs to the first `epochs` epochs and the evaluation before them; -1 keeps nothing. Files of
        other names than the run gives stay."""
        if any(line["epoch"] >= epochs for line in self.lines):
            self.keep([line for line in self.lines if line["epoch"] < epochs])
        for folder in EPOCH_FOLDERS:
            for name in self.storage.entries(folder):
                if (epoch := _epoch_of(name)) is not None and epoch >= epochs:
                    self.storage.remove(f"{folder}/{name}")

    def save_trajectories(self, epoch: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """trajectories/epoch-NNNNNN.parquet: a row a trajectory, columns of SCHEMA."""
        self.storage.write(f"{TRAJECTORIES}/{_name(epoch)}.parquet", parquet(rows, SCHEMA))

    def trajectories(self, epoch: int, *columns: str) -> pa.Table:
        """Columns of trajectories/epoch-NNNNNN.parquet. Raises a StorageError."""
        name = f"{TRAJECTORIES}/{_name(epoch)}.parquet"
        return read_parquet(self.storage.read(name), f"{name} in {self.storage}", SCHEMA, columns)

    def save_evaluation(self, epoch: int, rows: Sequence[Mapping[str, Any]], sheet: bytes) -> None:
        """evaluation/epoch-N.png, a contact sheet of the fixed images; .parquet, a row an image, columns of IMAGES; and
        .json, for paired comparisons: columns prompt and reward, and by label reward_parts and held_out."""
        name = f"{EVALUATION}/{_name(epoch)}"
        self.storage.write(f"{name}.png", sheet)
        self.storage.write(f"{name}.parquet", parquet(rows, IMAGES))
        self.storage.write_json(f"{name}.json", _columns(rows))

    def evaluated(self) -> list[int]:
        """Epochs whose evaluation is here, in order; BEFORE is the one before training."""
        names = self.storage.entries(EVALUATION)
        tables = (name for name in names if name.endswith((".json", ".parquet")))
        return sorted({epoch for name in tables if (epoch := _epoch_of(name)) is not None})

    def evaluation(self, epoch: int) -> dict[str, Any]:
        """What save_evaluation's .json holds; null of bad images. Where that is damaged, it is made of the .parquet,
        with a warning. Raises a StorageError where both are."""
        name = f"{EVALUATION}/{_name(epoch)}"
        try:
            return self.storage.read_json(f"{name}.json", Evaluation, f"put it back from a copy, or remove {name}.*")
        except StorageError as error:
            try:
                rows = read_parquet(*self.images(epoch), IMAGES, WANTED).to_pylist()
                Evaluation.model_validate(table := _finite(_columns(rows)))
            except (StorageError, ValueError) as other:
                raise StorageError(f"{error}; {other}") from other
            self.warn(f"{error}; {name}.parquet is read instead")
            return table

    def images(self, epoch: int) -> tuple[bytes, str]:
        """evaluation/epoch-N.parquet, not looked into, and where it is."""
        name = f"{EVALUATION}/{_name(epoch)}.parquet"
        return self.storage.read(name), f"{name} in {self.storage}"

    def sheet(self, epoch: int) -> bytes:
        """evaluation/epoch-N.png. Raises a StorageError."""
        return self.picture(f"{EVALUATION}/{_name(epoch)}.png")

    def picture(self, name: str) -> bytes:
        """A PNG file. Raises a StorageError where that is no whole picture."""
        content = self.storage.read(name)
        try:
            Image.open(io.BytesIO(content), formats=["PNG"]).verify()  # closes it
            Image.open(io.BytesIO(content), formats=["PNG"]).load()
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            fault = f"{name} in {self.storage} is damaged ({error!s:.200})"
            raise StorageError(f"{fault}: put it back from a copy, or remove it") from error
        return content


def parquet(rows: Sequence[Mapping[str, Any]], columns: dict[str, pa.DataType]) -> bytes:
    """A Parquet file of these rows."""
    file, schema = io.BytesIO(), pa.schema(columns, metadata={"tributary_format": str(FORMAT)})
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), file, write_page_checksum=True)
    return file.getvalue()


def read_parquet(
    content: bytes, place: str, schema: dict[str, pa.DataType], columns: Sequence[str], optional: Sequence[str] = ()
) -> pa.Table:
    """Columns of a Parquet file that is whole, and of the `optional` ones those that it has. Raises a StorageError,
    which names the `place` and the remedy."""
    try:
        if optional:
            there = pq.read_schema(io.BytesIO(content)).names
            columns = [*columns, *(name for name in optional if name in there)]
        table = pq.read_table(io.BytesIO(content), columns=[*columns], page_checksum_verification=True)
        if not table.num_rows:
            raise ValueError("it has no rows")
        return table.select(columns).cast(pa.schema({name: schema[name] for name in columns}))
    except (OSError, ValueError, LookupError, pa.ArrowException) as error:
        raise StorageError(f"{place} is damaged ({error!s:.200}): put it back from a copy, or remove it") from error


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of rows of images, as in evaluation/epoch-N.json."""
    table: dict[str, Any] = {key: [row[key] for row in rows] for key in ("prompt", "reward")}
    for key in ("reward_parts", "held_out"):
        if rows and (labels := list(dict(rows[0][key]))):
            table[key] = {label: [dict(row[key])[label] for row in rows] for label in labels}
    return table


def _name(epoch: int) -> str:
    return "epoch-before" if epoch == BEFORE else f"epoch-{epoch:06d}"


def _epoch_of(name: str) -> int | None:
    """None of a file that is not of the run's making."""
    own = OWN_FILE.fullmatch(name)
    return own and (BEFORE if own[1] == "before" else int(own[1]))


def _finite(value: Any) -> Any:
    """As JSON has it: without NaN and infinities, which become null."""
    return from_json(to_json(value, inf_nan_mode="null"))
