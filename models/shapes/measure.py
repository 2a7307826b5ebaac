"""Prints the figures of README.md: `python -m models.shapes.measure [--steps 10] [--lora FOLDER]`, and with
`--model models/shapes_flow --steps 20` those of the flow model.

Plain diffusers all the way (one thread; DDIM with eta = 1, or FlowMatchEulerDiscreteScheduler); pictures are read back
by detector.py. The same noise seeds for every prompt kind, so two calls compare like with like.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline

from models.shapes import world
from models.shapes.detector import along, halves, read
from models.shapes.world import BACKGROUNDS, COLOURS, HELD_OUT, PLACES, RADII, SEEN, SHAPES, Scene, Thing

BATCH = 24
PLACED_FROM = 8.0
OPEN: dict[str, list[tuple[str | None, str | None]]] = {  # kinds that name no background: the colours and shapes asked
    "no-background": list(itertools.product(COLOURS, SHAPES)),
    "any-colour": [(None, shape) for shape in SHAPES],
    "any-shape": [(colour, None) for colour in COLOURS],
}
KINDS = ("seen", "held-out", "large", "small", "two", *PLACES, *OPEN)


def scenes(kind: str, count: int) -> list[Scene]:
    """`count` scenes of one kind, cycling through pairs and backgrounds: seen, held-out, small, large, two,
    a place or one of OPEN."""
    if kind in OPEN:
        return [Scene((Thing(*OPEN[kind][i % len(OPEN[kind])]),), None) for i in range(count)]
    rng = np.random.default_rng(7)
    pairs = sorted(HELD_OUT) if kind == "held-out" else list(SEEN)
    made = []
    for i in range(count):
        colour, shape = pairs[i % len(pairs)]
        background = list(BACKGROUNDS)[(i + i // len(pairs)) % len(BACKGROUNDS)]
        things = [Thing(colour, shape, kind if kind in RADII else None, kind if kind in PLACES else None)]
        if kind == "two":
            things.append(Thing(*SEEN[rng.integers(len(SEEN))]))
        made.append(Scene(tuple(things), background))
    return made


def correct(image: np.ndarray, scene: Scene) -> bool:
    """Strict: every object has the asked colour and shape (where none is asked, any known one), a named size within 2
    pixels of its range, and lies at least PLACED_FROM pixels from the middle towards a named place."""
    parts = [image] if len(scene.things) == 1 else halves(image)
    for part, thing in zip(parts, scene.things, strict=True):
        reading = read(part)
        low, high = RADII[thing.size or "medium"]
        sized = thing.size is None or low - 2 <= reading.radius <= high + 2
        placed = thing.place is None or along(reading, thing.place) >= PLACED_FROM
        asked = thing.colour in (None, reading.colour) and thing.shape in (None, reading.shape)
        if not (reading.found and asked and sized and placed):
            return False
    return True


def law(images: np.ndarray) -> dict[str, dict[str, int]]:
    """How often the detector reads each colour, shape and background; pictures of nothing do not count."""
    readings = [reading for reading in map(read, images) if reading.found]
    known = {"colour": COLOURS, "shape": SHAPES, "background": BACKGROUNDS}
    return {
        name: {value: sum(getattr(reading, name) == value for reading in readings) for value in values}
        for name, values in known.items()
    }


def evenness(counts: dict[str, int]) -> float:
    """Entropy of the counts over its largest: 1 where all values occur alike, 0 where only one does."""
    shares = np.array([count for count in counts.values() if count]) / sum(counts.values())
    return float((shares * np.log(1 / shares)).sum() / np.log(len(counts)))


def generate(pipeline: Any, prompts: list[str], steps: int, guidance: float) -> np.ndarray:
    """[B, H, W, 3] uint8; image i has noise seed i."""
    images = []
    # The flow model's T5 says nothing: rows for the longest prompt are enough.
    own = {"eta": 1.0} if isinstance(pipeline, StableDiffusionPipeline) else {"max_sequence_length": 16}
    for start in range(0, len(prompts), BATCH):
        part = prompts[start : start + BATCH]
        seeds = [torch.Generator().manual_seed(start + i) for i in range(len(part))]
        images.append(
            pipeline(
                part, num_inference_steps=steps, guidance_scale=guidance, generator=seeds, output_type="np", **own
            ).images
        )
    return (np.concatenate(images) * 255).round().astype(np.uint8)


def accuracy(pipeline: Any, asked: list[Scene], steps: int, guidance: float) -> float:
    """Share of the scenes of which a picture is strictly right."""
    images = generate(pipeline, [scene.caption() for scene in asked], steps, guidance)
    return float(np.mean([correct(image, scene) for image, scene in zip(images, asked, strict=True)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(Path(__file__).parent))
    parser.add_argument("--lora", help="folder with pytorch_lora_weights.safetensors")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--count", type=int, default=252)
    parser.add_argument("--kinds", nargs="+", default=KINDS)
    parser.add_argument(
        "--laws", nargs="*", default=["a circle", "a shape", "a red circle"], help="of these prompts, too"
    )
    parser.add_argument("--prompts", type=Path, help="also measure the prompts of this file, in turn")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    sets = {kind: scenes(kind, args.count) for kind in args.kinds}
    if args.prompts:
        lines = [line for line in args.prompts.read_text().splitlines() if line and not line.startswith("#")]
        sets[args.prompts.stem] = [world.parse(lines[i % len(lines)]) for i in range(args.count)]
    true = [(world.draw(scene, rng), scene) for asked in sets.values() for scene in asked]
    print(f"detector on {len(true)} true drawings: {np.mean([correct(*pair) for pair in true]):.3f}")
    pipeline = DiffusionPipeline.from_pretrained(args.model, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    if args.lora:
        pipeline.load_lora_weights(args.lora)
    for kind, asked in sets.items():
        start = time.perf_counter()
        share = accuracy(pipeline, asked, args.steps, args.guidance)
        speed = len(asked) / (time.perf_counter() - start)
        print(
            f"{kind:13} strict accuracy {share:.3f} of {len(asked)} "
            f"({args.steps} steps, guidance {args.guidance:g}, {speed:.1f} images/s)"
        )
    for prompt in args.laws:
        for name, counts in law(generate(pipeline, [prompt] * args.count, args.steps, args.guidance)).items():
            shares = ", ".join(f"{value} {count}" for value, count in counts.items())
            print(f"{prompt!r}: {name} evenness {evenness(counts):.3f} ({shares})")


if __name__ == "__main__":
    main()
