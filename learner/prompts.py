"""Prompts: files (.txt, .json, .jsonl, .csv and .parquet), sets by name, and lists."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from learner.config import Config, ConfigError, resolve
from rewards import prompt_sets


def read_prompts(source: str | Sequence[str], column: str = "prompt", key: str = "prompts.path") -> list[str]:
    """Prompts in file order, stripped; empty ones are skipped, and in .txt lines that start with #.

    .json holds a list and .jsonl lines of strings or objects with the key `column`; .csv (with a header) and .parquet
    a column of that name. A file with another ending is read as .txt. Where there is no file `source`, it may be the
    name of a set (rewards/prompt_sets.py).

    Raises:
        ConfigError: the file or set cannot be read, is not UTF-8, has no such column, or holds no prompt; names `key`.
    """
    file = Path(resolve(source)) if isinstance(source, str) else "the list"
    try:
        if not isinstance(source, str):
            texts = list(source)
        elif prompt_sets.is_name(source) and not Path(file).is_file():
            texts = prompt_sets.fetch(source)
        else:
            texts = [_prompt(item, column, place) for place, item in _items(Path(file), column)]
    except UnicodeDecodeError as error:
        text = f"{key}: {file} is not UTF-8 (byte {error.start}); convert it, or name another file"
        raise ConfigError(text) from error
    except prompt_sets.PromptSetError as error:
        raise ConfigError(f"{key}: {error}") from error
    except FileNotFoundError as error:
        sets = "" if "." in str(source) else f" (nor a prompt set: {', '.join(prompt_sets.NAMES)})"
        raise ConfigError(f"{key}: cannot read {file}: no such file{sets}") from error
    except (OSError, csv.Error, ValueError, NotImplementedError) as error:  # the last two of pyarrow, too
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


def _items(file: Path, column: str) -> Iterator[tuple[str, Any]]:
    """Strings or objects that a file holds, each with its place; of Parquet only the column, if it is there."""
    kind = file.suffix.lower()
    if kind == ".parquet":
        import pyarrow.parquet  # here: other files are read without it

        table = pyarrow.parquet.read_table(file)
        there = column in table.column_names
        cells = table[column].to_pylist() if there else [dict.fromkeys(table.column_names)]
        yield from ((f"row {number}", "" if cell is None else cell) for number, cell in enumerate(cells, 1))
        return
    text = file.read_text(encoding="utf-8-sig")
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
