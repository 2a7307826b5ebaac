"""Prompts: files (.txt, .json, .jsonl, .csv, .tsv and .parquet), sets by name, and lists. What a file says of a prompt
beside its text is its metadata, which rewards may read."""

import csv
import io
import json
from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from learner.config import Config, ConfigError, resolve
from rewards import prompt_sets
from rewards.contract import Columns

DELIMITERS = {".csv": ",", ".tsv": "\t"}


class Prompt(str):
    """A prompt of a file, with the other columns of its line: JSON values. It equals its text."""

    metadata: Columns

    def __new__(cls, text: str, metadata: Columns) -> "Prompt":
        prompt = super().__new__(cls, text)
        prompt.metadata = metadata
        return prompt

    def __reduce__(self) -> tuple[type["Prompt"], tuple[str, Columns]]:
        return Prompt, (str(self), self.metadata)  # to be copied and sent to actors


def metadata_of(prompts: Iterable[str]) -> tuple[Columns, ...]:
    """Of each prompt; none at all where no prompt has any."""
    found = tuple(prompt.metadata if isinstance(prompt, Prompt) else {} for prompt in prompts)
    return found if any(found) else ()


def read_prompts(source: str | Sequence[str], column: str = "prompt", key: str = "prompts.path") -> list[str]:
    """Prompts in file order, stripped, without empty ones; with metadata where the file has any. .json holds a list and
    .jsonl lines of strings or objects with the key `column`; .csv, .tsv and .parquet a column of that name; other files
    a prompt a line, # begins a comment. Where there is no file `source`, it may be the name of a set. Raises a
    ConfigError that names `key`."""
    file = resolve(source) if isinstance(source, str) else None
    try:
        if file is None:
            texts = list(source)
        elif prompt_sets.is_name(str(source)) and not file.is_file():
            texts = prompt_sets.fetch(str(source))
        else:
            texts = [_prompt(item, column, number) for number, item in enumerate(_items(file, column), 1)]
    except prompt_sets.PromptSetError as error:
        raise ConfigError(f"{key}: {error}") from error
    # pyarrow raises ValueError, OSError and NotImplementedError; json, nested too deeply, RecursionError.
    except (OSError, csv.Error, ValueError, NotImplementedError, RecursionError) as error:
        remedy = f" (nor a prompt set: {', '.join(prompt_sets.NAMES)})" if isinstance(error, FileNotFoundError) else ""
        remedy = "; save it as UTF-8" if isinstance(error, UnicodeDecodeError) else remedy
        raise ConfigError(f"{key}: cannot read {file}: {' '.join(str(error).split())}{remedy}") from error
    prompts = [text if isinstance(text, Prompt) else text.strip() for text in texts if text.strip()]
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
    """What run.json knows a run's prompts by: sha256 of the training and then the evaluation prompts, and of their
    metadata, if they have any."""
    metadata = metadata_of(prompts)
    lines = [*prompts, json.dumps(metadata, sort_keys=True)] if metadata else prompts
    return sha256("\n".join(lines).encode()).hexdigest()


def _items(file: Path, column: str) -> list[Any]:
    """Strings or objects that a file holds; of Parquet the columns of JSON types."""
    kind = file.suffix.lower()
    if kind == ".parquet":
        import pyarrow.parquet  # here: other files are read without it

        schema = pyarrow.parquet.read_schema(file)
        if column not in schema.names:
            return [dict.fromkeys(schema.names)]
        names = [field.name for field in schema if field.name == column or _is_json(field.type)]
        rows = pyarrow.parquet.read_table(file, columns=names).to_pylist()
        return [row | {column: ""} if row.get(column, "") is None else row for row in rows]
    text = file.read_text(encoding="utf-8-sig")
    lines = text.split("\n")  # not splitlines(), which also splits at characters that a prompt may hold
    if kind in DELIMITERS:
        rows = []
        for row in (table := csv.DictReader(io.StringIO(text), delimiter=DELIMITERS[kind], strict=True)):
            if None in row or None in row.values():
                quote = "commas" if kind == ".csv" else "tabs"
                raise ValueError(f"line {table.line_num} has more or fewer values than the header names; quote {quote}")
            rows.append(row)
        return rows
    if kind not in (".json", ".jsonl"):
        return [line for line in lines if not line.lstrip().startswith("#")]
    items = json.loads(text if kind == ".json" else "[" + ",\n".join(filter(str.strip, lines)) + "]")
    if not isinstance(items, list):
        raise ValueError(f"holds a JSON {type(items).__name__}, expected a list")
    return items


def _is_json(kind: Any) -> bool:
    """Whether values of an Arrow type are text, numbers, truth values, or lists and structs of them."""
    import pyarrow.types as types

    if types.is_dictionary(kind):
        return _is_json(kind.value_type)
    if types.is_struct(kind) or types.is_list(kind) or types.is_large_list(kind):
        return all(_is_json(kind.field(i).type) for i in range(kind.num_fields))
    plain = types.is_string, types.is_large_string, types.is_integer, types.is_floating, types.is_boolean
    return any(is_it(kind) for is_it in plain)


def _prompt(item: Any, column: str, number: int) -> str:
    text = item.get(column) if isinstance(item, dict) else item
    if not isinstance(text, str):
        keys = f"; its keys: {', '.join(item)}" if isinstance(item, dict) else ""
        raise ValueError(f"item {number} has no text under {column!r} (prompts.column){keys}")
    metadata = {key: value for key, value in item.items() if key != column} if isinstance(item, dict) else {}
    return Prompt(text.strip(), metadata) if metadata else text
