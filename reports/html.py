"""report.html of a run: one file with everything in it, made from the durable records alone.

`python -m learner.report RUN` makes it anew; a run does so at every evaluation and at its end. The page asks for
nothing from elsewhere and has no script. Words and figures are summary.py's, curves diagrams.py's; report.html.j2 puts
them together and escapes every text. Pictures that are not there, or cannot be read, are left out.
"""

from __future__ import annotations

import base64
import contextlib
import io
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd  # type: ignore[import-untyped]
from markupsafe import Markup
from PIL import Image

from learner.config import Config
from records.passwords import without_passwords
from records.run_folder import BEFORE, Records
from records.storage import StorageError
from records.words import PROMPT, printable, short
from reports import targets
from reports.diagrams import HEIGHT, WIDTH, Diagram, bars, curves, profile
from reports.model_card import usage
from reports.pictures import SHEET_IMAGES, tiles
from reports.summary import Facts, Line, alike, clock, duration, figures, number, plural, seconds_of, state

FILE = "report.html"
TEMPLATE = Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8")  # now: files may change under a run
INTERVALS = 20  # are drawn at most, of evenly chosen evaluations
LAST_EPOCHS, PROMPTS = 5, 6  # among whose trajectories the best and worst are looked for
SIDE, QUALITY = 192, 88  # pixels at most, and JPEG quality, of a picture
UNREADABLE = (OSError, SyntaxError, ValueError, TypeError, Image.DecompressionBombError)
# Title, unit, and the metrics of metrics.jsonl with their labels.
REWARD = {"reward_mean": "training rollouts, mean", "eval_reward_mean": "fixed images"}
DIVERSITY = [
    ("Different pictures (Vendi score)", "effective number among the fixed images", {"eval_vendi": "fixed images"}),
    ("Distance within a prompt", "mean cosine distance of two pictures", {"eval_distance": "fixed images"}),
]
TARGET = [  # the gap is drawn by itself
    ("Explained by the policy", "share of beta x reward's variance", {"eval_explained": "fixed images"}),
    ("Distance from the base model", "nats of a path", {"eval_nats": "fixed images"}),
    (
        "What the nats bought", "mean reward above the base model's",
        {"eval_gain": "this run", "eval_ideal_gain": "ideal tilt, as many nats"},
    ),
]  # fmt: skip
LEARNING = [
    ("Loss", "", {"loss": "the objective's", "flow_loss": "flow-only fits"}),
    ("Parts of the loss", "", {"forward_loss": "forward", "reverse_loss": "reverse", "terminal_loss": "terminal"}),
    ("Clipped", "share of transitions", {"clipped": "ratio outside of the clip"}),
    ("Step size", "nats a transition", {"kl": "KL, rollout policy to the one being updated"}),
    ("Behind the window", "nats a transition", {"later_kl": "KL to the frozen model"}),
    ("Gradient norm before clipping", "", {"grad_norm": "LoRA", "flow_grad_norm": "flow network"}),
    ("Staleness", "policy versions behind", {"staleness_mean": "mean", "staleness_max": "most"}),
    (BETA := "Reward exponent", "beta", {"beta": "beta"}),  # where it changes
]
SECONDS = ("sampling", "scoring", "training", "evaluation")


@dataclass(frozen=True)
class Picture:
    """`source` is a data URL; `reward` is None of a bad one."""

    label: str
    source: str
    reward: float | None


@dataclass(frozen=True)
class Prompt:
    """What there is to see of a prompt, row by row: the same noise before and after training, or the best, median and
    worst of `count` trajectories."""

    text: str
    rows: list[list[Picture]]
    count: int = 0


