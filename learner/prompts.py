"""Prompts: files (.txt, .json, .jsonl, .csv and .parquet), and sets by name."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
    try:
        if prompt_sets.is_name(path) and not file.is_file():
            texts = prompt_sets.fetch(path)
        elif file.suffix.lower() == ".parquet":
            texts = _parquet(file, column)
        else:
            items = _items(file.read_text(encoding="utf-8-sig"), file.suffix.lower())
            texts = [_prompt(item, column, place) for place, item in items]
    except UnicodeDecodeError as error:
        text = f"{key}: {file} is not UTF-8 (byte {error.start}); convert it, or name another file"
        raise ConfigError(text) from error
    except prompt_sets.PromptSetError as error:
        raise ConfigError(f"{key}: {error}") from error
    except FileNotFoundError as error:
        sets = f" (nor a prompt set: {', '.join(prompt_sets.NAMES)})" if not file.suffix else ""
        raise ConfigError(f"{key}: cannot read {file}: no such file{sets}") from error
    except (OSError, csv.Error, ValueError) as error:
        raise ConfigError(f"{key}: cannot read {file}: {' '.join(str(error).split())}") from error
    prompts = [text.strip() for text in texts if text.strip()]
    if not prompts:
        raise ConfigError(f"{key}: {file} holds no prompt")
    return prompts


def training_prompts(config: Config) -> list[str]:
    """One empty prompt for models that take none. Raises as read_prompts."""
    return [""] if config.prompts.path is None else read_prompts(config.prompts.path, config.prompts.column)


def evaluation_prompts(config: Config) -> list[str]:
    """Of the fixed evaluation set: the training prompts, unless there are others. Raises as read_prompts."""
    path = config.evaluation.prompts
    return read_prompts(path, config.prompts.column, "evaluation.prompts") if path else training_prompts(config)


def example_prompt(config: Config) -> str:
    """One that the reward is made for, to try batch sizes with. Raises as read_prompts."""
    return training_prompts(config)[0]


def _items(text: str, kind: str) -> Iterator[tuple[str, Any]]:
    """What a file of this ending holds, each with its place in the file."""
    lines = text.split("\n")  # not splitlines(), which also splits at characters that a prompt may hold
    if kind == ".json":
        items = _json(text, "it")
        if not isinstance(items, list):
            raise ValueError(f"holds a JSON {type(items).__name__}, expected a list")
        yield from ((f"item {number}", item) for number, item in enumerate(items, 1))
    elif kind == ".jsonl":
        places = ((f"line {number}", line) for number, line in enumerate(lines, 1) if line.strip())
        yield from ((place, _json(line, place)) for place, line in places)
    elif kind == ".csv":
        for row in (table := csv.DictReader(io.StringIO(text), strict=True)):
            if None in row or None in row.values():
                raise ValueError(f"line {table.line_num} has more or fewer values than the header names; quote commas")
            yield f"line {table.line_num}", row
    else:
        yield from (("", line) for line in lines if not line.lstrip().startswith("#"))


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not JSON: {error}") from error


def _prompt(item: Any, column: str, place: str) -> str:
    prompt = item.get(column) if isinstance(item, dict) else item
    if not isinstance(prompt, str):
        keys = f"; its keys: {', '.join(item)}" if isinstance(item, dict) else ""
        raise ValueError(f"{place} has no text under {column!r} (prompts.column){keys}")
    return prompt


def _parquet(file: Path, column: str) -> list[str]:
    import pyarrow.parquet  # here: other files are read without it

    try:
        table = pyarrow.parquet.read_table(file)
    except pyarrow.ArrowException as error:
        raise ValueError(str(error)) from error
    if column not in table.column_names:
        raise ValueError(f"no column {column!r} (prompts.column); its columns: {', '.join(table.column_names)}")
    values = table[column].to_pylist()
    if not all(isinstance(value, str | None) for value in values):
        raise ValueError(f"column {column!r} (prompts.column) is {table.schema.field(column).type}, not text")
    return [value or "" for value in values]
