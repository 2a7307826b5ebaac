"""Compares adapters on the same prompts and noise: `python -m learner.compare RUN_OR_LORA... [key=value ...]`.

Judges what is not judged yet, and writes into --out two tables (comparison.md, .json), of adapters and of the
differences of every two on the same noise; pareto.png (reward against diversity and drift) and sheet.png (the same
noise, base model and every adapter side by side).
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
from commands.outcome import require_writable
from evaluation import image_sets, metrics
from evaluation.adapters import Target
from learner.config import ConfigError
from records.storage import Storage, StorageError
from reports.model_card import plain
from reports.summary import alike

FILE = "comparison"
COLUMNS = ("accuracy", "vendi", "distance", "fid")
Figure = dict[str, Any]  # as of image_sets.compare


def require_alike(targets: Sequence[Target]) -> None:
    """Raises a ConfigError where two were not to be judged on the same pictures or by the same rewards; it says which
    setting to give."""
    first, *others = [(target.name, target.sets()["base"].facts) for target in targets]
    for name, facts in others:
        if key := next((key for key in facts if facts[key] != first[1][key]), None):
            remedy = "--prompts FILE" if key == "prompts" else f"{key}=..."
            values = "" if key == "prompts" else f" {first[1][key]} and {facts[key]}"
            raise ConfigError(f"{key}:{values} differ between {first[0]} and {name}; give {remedy} for all")


def require_own(targets: Sequence[Target], out: Storage) -> None:
    """Raises a ConfigError where the folder holds another comparison than the one to be written."""
    if out.exists(f"{FILE}.json"):
        try:
            there = json.loads(out.read(f"{FILE}.json"))["of"]
        except (StorageError, ValueError, KeyError, TypeError):
            there = None
        if there != _of(targets):
            raise ConfigError(f"{out} holds another comparison: name another folder with --out, or remove that one")


def _of(targets: Sequence[Target]) -> list[str]:
    """What tells this comparison from others."""
    return sorted(target.sets()["tuned"].name for target in targets)


def pairs(judged: Sequence[Judged]) -> list[dict[str, Any]]:
    """Of every two adapters the differences on the same prompts and noise, the second's less the first's: {of, than,
    figure, difference, low, high}, with 95 % intervals."""
    sets = [(result.target.name, image_sets.read_images(result.sets["tuned"])) for result in judged]
    found = []
    for (one, first), (two, second) in itertools.combinations(sets, 2):
        values = {"reward": (first.rewards, second.rewards)}
        values |= {label: (first.held_out[label], second.held_out[label]) for label in first.held_out}
        figures = {
            label: (metrics.mean_of_good(now - was), *metrics.paired_interval(was, now, first.prompts))
            for label, (was, now) in values.items()
        }
        if first.features is not None and second.features is not None:
            figures["distance"] = metrics.distance(second.features, first.prompts, first.features)
        found += [
            {"of": two, "than": one, "figure": label, **dict(zip(("difference", "low", "high"), numbers, strict=True))}
            for label, numbers in figures.items()
            if numbers[1] <= numbers[2]  # an interval is known
        ]
    return found


def differences(found: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line a difference, and how many there are to be right by chance."""
    if not found:
        return ""
    rows = ["| difference | of | less | [95 %] |", "| --- | --- | --- | --- |"]
    for each in found:
        by, low, high = alike(each["difference"], each["low"], each["high"])
        rows.append(f"| {plain(each['figure'])} | {plain(each['of'])} | {plain(each['than'])} | {by} [{low}, {high}] |")
    count, chance = len(found), 1 - metrics.LEVEL
    plural = "s" * (count > 1)
    return "\n".join(rows) + (
        f"\n\n{count} comparison{plural} on the same prompts and noise, each by itself at {metrics.LEVEL:.0%}: about "
        f"{count * chance:.2g} of so many would exclude 0 by chance alone.\n"
    )


