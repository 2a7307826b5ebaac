"""What pictures show, one attribute at a time: of the shapes world by its detector, of others by CLIP without training.

A reading is the attribute's possible values and, of each picture, the number of the one it has."""

from collections.abc import Callable, Sequence

import numpy as np

from rewards.weights import Asset, find

Values = tuple[str, ...]
Readings = dict[str, tuple[Values, np.ndarray]]  # name -> values, and [n] int64, 0 to len(values) - 1
Pictures = Sequence[np.ndarray]  # n of [H, W, 3] uint8
SHAPES = ("colour", "shape", "background", "size", "place_x", "place_y", "right")
NONE = "none"  # no object was found
EDGES = (20, 24, 28, 32, 36, 40, 44)  # pixels, of the bins of an object's place
SIZES = {"small": 10.0, "medium": 19.0}  # below which radius in pixels an object is that; else large
BATCH = 32
KEY = "evaluation.clip"


def names_shapes(prompts: Sequence[str]) -> bool:
    """Whether every prompt is of the shapes world."""
    from models.shapes.world import parse

    try:
        return bool([parse(prompt) for prompt in dict.fromkeys(prompts)])
    except ValueError:
        return False


def of_shapes(pictures: Pictures, prompts: Sequence[str]) -> Readings:
    """colour, shape, background, size, place_x, place_y (of the object, of two the left one in its half) and right:
    whether the picture shows what its prompt says."""
    from models.shapes.detector import halves
    from models.shapes.detector import read as look
    from models.shapes.measure import correct
    from models.shapes.world import BACKGROUNDS, COLOURS, SHAPES, parse

    bounds = (f"below {EDGES[0]}", *(f"{low}-{low + 4}" for low in EDGES[:-1]), f"from {EDGES[-1]}", NONE)
    values: dict[str, Values] = {
        "colour": (*COLOURS, NONE), "shape": (*SHAPES, NONE), "background": tuple(BACKGROUNDS),
        "size": (*SIZES, "large", NONE), "place_x": bounds, "place_y": bounds, "right": ("no", "yes"),
    }  # fmt: skip
    rows = []
    for picture, prompt in zip(pictures, prompts, strict=True):
        scene = parse(prompt)
        seen = look(picture if len(scene.things) == 1 else halves(picture)[0])
        size = next((name for name, most in SIZES.items() if seen.radius < most), "large")
        places = [bounds[int(np.searchsorted(EDGES, at, "right"))] for at in seen.centre]
        of_object = [size, *places] if seen.found else [NONE] * 3
        right = "yes" if correct(picture, scene) else "no"
        rows.append([seen.colour or NONE, seen.shape or NONE, seen.background, *of_object, right])
    columns = zip(*rows, strict=True) if rows else [()] * len(values)
    return {
        name: (known, np.array([known.index(value) for value in column], np.int64))
        for (name, known), column in zip(values.items(), columns, strict=True)
    }


def named(text: str) -> tuple[str, Values]:
    """Of `animal=a cat,a dog`: animal, and its values. Raises ValueError."""
    name, _, listed = text.partition("=")
    values = tuple(dict.fromkeys(value.strip() for value in listed.split(",") if value.strip()))
    if not name.strip() or len(values) < 2:
        raise ValueError(f"{text!r}: expected NAME=VALUE,VALUE,... with at least two values")
    return name.strip(), values


def require_clip(clip: str | None) -> None:
    """Raises WeightsNotFound where CLIP's two towers and its vocabulary cannot be had."""
    find([_asset(clip)], fetch=False)


def by_clip(attributes: dict[str, Values], clip: str | None, device: str = "cpu") -> Callable[[Pictures], Readings]:
    """What reads attributes off: of each the value whose text CLIP finds nearest to the picture. Raises
    WeightsNotFound, BadWeights."""
    import torch

    from rewards import clip as clips

    seer = clips.ClipReward(*clips.load(clips.Network, find([_asset(clip)])[0], device))
    with torch.no_grad():
        texts = {name: seer.network.texts(seer.tokens(values)[0].to(device)) for name, values in attributes.items()}

    def readings(pictures: Pictures) -> Readings:
        found = {name: [np.zeros(0, np.int64)] for name in attributes}
        for start in range(0, len(pictures), BATCH):
            images = torch.from_numpy(np.stack(pictures[start : start + BATCH])).permute(0, 3, 1, 2).float() / 255
            with torch.no_grad():
                seen = seer.network.pictures(seer.resize(images, seer.side).to(device))
            for name, text in texts.items():
                found[name].append((seen @ text.T).argmax(1).cpu().numpy())
        return {name: (attributes[name], np.concatenate(parts)) for name, parts in found.items()}

    return readings


def _asset(clip: str | None) -> Asset:
    from rewards import clip as clips

    return clips.asset(KEY, clip or clips.CLIP, *clips.WHOLE)
