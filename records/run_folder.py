"""The durable record of a run: config, metrics, trajectories, evaluations, pictures. MLflow is only a view of it.

Written by the driver alone, each file in one piece. What belongs to an epoch is on disk before the checkpoint that
closes the epoch; `drop_after` removes what a killed driver wrote beyond its last checkpoint, so that there are neither
holes nor repeats.
"""

from __future__ import annotations

import io
import json
import math
import time
import uuid
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from diffusion.trajectory import Scores
from evaluation.collapse import Evaluated
from learner.config import CONFIG_VERSION, Config, ConfigError
from learner.protocol import quarantine
from learner.protocol.runner import EpochResult
from records.storage import Storage, StorageError
from reports.pictures import contact_sheet, png, thumbnail

FORMAT = 5  # of run.json, checkpoints and the trajectories' columns
RUN, METRICS, CONFIG, TRAJECTORIES, EVALUATION = (
    "run.json",
    "metrics.jsonl",
    "config.yaml",
    "trajectories",
    "evaluation",
)
EPOCH_FOLDERS = (TRAJECTORIES, EVALUATION, quarantine.FOLDER)  # of files epoch-N...
BEFORE = -1  # the "epoch" of the evaluation before training

SCHEMA = pa.schema(
    [
        ("run_id", pa.string()),
        ("epoch", pa.int32()),
        ("trajectory_id", pa.int64()),
        ("policy_version", pa.int32()),  # that sampled it
        ("adapter_sha256", pa.string()),  # as it stood in the sampler's module
        ("prompt", pa.string()),
        ("reward", pa.float32()),  # raw, of the image; null of a bad one
        ("reward_parts", pa.map_(pa.string(), pa.float32())),  # of a weighted_sum, each reward's own by its label
        ("log_pf_sum", pa.float64()),  # nats, over all transitions and dimensions
        ("log_pb_sum", pa.float64()),
        ("beta", pa.float64()),  # that the epoch trained with
        ("thumbnail_png", pa.binary()),
        ("sampler_node", pa.string()),
        ("chunk", pa.int32()),
        ("sample_seconds", pa.float32()),  # of the whole chunk
        ("score_seconds", pa.float32()),
        ("bad", pa.string()),  # why it was set aside and not trained on
    ],
    metadata={"tributary_format": str(FORMAT)},
)


# Of evaluation/*.parquet: the fixed images, a row each.
IMAGES = pa.schema(
    [
        ("number", pa.int64()),  # names the noise
        ("prompt", pa.string()),
        ("reward", pa.float32()),  # raw, of the reward trained on; null of a bad image
        ("reward_parts", pa.map_(pa.string(), pa.float32())),
        ("held_out", pa.map_(pa.string(), pa.float32())),  # raw, of rewards not trained on, by label
        ("features", pa.list_(pa.float32())),  # rewards/features.py
        ("thumbnail_png", pa.binary()),
        ("bad", pa.string()),
    ],
    metadata={"tributary_format": str(FORMAT)},
)


