"""The GPU day's report: one JSON file and the same as a Markdown table beside it, whole at every moment."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def begin(names: Sequence[str], budget: float, tiny: bool) -> dict[str, Any]:
    """Where nothing is done yet."""
    empty: dict[str, Any] = {"status": "not begun", "figures": {}, "checks": {}}
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "budget_seconds": budget, "tiny": tiny, "seconds": 0.0,
        "hardware": {}, "versions": {}, "git_commit": "",
        "parts": {name: json.loads(json.dumps(empty)) for name in names},
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
    lines = [
        f"# {report['date'][:16]} {place}{memory}",
        "",
        f"{', '.join([*drivers, *tools])}; commit {report['git_commit'] or 'unknown'}; "
        f"{report['seconds']:.0f} of {report['budget_seconds']:.0f} s",
        *([""] + ["**Tiny networks: the figures mean nothing.**"]) * report["tiny"],
        "",
        "| part | result | s | checks and figures |",
        "|---|---|---|---|",
    ]
    for name, entry in report["parts"].items():
        result = entry["status"] + (f": {_cell(entry['reason'])}" if entry.get("reason") else "")
        shown = [_check(*item) for item in entry["checks"].items()]
        shown += [f"{key} {_number(value)}" for key, value in flat(entry["figures"])]
        seconds = f"{entry['seconds']:.1f}" if "seconds" in entry else ""
        lines.append(f"| {name} | {result} | {seconds} | {'<br>'.join(map(_cell, shown))} |")
    return "\n".join(lines)


def flat(figures: dict[str, Any], before: str = "") -> list[tuple[str, Any]]:
    """Names and figures of nested groups; lists, which are rounds, stay in the JSON file."""
    found: list[tuple[str, Any]] = []
    for name, value in figures.items():
        if isinstance(value, dict):
            found += flat(value, f"{before}{name}: ")
        elif not isinstance(value, list):
            found.append((f"{before}{name}", value))
    return found


def _check(name: str, check: dict[str, Any]) -> str:
    return f"{'' if check['passed'] else '**FAILED** '}{name} {_number(check['value'])} (limit {check['limit']:g})"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
