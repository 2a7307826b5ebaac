"""The shapes world: what a caption means, and the true drawing of it.

A scene has a plain background and one object, or two side by side. Everything random is drawn from the
`numpy.random.Generator` that the caller passes, so a seed names a picture.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

IMAGE_SIZE = 64  # pixels, square

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 40, 45),
    "green": (45, 165, 70),
    "blue": (50, 85, 220),
    "yellow": (245, 220, 50),
    "orange": (245, 135, 30),
    "purple": (130, 50, 170),
    "pink": (250, 140, 195),
    "cyan": (50, 205, 215),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (245, 245, 245),
    "gray": (140, 140, 140),
    "black": (20, 20, 20),
    "sand": (222, 200, 160),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
ANY_SHAPE = "shape"  # the noun of a caption that leaves the shape open

# Radii in pixels of the circle that circumscribes the object (for the square, of the one inside it).
RADII: dict[str, tuple[float, float]] = {"small": (6.0, 8.0), "medium": (12.0, 17.0), "large": (21.0, 26.0)}
PAIR_RADII = (8.0, 12.0)  # each of two objects

# One colour-shape pair in eight never occurs in training: one for each shape.
HELD_OUT = frozenset(zip(("green", "orange", "pink", "red", "blue", "purple"), SHAPES, strict=True))
SEEN = tuple(pair for pair in itertools.product(COLOURS, SHAPES) if pair not in HELD_OUT)

# Where a placed object is: unit direction (x, y downwards) from the middle, and how often among placed objects.
PLACES: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}
PLACE_SHARES = (0.4, 0.3, 0.2, 0.1)
PLACE_OFFSETS = (13.0, 16.0)  # pixels from the middle
PLACED_RADII = (11.0, 14.0)

# How often training shows each kind of scene. Small and placed objects and pairs are rare on purpose: prompts
# for them are what reinforcement can improve.
KINDS: dict[str, float] = {"medium": 0.695, "large": 0.25, "small": 0.015, "pair": 0.03, "placed": 0.01}

# What training captions leave unsaid, and how often; the drawing has it all the same, drawn without regard to the
# caption. So an open prompt has several right answers, each as likely as any.
UNSAID: dict[tuple[str, ...], float] = {
    (): 0.55,
    ("background",): 0.17,
    ("colour",): 0.05,
    ("shape",): 0.05,
    ("colour", "background"): 0.08,
    ("shape", "background"): 0.06,
    ("colour", "shape"): 0.01,
    ("colour", "shape", "background"): 0.03,
}
BARE = 0.15  # of the training captions have no articles before their objects


@dataclass(frozen=True)
class Thing:
    """One object as a caption names it. What the caption does not say is None: any colour, any shape; a medium size,
    near the middle."""

    colour: str | None
    shape: str | None
    size: str | None = None
    place: str | None = None

    def words(self, article: bool = True) -> str:
        text = " ".join(word for word in (self.size, self.colour, self.shape or ANY_SHAPE) if word)
        if article:
            text = f"{'an' if text[0] in 'aeiou' else 'a'} {text}"
        return text if self.place is None else f"{text} at the {self.place}"


@dataclass(frozen=True)
class Scene:
    """What a caption says: one object, or two (left, then right), on a background (None: not said, any)."""

    things: tuple[Thing, ...]
    background: str | None

    def caption(self, articles: bool = True) -> str:
        text = " and ".join(thing.words(articles) for thing in self.things)
        return text if self.background is None else f"{text} on a {self.background} background"


def parse(caption: str) -> Scene:
    """Read a caption back into its scene.

    Raises:
        ValueError: the caption is not of this world; the message says which word and what the world knows.
    """
    text, _, tail = caption.strip().lower().partition(" on a ")
    background = tail.removesuffix(" background") or None
    if background is not None and background not in BACKGROUNDS:
        raise ValueError(f"prompt {caption!r}: unknown background {background!r}; known: {', '.join(BACKGROUNDS)}")
    things = []
    for part in text.split(" and "):
        words = part.split()
        if words and words[0] in ("a", "an"):
            words = words[1:]
        size = words.pop(0) if words and words[0] in ("small", "large") else None
        colour = words.pop(0) if words and words[0] in COLOURS else None
        shape = words.pop(0) if words and words[0] in (*SHAPES, ANY_SHAPE) else ""
        place = words.pop() if words[:2] == ["at", "the"] and words[2:] and words[-1] in PLACES else None
        if not shape or words != (["at", "the"] if place else []):
            raise ValueError(
                f"prompt {caption!r}: expected 'a [small|large] [COLOUR] SHAPE [at the PLACE] [and a [COLOUR] SHAPE] "
                f"[on a BACKGROUND background]', with colours {', '.join(COLOURS)}; shapes {', '.join(SHAPES)}, or "
                f"{ANY_SHAPE!r} for any; places {', '.join(PLACES)}"
            )
        things.append(Thing(colour, None if shape == ANY_SHAPE else shape, size, place))
    if len(things) > 2:
        raise ValueError(f"prompt {caption!r}: at most two objects")
    return Scene(tuple(things), background)


def signed_distance(shape: str, x: Any, y: Any, r: Any, xp: Any = np) -> Any:
    """Distance in pixels to the outline of `shape` of radius `r` centred at the origin, negative inside.

    x, y: same-shaped arrays of pixel coordinates, y downwards; with `xp` torch tensors, and r one that broadcasts.
    Exact near straight edges; near corners only the sign is.
    """
    if shape == "circle":
        return xp.hypot(x, y) - r
    if shape == "square":
        return xp.maximum(xp.abs(x), xp.abs(y)) - 0.85 * r
    if shape == "triangle":
        return xp.maximum(xp.abs(x) * 0.866 - y * 0.5, y) - 0.5 * r
    if shape == "star":
        angle = xp.arctan2(x, -y)
        sector = xp.abs((angle + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
        rho = xp.hypot(x, y)
        px, py = rho * xp.cos(sector), rho * xp.sin(sector)
        # The edge runs from the tip (r, 0) to the notch at radius 0.42 r, angle pi/5.
        nx, ny = 0.42 * float(np.cos(np.pi / 5)), 0.42 * float(np.sin(np.pi / 5))
        ex, ey = nx - 1, ny
        return ((px - r) * -ey + py * ex) / -float(np.hypot(ex, ey))
    if shape == "cross":
        arm, width = 0.95 * r, 0.32 * r
        ax, ay = xp.abs(x), xp.abs(y)
        return xp.minimum(xp.maximum(ax - arm, ay - width), xp.maximum(ax - width, ay - arm))
    if shape == "ring":
        return xp.abs(xp.hypot(x, y) - 0.75 * r) - 0.25 * r
    raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")


_GRID_Y, _GRID_X = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE].astype(np.float32) + 0.5


def coverage(shape: str, cx: float, cy: float, r: float) -> np.ndarray:
    """Antialiased mask [H, W] in [0, 1] of a shape centred at (cx, cy) pixels."""
    return np.clip(0.5 - signed_distance(shape, _GRID_X - cx, _GRID_Y - cy, r), 0.0, 1.0)


def draw(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """A true drawing of the scene, [H, W, 3] uint8, with random place, radius and slight colour jitter; what the scene
    leaves open is drawn at random, too."""
    background = scene.background or str(rng.choice(list(BACKGROUNDS)))
    image = np.broadcast_to(_jitter(BACKGROUNDS[background], rng), (IMAGE_SIZE, IMAGE_SIZE, 3))
    for i, thing in enumerate(scene.things):
        pair = len(scene.things) == 2
        placed = thing.place is not None and not pair
        named = RADII[thing.size or "medium"]
        r = rng.uniform(*(PAIR_RADII if pair else PLACED_RADII if placed and thing.size is None else named))
        slack = max(0.0, (IMAGE_SIZE / (4 if pair else 2)) - r - 3)
        dx, dy = rng.uniform(-1, 1, 2) * min(slack, 9.0)
        if placed:
            toward = PLACES[thing.place or ""]
            offset = rng.uniform(*PLACE_OFFSETS)
            dx = toward[0] * offset if toward[0] else dx / 3
            dy = toward[1] * offset if toward[1] else dy / 3
        cx = IMAGE_SIZE * ((0.25 + 0.5 * i) if pair else 0.5) + dx
        shape, colour = thing.shape or str(rng.choice(SHAPES)), thing.colour or str(rng.choice(list(COLOURS)))
        alpha = coverage(shape, cx, IMAGE_SIZE / 2 + dy, r)[..., None]
        image = image * (1 - alpha) + _jitter(COLOURS[colour], rng) * alpha
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def _jitter(rgb: tuple[int, int, int], rng: np.random.Generator) -> np.ndarray:
    return np.asarray(rgb, np.float32) + rng.uniform(-8, 8, 3).astype(np.float32)


def training_scene(rng: np.random.Generator) -> Scene:
    """One whole scene of the training distribution: seen pairs only, kinds as often as KINDS says."""
    kind = rng.choice(list(KINDS), p=list(KINDS.values()))
    background = str(rng.choice(list(BACKGROUNDS)))
    colour, shape = SEEN[rng.integers(len(SEEN))]
    if kind == "pair":
        return Scene((Thing(colour, shape), Thing(*SEEN[rng.integers(len(SEEN))])), background)
    if kind == "placed":
        place = str(rng.choice(list(PLACES), p=PLACE_SHARES))
        return Scene((Thing(colour, shape, place=place),), background)
    return Scene((Thing(colour, shape, None if kind == "medium" else str(kind)),), background)


def leave_open(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene less what UNSAID leaves out of a training caption."""
    unsaid = list(UNSAID)[rng.choice(len(UNSAID), p=list(UNSAID.values()))]
    without = {name: None for name in ("colour", "shape") if name in unsaid}
    things = tuple(replace(thing, **without) for thing in scene.things)
    return Scene(things, None if "background" in unsaid else scene.background)


def training_caption(scene: Scene, rng: np.random.Generator) -> str:
    """One caption of a whole scene, as training has it."""
    return leave_open(scene, rng).caption(articles=rng.random() >= BARE)


def vocabulary() -> list[str]:
    """Every word a caption can hold, sorted."""
    words = {"a", "an", "and", "on", "at", "the", "background", "small", "large", ANY_SHAPE}
    return sorted(words.union(PLACES, COLOURS, BACKGROUNDS, SHAPES))