def table(judged: Sequence[Judged]) -> str:
    """Markdown: a line an adapter, best reward first; a last one of the base model; why figures are absent."""
    held_out = list(judged[0].figures["held_out"])
    head = ["adapter", "reward", "gain [95 %]", *map(plain, held_out), "accuracy", "Vendi", "distance", "drift (fid)"]
    devices = "GPU" if any(result.figures.get("gpus") for result in judged) else "CPU"
    head += ["trajectories", f"{devices} seconds"]
    rows = [head, ["---"] * len(head)]

    def columns(figures: Figure) -> list[Figure | None]:
        return [*(figures["held_out"][label] for label in held_out), *(figures[name] for name in COLUMNS)]

    def reward(result: Judged) -> float:
        return float("-inf") if (value := result.figures["reward"]["value"]) is None else value

    for figures, name in [(result.figures, result.target.name) for result in sorted(judged, key=reward, reverse=True)]:
        figure, cells = figures["reward"], [_with_interval(figure) if figure else "-" for figure in columns(figures)]
        cells = [plain(name), number(figure["value"]), _with_interval(figure, "gain", "gain_low", "gain_high"), *cells]
        rows.append([*cells, str(figures.get("trajectories_trained", "-")), number(_cost(figures))])
    base = judged[0].figures
    cells = [number(figure["base"]) if figure else "-" for figure in columns(base)]
    rows.append(["base model", number(base["reward"]["base"]), "", *cells, "0", "0"])
    given = "{images} images of {prompts} prompts, noise seed {seed}, features {features}"
    about = [given.format(**base["settings"])]
    about += [f"no {name}: {why}" for result in judged for name, why in result.figures["absent"].items()]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + f"\n\n{'; '.join(dict.fromkeys(about))}\n"


def pareto(judged: Sequence[Judged]) -> bytes:
    """PNG: reward against diversity (best: top right) and against drift (best: top left), with 95 % intervals."""
    from matplotlib.figure import Figure as Picture

    picture = Picture(figsize=(11, 5), layout="constrained")
    # Not the Vendi score of all pictures: prompts stay apart where each has collapsed.
    panels = {"distance": "diversity within a prompt (mean distance)", "fid": "drift from the base model (Frechet)"}
    for axes, (key, title) in zip(picture.subplots(1, 2, sharey=True), panels.items(), strict=True):
        axes.set(xlabel=title, ylabel=f"reward ({judged[0].target.config.reward.name})".replace("$", r"\$"))
        axes.grid(alpha=0.25)
        known = [result for result in judged if result.figures[key] and result.figures["reward"]["value"] is not None]
        if not known:
            axes.text(0.5, 0.5, "not known", ha="center", transform=axes.transAxes)
            continue
        for result in known:
            values = result.figures[key], result.figures["reward"]
            x, y = ([figure["value"]] for figure in values)
            xerr, yerr = (
                [[f["value"] - f["low"]], [f["high"] - f["value"]]] if f["low"] is not None else None for f in values
            )
            axes.errorbar(x, y, yerr, xerr, "o", elinewidth=1, capsize=2, label=_label(result))
        base = judged[0].figures
        axes.plot([base[key]["base"]], [base["reward"]["base"]], "k*", markersize=11, label="base model")
    picture.legend(*picture.axes[-1].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    picture.savefig(file := io.BytesIO(), format="png", dpi=120)
    return file.getvalue()


def _label(result: Judged) -> str:
    return result.target.name.replace("$", r"\$")  # no mathematics


def _cost(figures: Figure) -> float | None:
    """Seconds of the training epochs times the devices of the cluster."""
    devices = figures.get("gpus") or figures.get("cpus")
    return figures["seconds"] * devices if devices and figures.get("seconds") is not None else None


def _with_interval(figure: Figure, value: str = "value", low: str = "low", high: str = "high") -> str:
    return f"{number(figure[value])} [{number(figure[low])}, {number(figure[high])}]"


def write(judged: Sequence[Judged], out: Path) -> None:
    """Raises a StorageError if the folder cannot be written."""
    from reports import pictures

    storage, found = Storage(str(out)), pairs(judged)
    text = f"{table(judged)}\n{differences(found)}"
    sheets = [judged[0].sets["base"], *(result.sets["tuned"] for result in judged)]
    names = ["base", *(result.target.name for result in judged)]
    storage.write("sheet.png", pictures.png(pictures.side_by_side(sheets, names)))
    storage.write("pareto.png", pareto(judged))
    tree = {"of": _of([result.target for result in judged]), "comparisons": len(found), "differences": found}
    tree |= {"adapters": [result.figures for result in judged]}
    storage.write(f"{FILE}.json", (json.dumps(tree, indent=1) + "\n").encode())
    storage.write(f"{FILE}.md", text.encode())
    print(f"\n{text}\n{storage}/{FILE}.md, pareto.png, sheet.png", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = evaluate.parser("compare", __doc__.splitlines()[0], f"folder for table and pictures (default: {FILE})")
    args = parser.parse_intermixed_args(arguments)
    out, args.out = args.out or Path(FILE), None

    def require(targets: Sequence[Target]) -> None:
        require_writable("--out", out, folder=True)
        require_alike(targets)
        require_own(targets, Storage(str(out)))

    return evaluate.run("compare", args, lambda judged: write(judged, out), require)
