"""Sets of judged pictures, and the figures that compare an adapter's set with its base model's.

A set is what one adapter draws of fixed prompts with counter-based noise. It is made chunk by chunk, and each finished
chunk is kept under a name that follows from everything it depends on: a set that was made once, by whatever command,
is never made again, and a stopped one goes on.

Three sets make an adapter's figures: its own, its base model's at the same noise, and its base model's at other noise.
The last is what drift is measured against; the base model's own distance to it is the floor, what noise alone makes.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from diffusion.snapshot import Snapshot
from diffusion.trajectory import Chunk, Scores
from evaluation import metrics
from evaluation.fixed_images import images_table, read_images
from evaluation.metrics import Interval, mean_interval, mean_of_good
from learner.config import Config, resolve
from learner.protocol.chunks import evaluation_chunks
from records.storage import Storage

FORMAT = 1  # of chunk files and of the figures' JSON
ACCURACY = "shapes_accuracy"  # a held-out reward with a key of its own
SHOWN_PIXELS = 256  # side of the pictures that a set keeps
NOT_JUDGED_BY = {"actors", "gpus", "labels", "quarantine_limit"}  # settings that change no picture and no score
Figure = dict[str, float | None]


class Pools(Protocol):
    """Whoever samples and scores: in process (learner/inprocess.py) or on Ray (actors/rollouts.py)."""

    description: str

    def judge(self, snapshot: Snapshot, chunks: Sequence[Chunk], done: Callable[[Chunk, Scores], None]) -> None:
        """Sample the chunks with the adapter and score them; `done` gets each as it is finished, in any order."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class ImageSet:
    """Which pictures: an adapter, and the noise that they are drawn with."""

    config: Config
    prompts: tuple[str, ...]
    snapshot: Snapshot
    seed: int

    @property
    def key(self) -> str:
        """sha256 of everything that the pictures and their scores depend on. All base models' adapters, whatever their
        rank, are one: they add nothing."""
        config = self.config
        adapter = [self.snapshot.sha256, config.lora.rank, config.lora.alpha] if self.snapshot.flat.any() else None
        facts = {
            "format": FORMAT, "model": config.model.model_dump(mode="json"), "weights": _weights(config.model.path),
            "adapter": adapter, "prompts": self.prompts, "seed": self.seed, "threads": config.run.cpu_threads,
            "sampler": config.sampler.model_dump(mode="json", exclude=NOT_JUDGED_BY),
            "reward": config.reward.model_dump(mode="json", exclude=NOT_JUDGED_BY),
            "evaluation": config.evaluation.model_dump(mode="json", include={"images", "held_out", "features", "clip"}),
        }  # fmt: skip
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    @property
    def chunks(self) -> list[Chunk]:
        evaluation = self.config.evaluation.model_copy(update={"seed": self.seed})
        return evaluation_chunks(self.config.model_copy(update={"evaluation": evaluation}), self.prompts)


class Cache:
    """Finished chunks, in one folder for all commands."""

    def __init__(self, folder: Path | None = None) -> None:
        """Default: $TRIBUTARY_CACHE, or tributary/ in the user's cache folder."""
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tributary"
        self.storage = Storage(str(folder or os.environ.get("TRIBUTARY_CACHE") or home))

    def make(self, image_set: ImageSet, pools: Callable[[], Pools], progress: Callable[[int, int], None]) -> bytes:
        """The set as a Parquet file, columns of run_folder.IMAGES. `pools` are started if a chunk is missing.

        Raises:
            StorageError: the folder cannot be written or read.
            Exception: what the pools raise.
        """
        chunks, folder = image_set.chunks, f"evaluation/{image_set.key[:32]}"
        files = {chunk.index: f"{folder}/chunk-{chunk.index:05d}.parquet" for chunk in chunks}
        missing = [chunk for chunk in chunks if not self.storage.exists(files[chunk.index])]
        finished = len(chunks) - len(missing)
        progress(finished, len(chunks))

        def done(chunk: Chunk, scores: Scores) -> None:
            nonlocal finished
            self.storage.write(files[chunk.index], images_table([scores], SHOWN_PIXELS))
            finished += 1
            progress(finished, len(chunks))

        if missing:
            pools().judge(image_set.snapshot, missing, done)
        whole = io.BytesIO()
        pq.write_table(
            pa.concat_tables(pq.read_table(io.BytesIO(self.storage.read(file))) for file in files.values()), whole
        )
        return whole.getvalue()


