"""Prompt files: .txt, .jsonl, .csv and .parquet."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from learner.config import Config, ConfigError, resolve


def read_prompts(path: str, column: str = "prompt", key: str = "prompts.path") -> list[str]:
    """Prompts in file order, stripped; empty ones are skipped, and in .txt lines that start with #.

    .jsonl holds strings or objects with the key `column`; .csv (with a header) and .parquet a column of that name.
    A file with another ending is read as .txt.

    Raises:
        ConfigError: the file cannot be read, is not UTF-8, has no such column, or holds no prompt; names `key`.
    """
    file = Path(resolve(path))
    readers = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
    try:
        found = readers.get(file.suffix.lower(), _text)(file, column)
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{key}: {file} is not UTF-8 (byte {error.start}); convert it, or name another file"
        ) from error
    except (OSError, pa.ArrowException, ValueError) as error:
        raise ConfigError(f"{key}: cannot read {file}: {' '.join(str(error).split())}") from error
    prompts = [prompt.strip() for prompt in found if prompt.strip()]
    if not prompts:
        raise ConfigError(f"{key}: {file} holds no prompt")
    return prompts


def example_prompt(config: Config) -> str:
    """One that the reward is made for, to try batch sizes with.

    Raises:
        ConfigError: as read_prompts.
    """
    return "" if config.prompts.path is None else read_prompts(config.prompts.path, config.prompts.column)[0]


def _text(file: Path, column: str) -> list[str]:
    # Not splitlines(), which also splits at characters that a prompt may hold.
    return [line for line in file.read_text(encoding="utf-8-sig").split("\n") if not line.lstrip().startswith("#")]


def _jsonl(file: Path, column: str) -> list[str]:
    prompts = []
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} is not JSON: {error}") from error
        prompt = item.get(column) if isinstance(item, dict) else item
        if not isinstance(prompt, str):
            keys = f"; its keys: {', '.join(item)}" if isinstance(item, dict) else ""
            raise ValueError(f"line {number} has no text under {column!r} (prompts.column){keys}")
        prompts.append(prompt)
    return prompts


def _csv(file: Path, column: str) -> list[str]:
    file.read_text(encoding="utf-8-sig")  # pyarrow's own message about other encodings names no byte
    options = pa.csv.ConvertOptions(column_types={column: pa.string()}, strings_can_be_null=False)
    return _column(pa.csv.read_csv(file, convert_options=options), column)


def _parquet(file: Path, column: str) -> list[str]:
    table = pa.parquet.read_table(file)
    return _column(table, column)


def _column(table: pa.Table, column: str) -> list[str]:
    if column not in table.column_names:
        raise ValueError(f"no column {column!r} (prompts.column); its columns: {', '.join(table.column_names)}")
    values = table[column].to_pylist()
    if not all(isinstance(value, str | None) for value in values):
        raise ValueError(f"column {column!r} (prompts.column) is {table.schema.field(column).type}, not text")
    return [value or "" for value in values]
