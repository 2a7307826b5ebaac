"""The GPU day's report: one JSON file and its Markdown tables beside it, whole at every moment."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

SPEED = ("part", "what", "units/s", "TFLOP/s", "of ceiling", "peak GB", "own GB")


def begin(names: Sequence[str], budget: float, tiny: bool) -> dict[str, Any]:
    """Where nothing is done yet."""
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "budget_seconds": budget, "tiny": tiny, "seconds": 0.0,
        "hardware": {}, "versions": {}, "git_commit": "",
        "parts": {name: {"status": "not begun", "reason": "", "figures": {}, "checks": {}} for name in names},
    }  # fmt: skip


def write(report: dict[str, Any], path: Path) -> None:
    """Both files, each replaced as a whole."""
    for place, text in ((path, json.dumps(report, indent=2)), (path.with_suffix(".md"), markdown(report))):
        fresh = place.with_name(f".{place.name}.new")
        fresh.write_text(text + "\n", encoding="utf-8")
        os.replace(fresh, place)


def markdown(report: dict[str, Any]) -> str:
    hardware, versions = report["hardware"], report["versions"]
    place = hardware.get("gpu") or hardware.get("cpu") or "no device was reached"
    memory = f", {hardware['memory_bytes'] / 1e9:.1f} GB" if hardware.get("memory_bytes") else ""
    drivers = [f"{name} {hardware[name]}" for name in ("driver", "CUDA", "cuDNN", "NCCL") if hardware.get(name)]
    tools = [f"{name} {versions[name]}" for name in ("python", "torch", "diffusers") if versions.get(name)]
    parts = report["parts"]
    lines = [
        f"# {report['date'][:16]} {place}{memory}",
        "",
        f"{', '.join([*drivers, *tools])}; commit {report['git_commit'] or 'unknown'}; "
        f"{report['seconds']:.0f} of {report['budget_seconds']:.0f} s",
    ]
    if report["tiny"]:
        lines += ["", "**Tiny networks: the figures mean nothing.**"]
    results = [
        (name, one["status"], one["reason"], f"{one['seconds']:.1f}" if "seconds" in one else "", _checks(one))
        for name, one in parts.items()
    ]
    speeds = [(name, *row) for name, one in parts.items() for row in _speeds(one["figures"])]
    others = [(name, key, _number(value)) for name, one in parts.items() for key, value in _others(one["figures"])]
    lines += _table(("part", "result", "why", "s", "checks"), results)
    lines += _table(SPEED, speeds) + _table(("part", "figure", "value"), others)
    return "\n".join(lines)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return []
    lines = [head, ["---"] * len(head), *rows]
    return ["", *(f"| {' | '.join(' '.join(cell.split()).replace('|', '/') for cell in line)} |" for line in lines)]


def _checks(entry: dict[str, Any]) -> str:
    """Those that failed; else how many there are, and which is nearest to its limit."""
    checks = entry["checks"]
    if failed := [name for name, check in checks.items() if not check["passed"]]:
        return f"FAILED: {', '.join(failed)}"
    if not checks:
        return ""
    near = max(checks, key=lambda name: checks[name]["value"] / (checks[name]["limit"] or 1))
    value, limit = _number(checks[near]["value"]), _number(checks[near]["limit"])
    return f"{len(checks)} passed; nearest to its limit: {near} {value} of {limit}"


def _speeds(figures: dict[str, Any], before: str = "") -> Iterator[tuple[str, ...]]:
    """Of what was timed, in groups or not."""
    for name, one in figures.items():
        if not isinstance(one, dict):
            continue
        if "rate" not in one:
            yield from _speeds(one, f"{before}{name}: ")
            continue
        achieved = f"{one['flops_per_second'] / 1e12:.3g}" if "flops_per_second" in one else ""
        share = f"{one['of_ceiling']:.0%}" if "of_ceiling" in one else ""
        peak = f"{one['peak_bytes'] / 1e9:.2f}" if "peak_bytes" in one else ""
        own = f"{(one['peak_bytes'] - one['resident_bytes']) / 1e9:.2f}" if peak else ""
        rate = "" if one["unit"] == "FLOP" else f"{one['rate']:.4g} {one['unit']}"
        yield f"{before}{name}", rate, achieved, share, peak, own


def _others(figures: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Names and figures of nested groups but those that were timed."""
    for name, value in figures.items():
        if isinstance(value, dict):
            if "rate" not in value:
                yield from _others(value, f"{before}{name}: ")
        else:
            yield f"{before}{name}", value


def _number(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 10**6:
        return f"{value / 1e9:.4g} G"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