def render(records: Records, config: Config) -> bytes:
    """The page, at any time of a run, of whatever is there; `records.warn` hears of what is damaged and left out.
    Raises a StorageError if a file that must be there cannot be read."""
    facts, known = Facts(records, config), state(records)
    seconds = [{"epoch": line["epoch"], **seconds_of(line, config)} for line in facts.trained]
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=_shown)
    environment.filters |= {"number": number, "duration": duration, "clock": clock, "plural": plural}
    page = environment.from_string(TEMPLATE).render(
        about=records.about,
        place=str(records.storage),
        config=config,
        facts=facts,
        known=known,
        now=time.time(),
        size=(WIDTH, HEIGHT),
        curves=_sections(facts),
        time_curve=curves("Seconds an epoch", "seconds", dict(zip(SECONDS, SECONDS, strict=True)), seconds),
        settled=_settled(records),
        before_after=pairs(records, facts.evaluated),
        extremes=extremes(records),
        figures=figures(records),
        targets=(judged := targets.newest(records)),
        target_words=targets.of_targets(judged[1]) if judged else "",
        target_rows=targets.rows(judged[1]) if judged else (),
        target_chart=_data_url("image/png", judged[2]) if judged else "",
        usage=usage(config, "peft" if config.prompts.path is None else "diffusers", config.model.path, known["lora"]),
        quote=shlex.quote,
        alike=alike,
        settings_file=_data_url("text/yaml", facts.settings().encode()),
    )
    return without_passwords(page).encode()


def _settled(records: Records) -> dict[str, Any] | None:
    """Where the reward is settled, if objective.window=auto asked for it."""
    known = records.about.get("settled")
    return {**known, "svg": profile(known)} if known else None


