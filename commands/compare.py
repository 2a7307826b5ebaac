"""Compares adapters: `python -m learner.compare RUN_OR_LORA... [key=value ...]`. Judges what is not judged yet, all on
the same prompts and noise, and writes into --out a table (comparison.md, .json), pareto.png (reward against diversity,
drift and cost) and sheet.png (the same noise, base model and every adapter side by side).
"""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from commands import evaluate
from commands.evaluate import Judged, number
from evaluation.adapters import Target
from learner.config import ConfigError
from records.storage import Storage

FILE = "comparison"
COLUMNS = ("accuracy", "vendi", "distance", "fid")
COLOURS = ("#2f7ed8", "#e07b39", "#3a9d6e", "#b0518c", "#8a7a2f", "#5b6bbf", "#c0433f", "#4aa5a8")
Figure = dict[str, Any]  # as of image_sets.compare


def require_alike(targets: Sequence[Target]) -> None:
    """
    Raises:
        ConfigError: two were not to be judged on the same pictures or by the same rewards; says which setting to give.
    """
    first, *others = [(target.name, target.sets()["base"].facts) for target in targets]
    for name, facts in others:
        if key := next((key for key in facts if facts[key] != first[1][key]), None):
            remedy = "--prompts FILE" if key == "prompts" else f"{key}=..."
            values = "" if key == "prompts" else f" {first[1][key]} and {facts[key]}"
            raise ConfigError(f"{key}:{values} differ between {first[0]} and {name}; give {remedy} for all")


def table(judged: Sequence[Judged]) -> str:
    """Markdown: a line an adapter, best reward first; a last one of the base model."""
    held_out = list(judged[0].figures["held_out"])
    head = ["adapter", "reward", "gain [95 %]", *held_out, "accuracy", "Vendi", "distance", "drift (fid)"]
    head += ["trajectories", _unit(judged)]
    rows = [head, ["---"] * len(head)]

    def columns(figures: Figure) -> list[Figure | None]:
        return [*(figures["held_out"][label] for label in held_out), *(figures[name] for name in COLUMNS)]

    def reward(result: Judged) -> float:
        return float("-inf") if (value := result.figures["reward"]["value"]) is None else value

    for figures, name in [(result.figures, result.target.name) for result in sorted(judged, key=reward, reverse=True)]:
        figure, cells = figures["reward"], [_with_interval(figure) if figure else "-" for figure in columns(figures)]
        cells = [name, number(figure["value"]), _with_interval(figure, "gain", "gain_low", "gain_high"), *cells]
        rows.append([*cells, str(figures.get("trajectories_trained", "-")), number(_cost(figures))])
    base = judged[0].figures
    cells = [number(figure["base"]) if figure else "-" for figure in columns(base)]
    rows.append(["base model", number(base["reward"]["base"]), "", *cells, "0", "0"])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def pareto(judged: Sequence[Judged]) -> bytes:
    """PNG: reward against diversity, drift, trajectories and cost, with 95 % intervals. The best corner is top right,
    of drift and cost top left."""
    from matplotlib.figure import Figure as Picture

    picture = Picture(figsize=(11, 8), layout="constrained")
    panels = (
        # Not the Vendi score of all pictures: prompts stay apart where each has collapsed.
        ("diversity within a prompt (mean distance; right is better)", lambda figures: figures["distance"]),
        ("drift from the base model (Frechet distance; left is better)", lambda figures: figures["fid"]),
        ("trajectories sampled", lambda figures: _exact(figures.get("trajectories_trained"))),
        (_unit(judged), lambda figures: _exact(_cost(figures))),
    )
    for axes, (title, figure_of) in zip(picture.subplots(2, 2).flat, panels, strict=True):
        axes.set_xlabel(title)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        for result, colour in zip(judged, itertools.cycle(COLOURS)):
            reward, x = result.figures["reward"], figure_of(result.figures)
            if x is None:
                axes.text(0.5, 0.5, "not known", ha="center", transform=axes.transAxes)
                continue
            axes.errorbar(
                [x["value"]], [reward["value"]], xerr=_bar(x), yerr=_bar(reward), color=colour, marker="o",
                elinewidth=1, capsize=2, linestyle="", label=result.target.name,
            )  # fmt: skip
        if x := figure_of(judged[0].figures):
            star = {"marker": "*", "color": "black", "markersize": 11, "linestyle": "", "label": "base model"}
            axes.plot([x["base"]], [judged[0].figures["reward"]["base"]], **star)
    for axes in (picture.axes[0], picture.axes[2]):
        axes.set_ylabel(f"reward ({judged[0].target.config.reward.name})")
    picture.legend(*picture.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    picture.savefig(file := io.BytesIO(), format="png", dpi=120)
    return file.getvalue()


def _bar(figure: Figure) -> list[list[float]] | None:
    """Lengths of an error bar to both sides; None without an interval."""
    value, low, high = figure["value"], figure["low"], figure["high"]
    return None if low is None else [[value - low], [high - value]]


def _exact(value: float | None) -> Figure | None:
    """A figure without an interval; the base model has 0 of it."""
    return None if value is None else {"value": value, "low": None, "high": None, "base": 0}


def _unit(judged: Sequence[Judged]) -> str:
    return "GPU seconds" if any(result.figures.get("gpus") for result in judged) else "CPU seconds"


def _cost(figures: Figure) -> float | None:
    """Seconds of the training epochs times the devices of the cluster."""
    devices = figures.get("gpus") or figures.get("cpus")
    return figures["seconds"] * devices if devices and "seconds" in figures else None


def _with_interval(figure: Figure, value: str = "value", low: str = "low", high: str = "high") -> str:
    return f"{number(figure[value])} [{number(figure[low])}, {number(figure[high])}]"


def write(judged: Sequence[Judged], out: Path) -> None:
    """
    Raises:
        StorageError: the folder cannot be written.
    """
    from reports import pictures

    storage, text = Storage(str(out)), table(judged)
    sheets = [judged[0].sets["base"], *(result.sets["tuned"] for result in judged)]
    names = ["base", *(result.target.name for result in judged)]
    storage.write("sheet.png", pictures.png(pictures.side_by_side(sheets, names)))
    storage.write("pareto.png", pareto(judged))
    storage.write(f"{FILE}.json", (json.dumps([result.figures for result in judged], indent=1) + "\n").encode())
    storage.write(f"{FILE}.md", text.encode())
    print(f"\n{text}\n{storage}/{FILE}.md, pareto.png, sheet.png", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = evaluate.parser("compare", __doc__.splitlines()[0], f"folder for table and pictures (default: {FILE})")
    args = parser.parse_intermixed_args(arguments)
    out, args.out = args.out or Path(FILE), None
    return evaluate.run("compare", args, lambda judged: write(judged, out), require_alike)
