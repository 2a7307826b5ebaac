"""Prompts: files (.txt, .json, .jsonl, .csv and .parquet), sets by name, and lists."""

import csv
import io
import json
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from learner.config import Config, ConfigError, resolve
from rewards import prompt_sets


def read_prompts(source: str | Sequence[str], column: str = "prompt", key: str = "prompts.path") -> list[str]:
    """Prompts in file order, stripped, without empty ones. .json holds a list and .jsonl lines of strings or objects
    with the key `column`; .csv and .parquet a column of that name; other files a prompt a line, # begins a comment.
    Where there is no file `source`, it may be the name of a set. Raises a ConfigError that names `key`."""
    file = resolve(source) if isinstance(source, str) else None
    try:
        if file is None:
            texts = list(source)
        elif prompt_sets.is_name(str(source)) and not file.is_file():
            texts = prompt_sets.fetch(str(source))
        else:
            texts = [_text(item, column, number) for number, item in enumerate(_items(file, column), 1)]
    except prompt_sets.PromptSetError as error:
        raise ConfigError(f"{key}: {error}") from error
    # pyarrow raises ValueError, OSError and NotImplementedError; json, nested too deeply, RecursionError.
    except (OSError, csv.Error, ValueError, NotImplementedError, RecursionError) as error:
        remedy = f" (nor a prompt set: {', '.join(prompt_sets.NAMES)})" if isinstance(error, FileNotFoundError) else ""
        remedy = "; save it as UTF-8" if isinstance(error, UnicodeDecodeError) else remedy
        raise ConfigError(f"{key}: cannot read {file}: {' '.join(str(error).split())}{remedy}") from error
    prompts = [text.strip() for text in texts if text.strip()]
    if not prompts:
        raise ConfigError(f"{key}: {file or 'the list'} holds no prompt")
    return prompts


def training_prompts(config: Config) -> list[str]:
    """One empty prompt for models that take none. Raises as read_prompts."""
    return [""] if config.prompts.path is None else read_prompts(config.prompts.path, config.prompts.column)


def evaluation_prompts(config: Config) -> list[str]:
    """Of the fixed evaluation set: the training prompts, unless there are others. Raises as read_prompts."""
    path = config.evaluation.prompts
    return read_prompts(path, config.prompts.column, "evaluation.prompts") if path else training_prompts(config)


def countable(config: Config, warn: Callable[[str], None]) -> Config:
    """For a plan: with as many made-up prompts in place of sets that the hub did not give."""
    for section, key in (("prompts", "path"), ("evaluation", "prompts")):
        settings = getattr(config, section)
        name = getattr(settings, key)
        if isinstance(name, str) and prompt_sets.is_name(name) and not resolve(name).is_file():
            try:
                prompt_sets.fetch(name)
            except prompt_sets.NotFromHub as error:
                warn(f"{section}.{key}: {error}")
                made_up = settings.model_copy(update={key: tuple(prompt_sets.made_up(name))})
                config = config.model_copy(update={section: made_up})
            except prompt_sets.PromptSetError:  # whoever reads them says it
                pass
    return config


def prompts_digest(prompts: Sequence[str]) -> str:
    """What run.json knows a run's prompts by: sha256 of the training and then the evaluation prompts."""
    return sha256("\n".join(prompts).encode()).hexdigest()


def _items(file: Path, column: str) -> list[Any]:
    """Strings or objects that a file holds; of Parquet the column alone, if it is there."""
    kind = file.suffix.lower()
    if kind == ".parquet":
        import pyarrow.parquet  # here: other files are read without it

        table = pyarrow.parquet.read_table(file)
        if column not in table.column_names:
            return [dict.fromkeys(table.column_names)]
        return ["" if cell is None else cell for cell in table[column].to_pylist()]
    text = file.read_text(encoding="utf-8-sig")
    lines = text.split("\n")  # not splitlines(), which also splits at characters that a prompt may hold
    if kind == ".csv":
        rows = []
        for row in (table := csv.DictReader(io.StringIO(text), strict=True)):
            if None in row or None in row.values():
                raise ValueError(f"line {table.line_num} has more or fewer values than the header names; quote commas")
            rows.append(row)
        return rows
    if kind not in (".json", ".jsonl"):
        return [line for line in lines if not line.lstrip().startswith("#")]
    items = json.loads(text if kind == ".json" else "[" + ",\n".join(filter(str.strip, lines)) + "]")
    if not isinstance(items, list):
        raise ValueError(f"holds a JSON {type(items).__name__}, expected a list")
    return items


def _text(item: Any, column: str, number: int) -> str:
    text = item.get(column) if isinstance(item, dict) else item
    if not isinstance(text, str):
        keys = f"; its keys: {', '.join(item)}" if isinstance(item, dict) else ""
        raise ValueError(f"item {number} has no text under {column!r} (prompts.column){keys}")
    return text
