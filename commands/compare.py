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

import matplotlib

matplotlib.use("Agg")  # no display on a server
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from commands import evaluate
from commands.evaluate import Judged
from evaluation.adapters import Target
from learner.config import ConfigError
from records.storage import Storage
from reports import pictures

FILE = "comparison"
COLUMNS = ("accuracy", "vendi", "distance", "fid")
COLOURS = ("#2f7ed8", "#e07b39", "#3a9d6e", "#b0518c", "#8a7a2f", "#5b6bbf", "#c0433f", "#4aa5a8")


def require_alike(targets: Sequence[Target]) -> None:
    """
    Raises:
        ConfigError: two were not to be judged on the same pictures or by the same rewards; says which setting to give.
    """
    first = targets[0]
    for other in targets[1:]:
        for section, keys in (
            ("evaluation", ("images", "seed", "held_out", "features", "clip")),
            ("sampler", ("chunk_size", "steps", "guidance", "eta", "grid")),
            ("reward", ("name", "weights", "options", "backend")),
            ("model", ("path", "dtype")),
        ):
            for key in keys:
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
    head = ["adapter", "reward", "gain [95 %]", *held_out, "accuracy", "Vendi", "distance", "drift (fid)"]
    head += ["trajectories", _unit(judged)]
    rows = [head, ["---"] * len(head)]
    for one in sorted(judged, key=lambda one: -_value(one.figures["reward"])):
        figures, reward = one.figures, one.figures["reward"]
        rows.append([
            one.target.name, _number(reward["value"]),
            f"{reward['gain']:+.3g} [{_number(reward['gain_low'])}, {_number(reward['gain_high'])}]",
            *(_of(figures["held_out"][label]) for label in held_out),
            *(_of(figures[name]) for name in COLUMNS),
            str(figures.get("trajectories_trained", "-")), _number(_cost(figures)),
        ])  # fmt: skip
    base = judged[0].figures
    others = [base["held_out"][label] for label in held_out] + [base[name] for name in COLUMNS]
    plain = [_number(figure and figure["base"]) for figure in others]
    rows.append(["base model", _number(base["reward"]["base"]), "", *plain, "0", "0"])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def pareto(judged: Sequence[Judged]) -> bytes:
    """PNG: reward against diversity, drift, trajectories and cost, with 95 % intervals. The best corner is top right,
    of drift and cost top left."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    axes = figure.subplots(2, 2)
    # Not the Vendi score of all pictures: prompts stay apart where each has collapsed.
    _scatter(axes[0][0], judged, "distance", "diversity within a prompt (mean distance; right is better)")
    _scatter(axes[0][1], judged, "fid", "drift from the base model (Frechet distance; left is better)")
    costs = (
        (axes[1][0], "trajectories sampled", lambda f: f.get("trajectories_trained")),
        (axes[1][1], _unit(judged), _cost),
    )
    for ax, title, of in costs:
        known = [(index, one, x) for index, one in enumerate(judged) if (x := of(one.figures)) is not None]
        if not known:
            ax.text(0.5, 0.5, "not known of a LoRA alone", ha="center", transform=ax.transAxes)
        for index, one, x in known:
            _point(ax, index, one, x, None)
        ax.plot([0], [judged[0].figures["reward"]["base"]], marker="*", color="black", markersize=11, linestyle="")
        ax.set_xlabel(title)
    for ax in (axes[0][0], axes[1][0]):
        ax.set_ylabel(f"reward ({judged[0].target.config.reward.name})")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return file.getvalue()


def _scatter(ax: Axes, judged: Sequence[Judged], name: str, title: str) -> None:
    for index, one in enumerate(judged):
        if (figure := one.figures[name]) is not None:
            _point(ax, index, one, figure["value"], figure)
    base = judged[0].figures
    if base[name] is not None:
        ax.plot([base[name]["base"]], [base["reward"]["base"]], marker="*", color="black", markersize=11, linestyle="",
                label="base model")  # fmt: skip
    ax.set_xlabel(title)


def _point(ax: Axes, index: int, one: Judged, x: float, figure: dict[str, float] | None) -> None:
    reward, colour = one.figures["reward"], COLOURS[index % len(COLOURS)]
    spread = None if figure is None or figure["low"] is None else [[x - figure["low"]], [figure["high"] - x]]
    y = reward["value"]
    ax.errorbar(
        [x], [y], xerr=spread, yerr=[[y - reward["low"]], [reward["high"] - y]],
        marker="o", markersize=7, color=colour, elinewidth=1, capsize=2, linestyle="", label=one.target.name,
    )  # fmt: skip
    ax.grid(alpha=0.25)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def _unit(judged: Sequence[Judged]) -> str:
    return "GPU seconds" if any(one.figures.get("gpus") for one in judged) else "CPU seconds"


def _cost(figures: dict[str, Any]) -> float | None:
    """Seconds of the training epochs times the devices of the cluster."""
    devices = figures.get("gpus") or figures.get("cpus")
    return figures["seconds"] * devices if devices and "seconds" in figures else None


def _value(figure: dict[str, float | None]) -> float:
    return float("-inf") if figure["value"] is None else figure["value"]


def _of(figure: dict[str, float | None] | None) -> str:
    return (
        "-" if figure is None else f"{_number(figure['value'])} [{_number(figure['low'])}, {_number(figure['high'])}]"
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def write(judged: Sequence[Judged], out: Path) -> None:
    """
    Raises:
        StorageError: the folder cannot be written.
    """
    storage = Storage(str(out))
    text = table(judged)
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
