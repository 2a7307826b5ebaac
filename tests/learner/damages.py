"""What can befall a run's files: for each, what may be found in its place. None: it is gone."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from records.storage import SEAL, sealed

ESCAPES = "\x1b[2J\x1b]0;owned\x07\x9b31m"
DEEP = b"[" * 200_000
REMEDIES = ("copy", "remove", "another", "again", "give ", "use ", "anew", "--step", "left out", "above")


def damages(file: Path) -> dict[str, bytes | None]:
    """By name, of a whole file; those after `flipped` are somebody's who knows how such files are written."""
    whole = file.read_bytes()
    middle = len(whole) // 2
    digit = next((i for i in range(middle, len(whole)) if whole[i : i + 1].isdigit()), middle)
    flipped = whole[:digit] + bytes([whole[digit] ^ 1]) + whole[digit + 1 :]
    found = {"absent": None, "emptied": b"", "truncated": whole[:middle], "flipped": flipped}
    return {**found, **HOSTILE.get(file.suffix, lambda content: {"hostile": b"\x80\x02c" + ESCAPES.encode()})(whole)}


def _changed(value: Any, leaf) -> Any:
    if isinstance(value, dict):
        return {key: _changed(item, leaf) for key, item in value.items()}
    return [_changed(item, leaf) for item in value] if isinstance(value, list) else leaf(value)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _json(whole: bytes) -> dict[str, bytes]:
    tree = json.loads(whole)
    tree.pop(SEAL, None)
    huge = json.dumps(_changed(tree, lambda leaf: "HUGE" if _number(leaf) else leaf)).replace('"HUGE"', "9" * 400)
    nan = json.dumps(_changed(tree, lambda leaf: float("nan") if _number(leaf) else leaf))
    large = _changed(tree, lambda leaf: 2**62 if _number(leaf) else leaf)
    # Keys that hold something: what may be missing is never missed.
    others = {key: {} if isinstance(value, str | list) else ["x"] for key, value in tree.items() if value is not None}
    escapes = _changed(tree, lambda leaf: leaf + ESCAPES if isinstance(leaf, str) else leaf)
    forged = {"types": sealed(others), "escapes": sealed(escapes), "large": sealed(large), "nothing": sealed({})}
    return {"deep": DEEP, "huge": huge.encode(), "NaN": nan.encode(), "list": b"[1]", **forged}


def _lines(whole: bytes) -> dict[str, bytes]:
    found: dict[str, list[bytes]] = {}
    for line in whole.splitlines():
        for name, content in _json(line).items():
            found.setdefault(name, []).append(
                json.dumps(json.loads(content)).encode() if content[:1] == b"{" else content
            )
    return {name: b"\n".join(lines) + b"\n" for name, lines in found.items()} | {"twice": whole + whole}


def _parquet(whole: bytes) -> dict[str, bytes]:
    table, found = pq.read_table(io.BytesIO(whole)), {"other": b"PAR1" + DEEP[:1000] + b"PAR1"}
    words = pa.table({name: ["x" + ESCAPES] * table.num_rows for name in table.column_names})
    words = words.set_column(words.column_names.index("prompt"), "prompt", table["prompt"])
    for name, forged in (("types", words), ("no rows", table.slice(0, 0)), ("no columns", table.select(["prompt"]))):
        pq.write_table(forged, file := io.BytesIO())
        found[name] = file.getvalue()
    return found


def _png(whole: bytes) -> dict[str, bytes]:
    Image.new("RGB", (8, 8)).save(gif := io.BytesIO(), "GIF")
    Image.new("1", (20_000, 20_000)).save(bomb := io.BytesIO(), "PNG")
    return {"other": gif.getvalue(), "bomb": bomb.getvalue()}


def _yaml(whole: bytes) -> dict[str, bytes]:
    changed = whole.replace(b"guidance:", b"guidance: 9 #", 1)
    assert changed != whole
    return {"deep": DEEP[:20_000], "types": b"run: 3\nmodel: [x]\n", "changed": changed, "binary": b"\xff\xfe\0"}


HOSTILE = {".json": _json, ".jsonl": _lines, ".parquet": _parquet, ".png": _png, ".yaml": _yaml}
