"""Prompts embedded once, before anything else is loaded, where the text encoders are large: T5-XXL in float32 is 19 GB,
more than what is trained. Samplers and learner ranks then hold the denoising network alone. Rows are kept on disk under
what they depend on: no prompt is embedded twice. Small encoders are in every process, which costs less than a start of
one more.
"""

import contextlib
import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from diffusion.locate import family_of, pipeline_index
from diffusion.open_model import Embed
from diffusion.parts import text_encoders_without_weights
from learner.config import Config, resolve
from learner.prompts import evaluation_prompts, training_prompts
from records.storage import StorageError, cache
from rewards import content

LARGE = 500_000_000  # parameters, from which on: Stable Diffusion XL's two have 820 million, 1.5's has 123


def once(config: Config) -> bool:
    """Whether prompts are embedded before all else. Raises a BaseModelError if the model cannot be read."""
    path = str(resolve(config.model.path))
    encoders = text_encoders_without_weights(path).values() if family_of(path).text else ()
    return sum(p.numel() for encoder in encoders for p in encoder.parameters()) >= LARGE


def prompts(config: Config) -> list[str]:
    """All that a run reads, and the empty one."""
    return list(dict.fromkeys(["", *training_prompts(config), *evaluation_prompts(config)]))


def embedded(config: Config, encode: Embed, progress: Callable[[int, int], None]) -> Iterator[tuple[str, np.ndarray]]:
    """Each prompt with its rows, from the cache or by `encode`, which is given all that are not there. `progress` hears
    how many are done, of how many."""
    storage, wanted = cache(), prompts(config)
    folder, missing = f"embeddings/{_key(config)}", list[str]()
    files = {prompt: f"{folder}/{_name(prompt)}.npy" for prompt in wanted}
    for prompt in wanted:
        rows: Any = None
        with contextlib.suppress(StorageError, ValueError, EOFError, zipfile.BadZipFile):  # absent or damaged
            rows = np.load(io.BytesIO(storage.read(files[prompt])), allow_pickle=False)
        if isinstance(rows, np.ndarray) and (rows.dtype, rows.ndim) == (np.float32, 2) and np.isfinite(rows).all():
            yield prompt, rows
        else:
            missing.append(prompt)
    if missing:
        progress(len(wanted) - len(missing), len(wanted))
        for done, (prompt, rows) in enumerate(zip(missing, encode(missing), strict=True), 1):
            np.save(file := io.BytesIO(), rows)
            with contextlib.suppress(StorageError):  # the run goes on without
                storage.write(files[prompt], file.getvalue())
            progress(len(wanted) - len(missing) + done, len(wanted))
            yield prompt, rows


def _key(config: Config) -> str:
    """Of all but the prompt that rows depend on: the encoders, by their content, and how they are run."""
    path, model = str(resolve(config.model.path)), config.model
    parts = [str(part) for part in sorted(Path(path).glob("*")) if part.name.startswith(("text_encoder", "tokenizer"))]
    named = "" if parts else path  # a hub id
    read = [content.digest(parts or [path]), content.program(), pipeline_index(path), model.device, model.text_tokens]
    return _name(json.dumps([*read, named, config.run.cpu_threads], sort_keys=True))


def _name(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
