"""How far a policy is from its target, in words, and what learner.targets found: table and bar charts."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from records.run_folder import EVALUATION, Records
from records.shapes import TargetJudgement
from records.storage import Storage, StorageError
from records.words import printable, short

PREFIX = "targets-"  # of the files of learner.targets
COLUMNS = 4  # of charts
COLOURS = {"base": "#a7adb5", "target": "#17845a", "tuned": "#2468c4"}


def of_certificate(judgement: dict[str, Any]) -> list[str]:
    """Of a judgement of learner.evaluate, what no row of its table has."""
    found = judgement.get("certificate") or {}
    flat = {name: (judgement.get(name) or {}).get("value") for name in ("gap", "nats")}
    if flat["nats"] is None:
        return [f"gap to the target: not known ({found['no_gap']})"] if found.get("no_gap") else []
    lines = []
    if flat["gap"] is None:
        lines = [f"gap to the target: not known ({found.get('no_gap')})"]
    elif found.get("bound") is not None:
        lines = [f"of any attribute, the law is within {found['bound']:.2g} of the target's (total variation)"]
    lines += [explained] if (explained := _explained(found.get("explained"))) else []
    lines += [f"base pictures of a prompt count as {size:.3g} under the target"] if (size := found.get("ess")) else []
    return [*lines, _bought(flat["nats"], found.get("gain"), found.get("ideal_gain"))]


def of_lines(lines: Sequence[dict[str, Any]]) -> list[str]:
    """Of a run's last evaluation after training began, from metrics.jsonl."""
    known = [line for line in lines if line.get("eval_nats") is not None]
    if len(known) < 2:
        return []
    first, last = known[0], known[-1]
    words = []
    if (gap := last.get("eval_gap")) is not None:
        start = first.get("eval_gap")
        low, high, bound = (last.get(f"eval_{name}") for name in ("gap_low", "gap_high", "bound"))
        text = f"gap to the target: {f'{start:.3g} -> ' if start is not None else ''}{gap:.3g} nats"
        text += f" (95 % interval {low:.3g} to {high:.3g})" if low is not None and high is not None else ""
        text += f"; no attribute's law is further than {bound:.2g} from it" if bound is not None and bound < 1 else ""
        words = [text]
        words += [explained] if (explained := _explained(last.get("eval_explained"))) else []
    elif last.get("eval_no_gap"):
        words = [f"gap to the target: not known ({last['eval_no_gap']})"]
    return [*words, _bought(last["eval_nats"], last.get("eval_gain"), last.get("eval_ideal_gain"))]


def _explained(share: float | None) -> str | None:
    """Of how much of the reward's spread is in the policy."""
    if share is None:
        return None
    if share < 0:
        return "what the policy changed adds to the spread of beta x reward: it moved in ways that are not asked for"
    return f"of the spread of beta x reward among a prompt's pictures, the policy has taken in {share:.0%}"


def _bought(nats: float, gain: float | None, ideal: float | None) -> str:
    text = f"distance from the base model: {nats:.3g} nats"
    if gain is None:
        return text
    if ideal is None:
        return f"{text}, for {gain:+.3g} of reward; these pictures are too few to tell what an ideal tilt has for them"
    return f"{text}, for {gain:+.3g} of reward; an ideal tilt of the base model has {ideal:+.3g} for as many"


def judgements(storage: Storage) -> dict[int, str]:
    """What learner.targets left, evaluation/targets-step-*.json by step, the newest last: that of most pictures."""
    names = storage.entries(EVALUATION)
    found = (re.fullmatch(PREFIX + r"step-(\d+)-(\d+)-images-\w+\.json", name) for name in names)
    places = sorted((int(match[1]), int(match[2]), match[0]) for match in found if match)
    return {step: f"{EVALUATION}/{name}" for step, _, name in places}


def newest(records: Records) -> tuple[int, dict[str, Any], bytes] | None:
    """(policy updates, figures, chart) of the newest that is whole."""
    for step, place in reversed(judgements(records.storage).items()):
        if judged := judgement_in(records, place):
            return step, *judged
    return None


def judgement_in(records: Records, place: str) -> tuple[dict[str, Any], bytes] | None:
    """Figures and chart; None, and a warning, where they are damaged."""
    try:
        figures = records.storage.read_json(place, TargetJudgement, "it is left out; judge again, or remove it")
        return figures, records.picture(place.replace(".json", ".png"))
    except StorageError as error:
        records.warn(f"{error}; it is left out")
        return None


