"""Compares adapters: `python -m learner.compare RUN_OR_LORA... [key=value ...]`. Judges what is not judged yet, all on
the same prompts and noise, and writes into --out a table (comparison.md, .json), pareto.png (reward against diversity,
drift and cost) and sheet.png (the same noise, base model and every adapter side by side).
"""

from __future__ import annotations

import io
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
SAME = {  # settings that adapters must share to be compared
    "evaluation": ("images", "seed", "held_out", "features", "clip"),
    "sampler": ("chunk_size", "steps", "guidance", "eta", "grid"),
    "reward": ("name", "weights", "options", "backend"),
    "model": ("path", "dtype"),
}


def require_alike(targets: Sequence[Target]) -> None:
    """
    Raises:
        ConfigError: two were not to be judged on the same pictures or by the same rewards; says which setting to give.
    """
    first = targets[0]
    for other in targets[1:]:
        for section, key in ((section, key) for section, keys in SAME.items() for key in keys):
            one, two = (getattr(getattr(target.config, section), key) for target in (first, other))
            if one != two:
                raise ConfigError(
                    f"{section}.{key}: {one} in {first.name}, {two} in {other.name}: not to be compared; "
                    f"give {section}.{key}=... for all"
                )
        if first.prompts != other.prompts:
            raise ConfigError(f"prompts: {first.name} and {other.name} have others; give --prompts FILE for all")


def table(judged: Sequence[Judged]) -> str:
    """Markdown: a line an adapter, best reward first; a last one of the base model."""
    held_out = list(judged[0].figures["held_out"])
    head = ["adapter", "reward", "gain [95 %]", *held_out, "accuracy", "Vendi", "distance", "drift (fid)",
            "trajectories", _unit(judged)]  # fmt: skip
    rows = [head, ["---"] * len(head)]

    def columns(figures: dict[str, Any]) -> list[dict[str, Any] | None]:
        return [*(figures["held_out"][label] for label in held_out), *(figures[name] for name in COLUMNS)]

    def reward(one: Judged) -> float:
        return float("-inf") if (value := one.figures["reward"]["value"]) is None else value

    for one in sorted(judged, key=reward, reverse=True):
        figure, trajectories = one.figures["reward"], one.figures.get("trajectories_trained", "-")
        gain = f"{figure['gain']:+.3g} [{number(figure['gain_low'])}, {number(figure['gain_high'])}]"
        rows.append([
            one.target.name, number(figure["value"]), gain, *map(_with_interval, columns(one.figures)),
            str(trajectories), number(_cost(one.figures)),
        ])  # fmt: skip
    base = judged[0].figures
    rows.append(["base model", number(base["reward"]["base"]), "",
                 *(number(figure["base"]) if figure else "-" for figure in columns(base)), "0", "0"])  # fmt: skip
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def pareto(judged: Sequence[Judged]) -> bytes:
    """PNG: reward against diversity, drift, trajectories and cost, with 95 % intervals. The best corner is top right,
    of drift and cost top left."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(11, 8), layout="constrained")
    panels = (
        # Not the Vendi score of all pictures: prompts stay apart where each has collapsed.
        ("diversity within a prompt (mean distance; right is better)", [one.figures["distance"] for one in judged]),
        ("drift from the base model (Frechet distance; left is better)", [one.figures["fid"] for one in judged]),
        ("trajectories sampled", [_exact(one.figures.get("trajectories_trained")) for one in judged]),
        (_unit(judged), [_exact(_cost(one.figures)) for one in judged]),
    )
    for axes, (title, figures) in zip(picture.subplots(2, 2).flat, panels, strict=True):
        axes.set_xlabel(title)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        known = [
            (index, one, figure) for index, (one, figure) in enumerate(zip(judged, figures, strict=True)) if figure
        ]
        if not known:
            axes.text(0.5, 0.5, "not known", ha="center", transform=axes.transAxes)
        for index, one, figure in known:
            reward, x = one.figures["reward"], figure["value"]
            axes.errorbar(
                [x], [reward["value"]], yerr=_bar(reward), xerr=None if figure["low"] is None else _bar(figure),
                color=COLOURS[index % len(COLOURS)], marker="o", markersize=7, elinewidth=1, capsize=2, linestyle="",
                label=one.target.name,
            )  # fmt: skip
        if known:
            axes.plot([known[0][2]["base"]], [judged[0].figures["reward"]["base"]], marker="*", color="black",
                      markersize=11, linestyle="", label="base model")  # fmt: skip
    for axes in (picture.axes[0], picture.axes[2]):
        axes.set_ylabel(f"reward ({judged[0].target.config.reward.name})")
    picture.legend(*picture.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    file = io.BytesIO()
    picture.savefig(file, format="png", dpi=120)
    return file.getvalue()


def _bar(figure: dict[str, Any]) -> list[list[float]] | None:
    """Lengths of an error bar to both sides; None without an interval."""
    value, low, high = figure["value"], figure["low"], figure["high"]
    return None if low is None else [[value - low], [high - value]]


def _exact(value: float | None) -> dict[str, Any] | None:
    """A figure without an interval; the base model has 0 of it."""
    return None if value is None else {"value": value, "low": None, "high": None, "base": 0}


def _unit(judged: Sequence[Judged]) -> str:
    return "GPU seconds" if any(one.figures.get("gpus") for one in judged) else "CPU seconds"


def _cost(figures: dict[str, Any]) -> float | None:
    """Seconds of the training epochs times the devices of the cluster."""
    devices = figures.get("gpus") or figures.get("cpus")
    return figures["seconds"] * devices if devices and "seconds" in figures else None


def _with_interval(figure: dict[str, float | None] | None) -> str:
    return "-" if figure is None else f"{number(figure['value'])} [{number(figure['low'])}, {number(figure['high'])}]"


def write(judged: Sequence[Judged], out: Path) -> None:
    """
    Raises:
        StorageError: the folder cannot be written.
    """
    from reports import pictures

    storage, text = Storage(str(out)), table(judged)
    sheets = [judged[0].sets["base"], *(one.sets["tuned"] for one in judged)]
    names = ["base", *(one.target.name for one in judged)]
    storage.write("sheet.png", pictures.png(pictures.side_by_side(sheets, names)))
    storage.write("pareto.png", pareto(judged))
    storage.write(f"{FILE}.json", (json.dumps([one.figures for one in judged], indent=1) + "\n").encode())
    storage.write(f"{FILE}.md", text.encode())
    print(f"\n{text}\n{storage}/{FILE}.md, pareto.png, sheet.png", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = evaluate.parser("compare", __doc__.splitlines()[0], f"folder for table and pictures (default: {FILE})")
    args = parser.parse_intermixed_args(arguments)
    out, args.out = args.out or Path(FILE), None
    return evaluate.run("learner.compare", args, lambda judged: write(judged, out), require_alike)