class Records:
    """The files of one run."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.about: dict[str, Any] = {}  # run.json
        self.lines: list[dict[str, Any]] = []  # metrics.jsonl

    @classmethod
    def create(cls, storage: Storage, name: str, config: Config, extra: dict[str, Any]) -> Records:
        """Begin a run here.

        Raises:
            StorageError: the folder cannot be made or written.
        """
        records = cls.prepare(storage, name, config, extra)
        records.note()
        return records

    @classmethod
    def prepare(cls, storage: Storage, name: str, config: Config, extra: dict[str, Any]) -> Records:
        """As create, but without run.json yet: there is no run here before its first `note`."""
        records = cls(storage)
        records.about = {
            "format": FORMAT,
            "run_id": uuid.uuid4().hex,
            "name": name,
            "created": time.time(),
            "finished": False,
            **extra,
        }
        records.save_config(config)
        return records

    @classmethod
    def open(cls, storage: Storage) -> Records:
        """A run that is here already.

        Raises:
            StorageError: there is none, or a file is damaged.
        """
        records = cls(storage)
        try:
            records.about = json.loads(storage.read(RUN))
            for key in ("format", "run_id", "name", "created", "finished", "config_digest", "prompts_sha256"):
                records.about[key]
        except (ValueError, KeyError, TypeError) as error:
            raise StorageError(f"{RUN} in {storage} is damaged ({error}): use another run.dir") from error
        try:
            if storage.exists(METRICS):
                records.lines = [json.loads(line) for line in storage.read(METRICS).decode().splitlines()]
                for line in records.lines:
                    line["epoch"]
        except (ValueError, KeyError, TypeError) as error:
            raise StorageError(
                f"{METRICS} in {storage} is damaged ({error}): remove the damaged lines, or use another run.dir"
            ) from error
        return records

    def save_config(self, config: Config) -> None:
        self.storage.write(CONFIG, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False).encode())

    def config(self) -> Config:
        """The settings of the run.

        Raises:
            ConfigError: they are of another version, or damaged.
        """
        try:
            tree = yaml.safe_load(self.storage.read(CONFIG))
        except yaml.YAMLError as error:
            raise ConfigError(f"run.dir: {self.storage}/{CONFIG} is damaged: {error}") from error
        version = tree.get("config_version") if isinstance(tree, dict) else None
        if version != CONFIG_VERSION:
            raise ConfigError(
                f"config_version: the settings in {self.storage}/{CONFIG} are of version {version!r}, this Tributary "
                f"reads {CONFIG_VERSION}: use the version that wrote them, or choose another run.dir"
            )
        try:
            return Config.model_validate(tree)
        except ValueError as error:
            raise ConfigError(f"run.dir: {self.storage}/{CONFIG} is damaged: {str(error).splitlines()[0]}") from error

    @property
    def run_id(self) -> str:
        return self.about["run_id"]

    def note(self, **facts: Any) -> None:
        """Add to run.json."""
        self.about |= facts
        self.storage.write(RUN, (json.dumps(self.about, indent=1) + "\n").encode())

    def append(self, line: dict[str, Any]) -> None:
        """One epoch's line, on disk before this returns. Non-finite numbers become null."""
        self.lines.append(_finite(line))
        self._write_lines()

    def keep(self, lines: Sequence[dict[str, Any]]) -> None:
        """Make metrics.jsonl these lines."""
        self.lines = list(lines)
        self._write_lines()

    def drop_after(self, epochs: int) -> None:
        """Keep what belongs to the first `epochs` epochs and the evaluation before them; -1 keeps nothing."""
        if any(line["epoch"] >= epochs for line in self.lines):
            self.keep([line for line in self.lines if line["epoch"] < epochs])
        for folder in EPOCH_FOLDERS:
            for name in self.storage.entries(folder):
                if _epoch_of(name) >= epochs:
                    self.storage.remove(f"{folder}/{name}")

    def save_trajectories(self, epoch: int, beta: float, result: EpochResult) -> None:
        """trajectories/epoch-NNNNNN.parquet: a row a trajectory, columns of SCHEMA."""
        columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
        for chunk, receipt, verdict in zip(result.chunks, result.receipts, result.verdicts, strict=True):
            for i, number in enumerate(chunk.trajectory_ids):
                row = {
                    "run_id": self.run_id,
                    "epoch": epoch,
                    "trajectory_id": number,
                    "policy_version": receipt.policy_version,
                    "adapter_sha256": receipt.adapter_sha256,
                    "prompt": chunk.prompts[i],
                    "reward": None if i in verdict.bad else verdict.rewards[i],
                    "reward_parts": [(label, values[i]) for label, values in verdict.parts.items()],
                    "log_pf_sum": receipt.log_pf_sum[i],
                    "log_pb_sum": receipt.log_pb_sum[i],
                    "beta": beta,
                    "thumbnail_png": (verdict.thumbnails[i] or None) if verdict.thumbnails else None,
                    "sampler_node": receipt.node,
                    "chunk": chunk.index,
                    "sample_seconds": receipt.seconds,
                    "score_seconds": verdict.seconds,
                    "bad": verdict.bad.get(i),
                }
                for name, value in row.items():
                    columns[name].append(value)
        file = io.BytesIO()
        pq.write_table(pa.table(columns, schema=SCHEMA), file)
        self.storage.write(f"{TRAJECTORIES}/{_name(epoch)}.parquet", file.getvalue())

    def save_evaluation(self, epoch: int, scores: Sequence[Scores], thumbnail_pixels: int) -> None:
        """evaluation/epoch-N.json, prompt and reward of every fixed image (and of a sum each reward's own), for paired
        comparisons; epoch-N.parquet, columns of IMAGES; and epoch-N.png, a contact sheet of the first of them. A bad
        image's reward is null."""
        table: dict[str, Any] = {
            "prompt": [prompt for part in scores for prompt in part.chunk.prompts],
            "reward": [_finite(float(value)) for part in scores for value in part.rewards[:, -1]],
        }
        for name, field in (("reward_parts", "parts"), ("held_out", "held_out")):
            if labels := getattr(scores[0], field):
                table[name] = {
                    label: [_finite(float(value)) for part in scores for value in getattr(part, field)[label]]
                    for label in labels
                }
        self.storage.write(f"{EVALUATION}/{_name(epoch)}.png", png(contact_sheet(scores)))
        self.storage.write(f"{EVALUATION}/{_name(epoch)}.parquet", images_table(scores, thumbnail_pixels))
        self.storage.write(f"{EVALUATION}/{_name(epoch)}.json", (json.dumps(table) + "\n").encode())

    def evaluated(self) -> list[int]:
        """Epochs whose evaluation is here, in order; BEFORE is the one before training."""
        names = self.storage.entries(EVALUATION)
        return sorted(_epoch_of(name) for name in names if name.startswith("epoch-") and name.endswith(".json"))

    def evaluation_rewards(self, epoch: int) -> np.ndarray:
        """Rewards of the fixed images after an epoch, NaN of bad ones."""
        return np.asarray(self._evaluation(epoch)["reward"], np.float64)

    def evaluation_prompt(self, epoch: int) -> str:
        """The first of the fixed images' prompts."""
        return str(self._evaluation(epoch)["prompt"][0])

    def _evaluation(self, epoch: int) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.storage.read(f"{EVALUATION}/{_name(epoch)}.json"))
        return found

    def evaluation(self, epoch: int) -> Evaluated:
        """All that was found on the fixed images after an epoch."""
        return read_images(self.images(epoch))

    def images(self, epoch: int) -> bytes:
        """Parquet of the fixed images after an epoch, columns of IMAGES."""
        return self.storage.read(f"{EVALUATION}/{_name(epoch)}.parquet")

    def sheet(self, epoch: int) -> bytes:
        """PNG of the contact sheet after an epoch."""
        return self.storage.read(f"{EVALUATION}/{_name(epoch)}.png")

    def _write_lines(self) -> None:
        # Rewritten whole: object stores cannot append, and a line is never half there.
        self.storage.write(METRICS, "".join(json.dumps(line) + "\n" for line in self.lines).encode())


