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
from evaluation.collapse import apartness
from evaluation.fixed_images import images_table, read_images
from evaluation.intervals import mean_of_good, paired_interval
from learner.config import Config, resolve
from learner.config.sections import LoraConfig, SamplerConfig
from learner.protocol.chunks import evaluation_chunks
from records.storage import Storage
from rewards import judges

FORMAT = 1  # of chunk files and of the figures' JSON
ACCURACY = "shapes_accuracy"  # a held-out reward with a key of its own
SHOWN_PIXELS = 256  # side of the pictures that a set keeps
Figure = dict[str, float | None]


class Pools(Protocol):
    """Whoever samples and scores: in process (commands/evaluate.py) or on Ray (actors/evaluation_pools.py)."""

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
        given = self.config
        adapter = [self.snapshot.sha256, given.lora.rank, given.lora.alpha] if self.snapshot.flat.any() else None
        facts = {
            "format": FORMAT, "model": given.model.model_dump(mode="json"), "weights": _weights(given.model.path),
            "adapter": adapter, "prompts": self.prompts, "seed": self.seed, "threads": given.run.cpu_threads,
            "sampler": given.sampler.model_dump(mode="json", exclude={"actors", "gpus", "labels"}),
            "reward": given.reward.model_dump(mode="json", exclude={"actors", "gpus", "labels", "quarantine_limit"}),
            "evaluation": given.evaluation.model_dump(mode="json", include={"images", "held_out", "features", "clip"}),
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

    def make(self, wanted: ImageSet, pools: Callable[[], Pools], progress: Callable[[int, int], None]) -> bytes:
        """The set as a Parquet file, columns of run_folder.IMAGES. `pools` are started if a chunk is missing.

        Raises:
            StorageError: the folder cannot be written or read.
            Exception: what the pools raise.
        """
        chunks = wanted.chunks
        missing = [chunk for chunk in chunks if not self.storage.exists(self._name(wanted, chunk))]
        finished = len(chunks) - len(missing)
        progress(finished, len(chunks))
        if missing:

            def done(chunk: Chunk, scores: Scores) -> None:
                nonlocal finished
                self.storage.write(self._name(wanted, chunk), images_table([scores], SHOWN_PIXELS))
                finished += 1
                progress(finished, len(chunks))

            pools().judge(wanted.snapshot, missing, done)
        parts = [pq.read_table(io.BytesIO(self.storage.read(self._name(wanted, chunk)))) for chunk in chunks]
        file = io.BytesIO()
        pq.write_table(pa.concat_tables(parts), file)
        return file.getvalue()

    def _name(self, wanted: ImageSet, chunk: Chunk) -> str:
        return f"evaluation/{wanted.key[:32]}/chunk-{chunk.index:05d}.parquet"


def compare(tuned: bytes, base: bytes, other: bytes) -> dict[str, Any]:
    """The figures of an adapter's set beside its base model's at the same noise (`base`) and at other noise (`other`).

    Each is {value, low, high, base, floor}, the first three with a 95 % interval: of means over pictures a bootstrap,
    with the gain over the base model at the same noise, gain, gain_low, gain_high, paired; of whole sets half-sampled
    (evaluation/metrics.py). `base` is the base model's own; `floor` how far that moves when only the noise changes.
    None where it cannot be had. Drift (fid, kid) is from `other`, so the base model's is the floor.
    """
    mine, plain, moved = (read_images(content) for content in (tuned, base, other))
    held_out = {label: _mean_figure(*(one.held_out[label] for one in (mine, plain, moved))) for label in mine.held_out}
    found: dict[str, Any] = {
        "reward": _mean_figure(mine.rewards, plain.rewards, moved.rewards),
        "accuracy": held_out.pop(ACCURACY, None),
        "held_out": held_out,
    }
    names = ("vendi", "vendi_per_prompt", "distance", "fid", "kid", "fid_per_prompt")
    each = [one.features for one in (mine, plain, moved) if one.features is not None]
    if len(each) < 3:
        return found | dict.fromkeys(names)
    return found | dict(zip(names, _of_features(mine.prompts, each), strict=True))


def _of_features(prompts: Sequence[str], each: Sequence[np.ndarray]) -> list[Figure | None]:
    """Of the features [n, F] of an adapter's set, its base model's, and that at other noise."""
    spread: list[Figure | None] = [
        _figure(metrics.vendi(each[0]), metrics.half_interval(metrics.vendi, each[0]), *map(metrics.vendi, each[1:]))
    ]
    sizes = {len(rows) for rows in metrics.rows_of(prompts).values()}
    if min(sizes) > 1:
        values = [metrics.mean_per_prompt(metrics.vendi, prompts, one) for one in each]
        means = [mean_of_good(one) for one in values]
        spread.append(_figure(means[0], metrics.mean_interval(values[0]), *means[1:]))
    else:
        spread.append(None)
    apart = [apartness(one, prompts) for one in each]
    spread.append(_mean_figure(*apart))
    drift: list[Figure | None] = []
    for statistic in (metrics.fid, metrics.kid):
        interval = metrics.half_interval(statistic, each[0], each[2])
        floor = statistic(each[1], each[2])
        drift.append(_clean({"value": statistic(each[0], each[2]), "low": interval[0], "high": interval[1],
                             "base": floor, "floor": floor}))  # fmt: skip
    if min(sizes) >= metrics.PER_PROMPT:
        own, floors = (metrics.mean_per_prompt(metrics.fid, prompts, one, each[2]) for one in each[:2])
        low, high = metrics.mean_interval(own)
        floor = mean_of_good(floors)
        drift.append(_clean({"value": mean_of_good(own), "low": low, "high": high, "base": floor, "floor": floor}))
    else:
        drift.append(None)
    return spread + drift


def _mean_figure(mine: np.ndarray, plain: np.ndarray, moved: np.ndarray) -> Figure:
    found = _figure(mean_of_good(mine), metrics.mean_interval(mine), mean_of_good(plain), mean_of_good(moved))
    low, high = paired_interval(plain, mine)
    return found | _clean({"gain": mean_of_good(mine - plain), "gain_low": low, "gain_high": high})


def _figure(value: float, interval: tuple[float, float], base: float, moved: float) -> Figure:
    low, high = interval
    return _clean({"value": value, "low": low, "high": high, "base": base, "floor": abs(moved - base)})


def _clean(figure: dict[str, float]) -> Figure:
    return {name: float(value) if np.isfinite(value) else None for name, value in figure.items()}


def settings(config: Config, prompts: Sequence[str], rank: int, alpha: float) -> Config:
    """Of a run's settings those that judging needs, the others at their defaults: runs of different objectives are
    judged by the same actors. Where every prompt is of the shapes world, prompt accuracy is judged too."""
    given = config.sampler
    sampler = SamplerConfig(
        actors=given.actors, gpus=given.gpus, labels=given.labels, chunk_size=given.chunk_size, steps=given.steps,
        guidance=given.guidance, eta=given.eta, grid=given.grid,
    )  # fmt: skip
    evaluation = config.evaluation
    if ACCURACY not in judges.labels(evaluation.held_out) and _of_shapes(prompts):
        evaluation = evaluation.model_copy(update={"held_out": (*evaluation.held_out, ACCURACY)})
    run = config.run.model_copy(update={"seed": 0, "dir": None, "root": None, "resume": "auto"})
    return Config(
        run=run, model=config.model, sampler=sampler, reward=config.reward, lora=LoraConfig(rank=rank, alpha=alpha),
        evaluation=evaluation,
    )  # fmt: skip


def _of_shapes(prompts: Sequence[str]) -> bool:
    try:
        judges.check([ACCURACY], "pixels", None, prompts)
    except ValueError:
        return False
    return True


def _weights(path: str) -> list[Any]:
    """What tells a local model's files from others at the same path."""
    folder = resolve(path)
    files = sorted(folder.rglob("*.safetensors")) if folder.is_dir() else []
    return [(str(file.relative_to(folder)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
