"""Sets of judged pictures, and the figures that compare an adapter's set with its base model's.

A set is what one adapter draws of fixed prompts with counter-based noise. Each finished chunk is kept under a name that
follows from everything it depends on: it is never made again, by whatever command, and a stopped set goes on.

Three sets make an adapter's figures: its own, its base model's at the same noise, and its base model's at other noise.
The last is what drift is measured against; both sets of the base model together tell what noise alone makes.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from diffusion.snapshot import Snapshot
from diffusion.trajectory import Chunk, Scores
from evaluation import metrics
from evaluation.metrics import Interval, mean_of_good
from learner.config import Config, resolve
from learner.prompts import metadata_of
from learner.protocol.chunks import evaluation_chunks
from records.run_folder import IMAGES, parquet, read_parquet
from records.storage import StorageError, cache

FORMAT = 3  # of chunk files and of the figures' JSON
ACCURACY = "shapes_accuracy"  # a held-out reward with a key of its own
SHOWN_PIXELS = 256  # side of the pictures that a set keeps
# Settings that change no picture and no score; prompts are compared themselves.
NOT_JUDGED_BY = {"actors", "gpus", "labels", "quarantine_limit", "try_first", "prompts", "every"}
Figure = dict[str, float | None]


@dataclass(frozen=True)
class Evaluated:
    """Judged pictures: n of them, NaN where one is bad."""

    prompts: Sequence[str]
    rewards: np.ndarray  # [n], raw, of the reward trained on
    held_out: Mapping[str, np.ndarray]  # [n] each, raw
    features: np.ndarray | None  # [n, F]
    kl: np.ndarray | None = None  # [n, N] nats of each transition, to the base model; None: not measured
    log_ratio: np.ndarray | None = None  # [n] nats of the whole path


def image_rows(scores: Sequence[Scores], thumbnail_pixels: int) -> list[dict[str, Any]]:
    """Judged pictures as rows, columns of run_folder.IMAGES; no thumbnails at 0 pixels."""
    return [
        {
            "number": number,
            "prompt": part.chunk.prompts[i],
            "reward": float(part.rewards[i, -1]) if math.isfinite(part.rewards[i, -1]) else None,
            "reward_parts": [(label, float(values[i])) for label, values in part.parts.items()],
            "held_out": [(label, float(values[i])) for label, values in part.held_out.items()],
            "features": None if part.features is None else part.features[i],
            "thumbnail_png": None if part.images is None else _thumbnail(part.images[i], thumbnail_pixels),
            "bad": part.bad.get(i),
            "kl": None if part.nats is None else part.nats.kl[i],
            "log_ratio": None if part.nats is None else float(part.nats.log_ratio[i].sum(dtype=np.float64)),
        }
        for part in scores
        for i, number in enumerate(part.chunk.trajectory_ids)
    ]


def _thumbnail(pixels: np.ndarray, side: int) -> bytes | None:
    """PNG file of a picture [H, W, 3] uint8, no larger than `side`; None at 0."""
    if not side:
        return None
    picture, file = Image.fromarray(pixels), io.BytesIO()
    picture.thumbnail((side, side), Image.Resampling.BICUBIC)
    picture.save(file, "PNG")
    return file.getvalue()


def read_images(content: bytes, place: str = "a set") -> Evaluated:
    """From a Parquet file of such rows, what figures need. Raises a StorageError, which names the `place`."""
    table = read_parquet(content, place, IMAGES, ("prompt", "reward", "held_out", "features"), ("kl", "log_ratio"))
    held_out, features = [dict(row) for row in table["held_out"].to_pylist()], table["features"].to_pylist()
    return Evaluated(
        table["prompt"].to_pylist(),
        np.array(table["reward"].to_pylist(), np.float64),  # None becomes NaN
        {label: np.array([row[label] for row in held_out], np.float64) for label in held_out[0]},
        None if features[0] is None else np.array(features, np.float32),
        *_nats(table, place),
    )


def _nats(table: pa.Table, place: str) -> tuple[np.ndarray | None, np.ndarray | None]:
    """kl and log_ratio, where they were measured of every picture."""
    if not {"kl", "log_ratio"} <= {*table.column_names} or table["kl"].null_count or table["log_ratio"].null_count:
        return None, None
    try:
        return np.array(table["kl"].to_pylist(), np.float64), table["log_ratio"].to_numpy().astype(np.float64)
    except ValueError as error:  # of several lengths
        raise StorageError(f"{place} is damaged ({error}): put it back from a copy, or remove it") from error


class Pools(Protocol):
    """Whoever samples and scores: in process (learner/inprocess.py) or on Ray (actors/rollouts.py)."""

    description: str

    def judge(self, snapshot: Snapshot, chunks: Sequence[Chunk], done: Callable[[Chunk, Scores], None]) -> None:
        """Sample the chunks with the adapter and score them; `done` gets each as it is finished, in any order."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class ImageSet:
    """Which pictures: of an adapter and prompts, by settings with the seed of their noise."""

    config: Config
    prompts: tuple[str, ...]
    snapshot: Snapshot
    pixels: ClassVar[int] = SHOWN_PIXELS  # side of what is kept of a picture; 0: nothing

    def chunks(self) -> list[Chunk]:
        return evaluation_chunks(self.config, self.prompts)

    @property
    def settings(self) -> dict[str, Any]:
        """What was set of all that the pictures and their scores depend on, by key of the config, and the prompts."""
        settings = {
            f"{section}.{key}": value
            for section in ("model", "sampler", "reward", "evaluation")
            for key, value in getattr(self.config, section).model_dump(mode="json", exclude=NOT_JUDGED_BY).items()
        }
        if "window" in (self.config.sampler.noise, self.config.sampler.adapter):
            settings["objective.window"] = self.config.objective.span(self.config.sampler.steps)
        metadata = {"metadata": found} if (found := metadata_of(self.prompts)) else {}
        return {**settings, "run.cpu_threads": self.config.run.cpu_threads, "prompts": self.prompts, **metadata}

    @property
    def facts(self) -> dict[str, Any]:
        """Everything but the adapter that the pictures and their scores depend on: files and code by their content."""
        from rewards import content

        reward, evaluation, clip = self.config.reward.model_dump(), self.config.evaluation, None
        if evaluation.features == "clip":
            from rewards.aesthetic import CLIP

            clip = evaluation.clip or CLIP
        read = [str(resolve(self.config.model.path)), reward, evaluation.held_out, clip]
        return {**self.settings, "content": content.digest(read), "program": content.program()}

    @property
    def key(self) -> str:
        """sha256 of all that. All base models' adapters, whatever their rank, are one: they add nothing."""
        lora = self.config.lora
        adapter = [self.snapshot.sha256, lora.rank, lora.alpha] if self.snapshot.flat.any() else None
        return _digest({"format": FORMAT, "adapter": adapter, **self.facts})

    @property
    def name(self) -> str:
        """For files about the set: its size, and what tells its settings and adapter from others'."""
        settings = {**self.settings, "adapter": self.snapshot.sha256}
        return f"{self.config.evaluation.images}-images-{_digest(settings)[:8]}"