def rows(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """Of each attribute its `name`, the figures `tv` (value, low, high, base, floor, floor_high) and `drift`."""
    return [{"name": law["name"], "tv": law["tv"], "drift": law.get("drift")} for law in figures["attributes"]]


def of_targets(figures: dict[str, Any]) -> str:
    """In a line."""
    moved = next((row for row in rows(figures) if row["name"] == figures.get("given")), None)
    reward, text = figures["reward"], f"against the exact target (beta {figures['beta']:g})"
    text += f": mean reward {_number(reward['value'])}, target's {_number(reward['target'])}"
    if moved:
        tv = moved["tv"]
        text += f"; law of {_name(moved['name'])}: {_number(tv['value'])} from it in total variation, the base model's "
        text += f"{_number(tv['base'])}, noise alone {_number(tv['floor'])}"
    return text + (". " + figures["warning"] if figures.get("warning") else "")


def table(figures: dict[str, Any]) -> str:
    """For a terminal."""
    settings, reward = figures["settings"], figures["reward"]
    lines = [
        f"{_name(figures['name'])}: {settings['images']} images of {settings['prompts']} prompts against the target "
        f"p_ref x exp({figures['beta']:g} x {_name(figures['reward_name'])})",
        f"{figures['base_pictures']} base images count as {figures['ess']:.4g} under it, of the prompt with fewest as "
        f"{figures['ess_least']:.3g}",
        f"{'':28}{'tuned':>8}  {'95 % interval':<18}{'target':>8}  {'95 % interval':<18}{'base':>8}",
    ]
    for name, figure in (("mean reward", reward), ("distance within a prompt", figures.get("distance"))):
        if figure:
            own, aim = _ends(figure, ""), _ends(figure, "target_")
            numbers = f"{_number(figure['value']):>8}  {own:<18}{_number(figure['target']):>8}  {aim:<18}"
            lines.append(f"{name:28}{numbers}{_number(figure['base']):>8}")
    lines.append(f"{'above the target':28}{_number(reward['over']):>8}  {_ends(reward, 'over_')}")
    drifts = f"drift given {_name(figures['given'])}" if len(figures["attributes"]) > 1 else ""
    head = f"{'to the target, law of':28}{'tuned':>8}  {'95 % interval':<18}{'base':>8}  {'noise, up to':<16}"
    lines.append(f"{head}{f'{drifts}; noise, up to' if drifts else ''}".rstrip())
    for row in rows(figures):
        tv, drift = row["tv"], row["drift"]
        text = f"{_name(row['name']):28}{_number(tv['value']):>8}  {_ends(tv, ''):<18}{_number(tv['base']):>8}  "
        text += f"{_noise(tv):<16}"
        text += f"{_number(drift['value'])}; {_noise(drift)}" if drift else ""
        lines.append(text.rstrip())
    return "\n".join(lines)


def chart(figures: dict[str, Any], pictures: Mapping[str, Sequence[np.ndarray]]) -> bytes:
    """PNG: a row of `pictures` [H, W, 3] uint8 of base model, target and tuned model each, and of each attribute its
    law under the three, as bars."""
    from matplotlib.figure import Figure

    every = figures["attributes"]  # those that all pictures have alike say nothing
    laws = [law for law in every if sum(map(any, zip(*(law[key] for key in COLOURS), strict=True))) > 1] or every
    across = min(COLUMNS, len(laws))
    down = -(-len(laws) // across)
    width, most = max(6.0, 3.9 * across), max(map(len, pictures.values()))
    each = width / (most + 1)  # inches of a picture
    whole = Figure(figsize=(width, 3.3 * down + 0.5 + 3.3 * each), layout="constrained")
    heights = (3.3 * each + 0.3, 3.3 * down + 0.2)
    above, below = whole.subfigures(2, 1, squeeze=False, height_ratios=heights)[:, 0]
    for line, name in zip(above.subplots(3, most, squeeze=False), COLOURS, strict=True):
        for axes in line:
            axes.set_axis_off()
        for axes, image in zip(line, pictures[name], strict=False):
            axes.imshow(image)
        line[0].text(-0.15, 0.5, name, transform=line[0].transAxes, ha="right", va="center", fontsize=9)
    picture = below
    panels = picture.subplots(down, across, squeeze=False).ravel()
    for axes, law in zip(panels, laws, strict=False):
        shown = [i for i, shares in enumerate(zip(*(law[key] for key in COLOURS), strict=True)) if any(shares)]
        for place, (key, colour) in enumerate(COLOURS.items()):
            shares = [law[key][i] or 0.0 for i in shown]
            axes.bar([i + 0.27 * (place - 1) for i in range(len(shown))], shares, 0.27, color=colour, label=key)
        names = [short(_plain(law["values"][i]), 16) for i in shown]
        axes.set_xticks(range(len(shown)), names, rotation=40 if sum(map(len, names)) > 24 else 0, fontsize=8)
        tv = law["tv"]
        words = f"tuned {_number(tv['value'])}, base {_number(tv['base'])}, noise {_number(tv['floor'])}"
        axes.set_title(f"{short(_plain(law['name']), 24)}\n{words}", fontsize=9)
        axes.tick_params(axis="y", labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[len(laws) :]:
        axes.set_axis_off()
    handles, labels = panels[0].get_legend_handles_labels()
    picture.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    beta = f"target p_ref x exp({figures['beta']:g} x {_plain(figures['reward_name'])})"
    whole.suptitle(f"{_plain(figures['name'])}, {beta}; total variations to it", fontsize=10)
    whole.savefig(file := io.BytesIO(), format="png", dpi=120)
    return file.getvalue()


def _name(text: str) -> str:
    return short(printable(text), 60)


def _plain(text: str) -> str:
    return _name(text).replace("$", r"\$")  # no mathematics


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _ends(figure: dict[str, Any], name: str) -> str:
    low, high = figure.get(f"{name}low"), figure.get(f"{name}high")
    return f"[{_number(low)}, {_number(high)}]"


def _noise(figure: dict[str, Any]) -> str:
    return f"{_number(figure['floor'])}, {_number(figure['floor_high'])}"