def compare(tuned: bytes, base: bytes, other: bytes) -> dict[str, Any]:
    """The figures of an adapter's set beside its base model's at the same noise (`base`) and at other noise (`other`).

    Each is {value, low, high, base, floor}, the first three with a 95 % interval: of means over pictures a bootstrap,
    with the gain over the base model at the same noise, gain, gain_low, gain_high, paired; of whole sets half-sampled
    (evaluation/metrics.py). `base` is the base model's own; `floor` how far that moves when only the noise changes.
    None where it cannot be had. Drift (fid, kid) is from `other`, so the base model's is the floor.
    """
    sets = [read_images(content) for content in (tuned, base, other)]
    held_out = {label: _mean_figure(*(one.held_out[label] for one in sets)) for label in sets[0].held_out}
    reward, accuracy = _mean_figure(*(one.rewards for one in sets)), held_out.pop(ACCURACY, None)
    features = [one.features for one in sets if one.features is not None]
    return {
        "reward": reward, "accuracy": accuracy, "held_out": held_out,
        **dict.fromkeys(("vendi", "vendi_per_prompt", "distance", "fid", "kid", "fid_per_prompt")),
        **(_feature_figures(sets[0].prompts, *features) if len(features) == len(sets) else {}),
    }  # fmt: skip


def _feature_figures(
    prompts: Sequence[str], tuned: np.ndarray, base: np.ndarray, other: np.ndarray
) -> dict[str, Figure]:  # fmt: skip
    """Of the features [n, F] of an adapter's set, its base model's, and that at other noise."""
    sets, least = (tuned, base, other), min(map(len, metrics.rows_of(prompts).values()))
    vendis = [metrics.vendi(features) for features in sets]
    figures = {
        "vendi": _figure(vendis[0], metrics.half_interval(metrics.vendi, tuned), *vendis[1:]),
        "distance": _mean_figure(*(metrics.prompt_distances(features, prompts) for features in sets)),
    }
    if least > 1:
        each = [metrics.mean_per_prompt(metrics.vendi, prompts, features) for features in sets]
        figures["vendi_per_prompt"] = _figure(
            mean_of_good(each[0]), mean_interval(each[0]), *map(mean_of_good, each[1:])
        )
    for name, distance in (("fid", metrics.fid), ("kid", metrics.kid)):
        interval = metrics.half_interval(distance, tuned, other)
        figures[name] = _drift_figure(distance(tuned, other), interval, distance(base, other))
    if least >= metrics.PER_PROMPT:
        own, floor = (metrics.mean_per_prompt(metrics.fid, prompts, features, other) for features in (tuned, base))
        figures["fid_per_prompt"] = _drift_figure(mean_of_good(own), mean_interval(own), mean_of_good(floor))
    return figures


def _mean_figure(tuned: np.ndarray, base: np.ndarray, other: np.ndarray) -> Figure:
    low, high = metrics.paired_interval(base, tuned)
    figure = _figure(mean_of_good(tuned), mean_interval(tuned), mean_of_good(base), mean_of_good(other))
    return figure | _finite({"gain": mean_of_good(tuned - base), "gain_low": low, "gain_high": high})


def _figure(value: float, interval: Interval, base: float, other: float) -> Figure:
    return _finite({"value": value, "low": interval[0], "high": interval[1], "base": base, "floor": abs(other - base)})


def _drift_figure(value: float, interval: Interval, floor: float) -> Figure:
    return _finite({"value": value, "low": interval[0], "high": interval[1], "base": floor, "floor": floor})


def _finite(figure: dict[str, float]) -> Figure:
    return {name: float(value) if np.isfinite(value) else None for name, value in figure.items()}


def _weights(path: str) -> list[Any]:
    """What tells a local model's files from others at the same path."""
    folder = resolve(path)
    files = sorted(folder.rglob("*.safetensors")) if folder.is_dir() else []
    return [(str(file.relative_to(folder)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