def _digest(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


class Cache:
    """Finished chunks, in one folder for all commands."""

    def __init__(self, folder: Path | None = None) -> None:
        """Default: $TRIBUTARY_CACHE, or tributary/ in the user's cache folder."""
        self.storage = cache(folder)

    def make(self, image_set: ImageSet, pools: Callable[[], Pools], progress: Callable[[int, int], None]) -> bytes:
        """The set as a Parquet file, columns of run_folder.IMAGES. `pools` are started if a chunk is missing; raises
        what they do, and a StorageError where the folder cannot be written or read."""
        chunks, folder = image_set.chunks(), f"evaluation/{image_set.key[:32]}"
        files = {chunk.index: f"{folder}/chunk-{chunk.index:05d}.parquet" for chunk in chunks}
        tables = {chunk.index: self._table(files[chunk.index]) for chunk in chunks}
        missing = [chunk for chunk in chunks if tables[chunk.index] is None]
        finished = len(chunks) - len(missing)
        progress(finished, len(chunks))

        def done(chunk: Chunk, scores: Scores) -> None:
            nonlocal finished
            self.storage.write(files[chunk.index], parquet(image_rows([scores], image_set.pixels), IMAGES))
            finished += 1
            progress(finished, len(chunks))

        if missing:
            pools().judge(image_set.snapshot, missing, done)
        tables |= {chunk.index: self._table(files[chunk.index]) for chunk in missing}
        pq.write_table(pa.concat_tables(tables.values()), whole := io.BytesIO())
        return whole.getvalue()

    def _table(self, file: str) -> pa.Table | None:
        """Of a finished chunk; a damaged one is made again."""
        if not self.storage.exists(file):
            return None
        with contextlib.suppress(StorageError):
            return read_parquet(self.storage.read(file), file, IMAGES, tuple(IMAGES))
        return None


def compare(tuned: Evaluated, base: Evaluated, other: Evaluated) -> dict[str, Any]:
    """The figures of an adapter's set beside its base model's at the same noise (`base`) and at other noise (`other`);
    None where one cannot be had, and `absent` says by its name why.

    Each is {value, low, high, base, floor, floor_high}: the value with its 95 % interval; the base model's own; median
    and upper end of what noise alone makes of it (metrics.floor): of a drift, the base model's distance from itself,
    else by how much two of the base model's sets differ. Means over pictures and the distance within a prompt also have
    the gain over the base model at the same noise (gain, gain_low, gain_high). Drift is from `other`.
    """
    sets = tuned, base, other
    prompts = sets[0].prompts
    held_out = {label: _mean(prompts, *(images.held_out[label] for images in sets)) for label in sets[0].held_out}
    figures: dict[str, Any] = dict.fromkeys(("vendi", "distance", "fid", "kid"))
    figures |= {
        "reward": _mean(prompts, *(images.rewards for images in sets)),
        "accuracy": held_out.pop(ACCURACY, None),
    }
    features = [images.features for images in sets if images.features is not None]
    if len(features) == len(sets):
        own, same, apart = features
        for name, drift in (("fid", metrics.fid), ("kid", metrics.kid)):
            interval = metrics.drift_interval(drift, own, apart, prompts)
            floor = metrics.floor(drift, same, apart, prompts)
            figures[name] = _figure(drift(own, apart), interval, drift(same, apart), floor)
        interval, floor = metrics.vendi_interval(own, prompts), _floor(metrics.vendi, same, apart, prompts)
        figures["vendi"] = _figure(metrics.vendi(own), interval, metrics.vendi(same), floor)
        figures["distance"] = _distance(prompts, own, same, apart)
    count = f"{len(prompts)} pictures of {len(set(prompts))} prompts"
    reasons = {"distance": f"no prompt has two good pictures ({count})", "reward": "no picture is good"}
    reasons |= dict.fromkeys(("vendi", "fid", "kid"), f"too few good pictures ({count})")
    absent = {name: why for name, why in reasons.items() if (figures[name] or {}).get("value") is None}
    figures |= dict.fromkeys(name for name in absent if name != "reward")
    return {**figures, "held_out": held_out, "absent": absent}


def _mean(prompts: Sequence[str], tuned: np.ndarray, base: np.ndarray, other: np.ndarray) -> Figure:
    """Of a value for each picture [n]."""
    interval, floor = metrics.mean_interval(tuned, prompts), _floor(mean_of_good, base, other, prompts)
    gain = mean_of_good(tuned - base), *metrics.paired_interval(base, tuned, prompts)
    return _figure(mean_of_good(tuned), interval, mean_of_good(base), floor, *gain)


def _distance(prompts: Sequence[str], tuned: np.ndarray, base: np.ndarray, other: np.ndarray) -> Figure:
    """Within a prompt, of features [n, F]."""
    pool, names = np.concatenate([base, other]), np.array([*prompts, *prompts], object)

    def at(rows: np.ndarray) -> float:
        return metrics.distance(pool[rows], names[rows])[0]

    value, *interval = metrics.distance(tuned, prompts)
    floor = _floor(at, np.arange(len(base)), np.arange(len(base), len(pool)), prompts)
    gain = metrics.distance(tuned, prompts, before=base)
    return _figure(value, (interval[0], interval[1]), metrics.distance(base, prompts)[0], floor, *gain)


def _floor(
    statistic: Callable[[np.ndarray], float], base: np.ndarray, other: np.ndarray, prompts: Sequence[str]
) -> Interval:
    return metrics.floor(lambda one, two: abs(statistic(one) - statistic(two)), base, other, prompts)


def _figure(value: float, interval: Interval, base: float, floor: Interval, *gain: float) -> Figure:
    numbers = {"value": value, "low": interval[0], "high": interval[1], "base": base, "floor": floor[0]}
    numbers |= {"floor_high": floor[1], **dict(zip(("gain", "gain_low", "gain_high"), gain, strict=False))}
    return {name: float(number) if np.isfinite(number) else None for name, number in numbers.items()}
