"""Prompts: files (.txt, .json, .jsonl, .csv and .parquet), and sets by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from learner.config import Config, ConfigError, resolve
from rewards import prompt_sets


def read_prompts(path: str, column: str = "prompt", key: str = "prompts.path") -> list[str]:
    """Prompts in file order, stripped; empty ones are skipped, and in .txt lines that start with #.

    .json holds a list and .jsonl lines of strings or objects with the key `column`; .csv (with a header) and .parquet
    a column of that name. A file with another ending is read as .txt. Where there is no file `path`, it may be the
    name of a set (rewards/prompt_sets.py).

    Raises:
        ConfigError: the file or set cannot be read, is not UTF-8, has no such column, or holds no prompt; names `key`.
    """
    file = Path(resolve(path))
    readers = {".json": _json, ".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
    try:
        if prompt_sets.is_name(path) and not file.is_file():
            found = prompt_sets.fetch(path)
        else:
            found = readers.get(file.suffix.lower(), _text)(file, column)
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{key}: {file} is not UTF-8 (byte {error.start}); convert it, or name another file"
        ) from error
    except prompt_sets.PromptSetError as error:
        raise ConfigError(f"{key}: {error}") from error
    except FileNotFoundError as error:
        sets = f" (nor a prompt set: {', '.join(prompt_sets.NAMES)})" if not file.suffix else ""
        raise ConfigError(f"{key}: cannot read {file}: no such file{sets}") from error
    except (OSError, pa.ArrowException, ValueError) as error:
        raise ConfigError(f"{key}: cannot read {file}: {' '.join(str(error).split())}") from error
    prompts = [prompt.strip() for prompt in found if prompt.strip()]
    if not prompts:
        raise ConfigError(f"{key}: {file} holds no prompt")
    return prompts


def training_prompts(config: Config) -> list[str]:
    """One empty prompt for models that take none."""
    return [""] if config.prompts.path is None else read_prompts(config.prompts.path, config.prompts.column)


def evaluation_prompts(config: Config) -> list[str]:
    path = config.evaluation.prompts
    return read_prompts(path, config.prompts.column, "evaluation.prompts") if path else training_prompts(config)


def example_prompt(config: Config) -> str:
    """One that the reward is made for, to try batch sizes with.

    Raises:
        ConfigError: as read_prompts.
    """
    return "" if config.prompts.path is None else read_prompts(config.prompts.path, config.prompts.column)[0]


def _text(file: Path, column: str) -> list[str]:
    # Not splitlines(), which also splits at characters that a prompt may hold.
    return [line for line in file.read_text(encoding="utf-8-sig").split("\n") if not line.lstrip().startswith("#")]


def _json(file: Path, column: str) -> list[str]:
    try:
        items = json.loads(file.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(items, list):
        raise ValueError(f"holds a JSON {type(items).__name__}, expected a list")
    return [_prompt(item, column, f"item {number}") for number, item in enumerate(items, 1)]


def _jsonl(file: Path, column: str) -> list[str]:
    prompts = []
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} is not JSON: {error}") from error
        prompts.append(_prompt(item, column, f"line {number}"))
    return prompts


def _prompt(item: Any, column: str, where: str) -> str:
    prompt = item.get(column) if isinstance(item, dict) else item
    if not isinstance(prompt, str):
        keys = f"; its keys: {', '.join(item)}" if isinstance(item, dict) else ""
        raise ValueError(f"{where} has no text under {column!r} (prompts.column){keys}")
    return prompt


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
