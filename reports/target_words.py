"""In words: how far a policy is from its target, and what its distance from the base model bought."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


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