def images_table(scores: Sequence[Scores], thumbnail_pixels: int) -> bytes:
    """A Parquet file of evaluation images, columns of IMAGES; no thumbnails at 0 pixels."""
    columns: dict[str, list[Any]] = {name: [] for name in IMAGES.names}
    for part in scores:
        for i, number in enumerate(part.chunk.trajectory_ids):
            reward, picture = float(part.rewards[i, -1]), None if part.images is None else part.images[i]
            row = {
                "number": number,
                "prompt": part.chunk.prompts[i],
                "reward": _finite(reward),
                "reward_parts": [(label, float(values[i])) for label, values in part.parts.items()],
                "held_out": [(label, float(values[i])) for label, values in part.held_out.items()],
                "features": None if part.features is None else part.features[i],
                "thumbnail_png": thumbnail(picture, thumbnail_pixels) if picture is not None else None,
                "bad": part.bad.get(i),
            }
            for name, value in row.items():
                columns[name].append(value)
    file = io.BytesIO()
    pq.write_table(pa.table(columns, schema=IMAGES), file)
    return file.getvalue()


def read_images(content: bytes) -> Evaluated:
    """What `images_table` wrote, as far as figures need it."""
    table = pq.read_table(io.BytesIO(content))
    held_out = [dict(row) for row in table["held_out"].to_pylist()]
    features = table["features"].to_pylist()
    return Evaluated(
        table["prompt"].to_pylist(),
        np.array([np.nan if value is None else value for value in table["reward"].to_pylist()], np.float64),
        {label: np.array([row[label] for row in held_out], np.float64) for label in held_out[0]},
        None if features[0] is None else np.array(features, np.float32),
    )


def _name(epoch: int) -> str:
    return "epoch-before" if epoch == BEFORE else f"epoch-{epoch:06d}"


def _epoch_of(name: str) -> int:
    number = name.split(".")[0].removeprefix("epoch-").split("-")[0]
    return int(number) if number.isdigit() else BEFORE


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