def _shown(value: Any) -> Any:
    """Texts of others, line by line; markup is our own."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return "\n".join(short(printable(line)) for line in value.split("\n"))


def _sections(facts: Facts) -> dict[str, list[Diagram]]:
    """Diagrams by what they are about; without those that have no data."""
    lines, labels = facts.lines, dict[str, str]()
    for prefix, words in (("reward_mean/", "Part of the reward"), ("eval_reward_mean/", "Held-out reward")):
        for key in dict.fromkeys(key for line in lines for key in line if key.startswith(prefix)):
            labels.setdefault(key.removeprefix(prefix), words)
    after = [epoch for epoch in facts.evaluated if epoch != BEFORE][:: -max(1, -(-len(facts.evaluated) // INTERVALS))]
    changes = [change for epoch in after if (change := facts.changes(epoch).get("")) and change.low <= change.high]
    intervals = [(change.epoch, change.before + change.low, change.before + change.high) for change in changes]
    rewards = [curves("Reward", "raw reward", REWARD, lines, intervals)] + [
        curves(f"{words}: {label}", "raw reward", {f"{key}/{label}": kind for key, kind in REWARD.items()}, lines)
        for label, words in labels.items()
    ]
    share = "reward_share/"
    parts = {key: key.removeprefix(share) for line in lines for key in line if key.startswith(share)}
    rewards.append(curves("Parts of the reward's variance", "share, of what is trained on", parts, lines))
    betas = {line.get("beta") for line in lines} - {None}
    learning = [curves(*diagram, lines) for diagram in LEARNING if diagram[0] != BETA or len(betas) > 1]
    diversity = [curves(*diagram, lines) for diagram in DIVERSITY]
    sections = {"Reward": rewards, "Target": _target(lines), "Diversity": diversity, "Learning": learning}
    drawn = {name: [diagram for diagram in diagrams if diagram] for name, diagrams in sections.items()}
    return {name: diagrams for name, diagrams in drawn.items() if diagrams}


def _target(lines: Sequence[Line]) -> list[Diagram | None]:
    """Of evaluation/certificate.py's figures, under eval_...; bars of the last evaluation."""
    known = [line for line in lines if line.get("eval_nats") is not None]
    after = [line for line in known if line["epoch"] != BEFORE]
    bounded = [line for line in known if line.get("eval_gap_low") is not None and line.get("eval_gap_high") is not None]
    chosen = bounded[:: -max(1, -(-len(bounded) // INTERVALS))]
    intervals = [(line["epoch"] + 1, line["eval_gap_low"], line["eval_gap_high"]) for line in chosen]
    diagrams = [curves("Gap to the target", "nats", {"eval_gap": "fixed images"}, known, intervals, goal=0.0)]
    diagrams += [curves(*diagram, known) for diagram in TARGET] if after else []
    parts = (after[-1].get("eval_nats_by_transition") or ()) if after else ()
    words = f"nats, after epoch {after[-1]['epoch'] + 1}" if after else ""
    return [*diagrams, bars("Nats by transition", words, "all", parts, "transition")]


def extremes(records: Records) -> tuple[list[Prompt], int, int]:
    """Best, median and worst trajectory of each of the PROMPTS prompts with most trajectories in the last epochs, and
    the first and last of these epochs. Empty without thumbnails."""
    tables = {}
    for epoch in [line["epoch"] for line in records.lines if line["epoch"] != BEFORE][-LAST_EPOCHS:]:
        try:
            table = records.trajectories(epoch, "prompt", "reward", "thumbnail_png").to_pandas(ignore_metadata=True)
            if len(good := table[np.isfinite(table["reward"].astype(float))]):
                tables[epoch + 1] = good
        except StorageError as error:
            records.warn(f"{error}; its pictures are left out")
    groups = pd.concat(tables.values()).groupby("prompt", sort=False) if tables else ()
    prompts = []
    for text, rows in sorted(groups, key=lambda group: -len(group[1]))[:PROMPTS]:  # of equal ones those met first
        count = len(rows)
        labels = ["the only one"] if count == 1 else ["best", "median", "worst"][:: 2 if count == 2 else 1]
        places = np.linspace(count - 1, 0, len(labels)).astype(int)  # the median is the lower one of two
        chosen = rows.sort_values("reward", kind="stable").iloc[places]
        shown = []
        for label, reward, content in zip(labels, chosen["reward"], chosen["thumbnail_png"], strict=True):
            with contextlib.suppress(*UNREADABLE), Image.open(io.BytesIO(content), formats=["PNG"]) as picture:
                shown.append(Picture(label, _jpeg(picture), reward))
        prompts += [Prompt(short(text, PROMPT), [shown], count)] if shown else []
    return prompts, min(tables, default=0), max(tables, default=0)


def pairs(records: Records, evaluated: Sequence[int]) -> list[Prompt]:
    """The first images of the fixed evaluation set, before training and after the last evaluated epoch, by prompt.
    Empty without evaluations or sheets of them."""
    prompts: list[str] = []
    columns: list[list[Picture]] = []
    for epoch in [epoch for epoch in reversed(evaluated) if epoch in (BEFORE, evaluated[-1])]:
        label = "before" if epoch == BEFORE else f"after epoch {epoch + 1}"
        try:
            table = records.evaluation(epoch)
            with Image.open(io.BytesIO(records.sheet(epoch))) as sheet:
                cut = tiles(sheet, len(table["prompt"][:SHEET_IMAGES]))
        except StorageError as error:
            records.warn(f"{error}; its pictures are left out")
            continue
        shown = [Picture(label, _jpeg(tile), reward) for tile, reward in zip(cut, table["reward"], strict=False)]
        prompts = prompts or table["prompt"][: len(shown)]
        if table["prompt"][: len(shown)] == prompts:  # else they are no pairs
            columns.insert(0, shown)
    groups: dict[str, list[list[Picture]]] = {}
    for prompt, *row in zip(prompts, *columns, strict=True):
        groups.setdefault(prompt, []).append(row)
    return [Prompt(short(text, PROMPT), rows) for text, rows in groups.items()]


def _jpeg(picture: Image.Image) -> str:
    """Data URL of a picture, no larger than SIDE pixels: lossy, to look at."""
    small, file = picture.convert("RGB"), io.BytesIO()
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    small.save(file, "JPEG", quality=QUALITY, subsampling=0, optimize=True)
    return _data_url("image/jpeg", file.getvalue())


def _data_url(kind: str, content: bytes) -> Markup:
    """A file within the page."""
    return Markup(f"data:{kind};base64,{base64.b64encode(content).decode()}")
