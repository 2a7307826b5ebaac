"""Writes docs/settings.md from the schema: `python docs/site/settings.py`. A test holds the page equal to it."""

from __future__ import annotations

import sys
import typing
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "settings.md"
HEAD = """# Settings

Every `section.key`, as `python -m learner.run --help` lists them. Give them as `section.key=value` on the command line,
or as YAML with `--config`. Defaults are those without any file; a bare command runs `configs/shapes_alignment.yaml`,
which sets many, and `python -m learner.run --print-config` says what a command comes to. This page is written by
`python docs/site/settings.py`.
"""
KINDS = """
## Defaults by objective

Where a key is not given, `objective.kind` and `objective.setting` change these defaults (`learner/objectives/`):

| `objective.kind` | `objective.setting` | defaults |
|---|---|---|
"""


def page() -> str:
    """docs/settings.md as it should be."""
    from learner.config import known_keys
    from learner.objectives.needs import NEEDS

    parts, section = [HEAD], ""
    for key, field in known_keys().items():
        if key.split(".")[0] != section:
            section = key.split(".")[0]
            parts.append(f"\n## {section}\n\n| key | type | default | meaning |\n|---|---|---|---|\n")
        default = _value(field.get_default(call_default_factory=True))
        parts.append(f"| `{key}` | {_kind(field.annotation)} | {default} | {_cell(field.description or '')} |\n")
    parts.append(KINDS)
    for kind, objective in NEEDS.items():
        for setting, changes in objective.defaults.items():
            said = ", ".join(f"`{key}: {_plain(value)}`" for key, value in changes.items()) or "as above"
            parts.append(f"| `{kind}` | `{setting}` | {said} |\n")
    return "".join(parts)


def _kind(annotation: Any) -> str:
    """Name of a key's type; of a choice its words."""
    if annotation is type(None):
        return "null"
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        return ", ".join(f"`{word}`" for word in typing.get_args(annotation))
    if origin in (list, tuple):
        return "list"
    if origin is dict:
        return "keys and values"
    if origin is not None:
        return " or ".join(_kind(part) for part in typing.get_args(annotation))
    return {"str": "text", "bool": "true, false", "int": "integer", "float": "number"}[annotation.__name__]


def _value(value: Any) -> str:
    return f"`{_plain(value)}`"


def _plain(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_plain, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    PAGE.write_text(page(), encoding="utf-8")
