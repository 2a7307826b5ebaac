"""A pipeline's folder as old and new libraries read it."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file


def save(pipeline: Any, folder: Path) -> None:
    """Write a pipeline so that transformers 4 reads it too. Of a CLIP text encoder 5 leaves out the prefix of the
    weights' names, and 4 would draw them anew; of a tokenizer vocab.json and merges.txt. The text encoder is to load in
    float32, beside a float32 U-Net, also where its weights are half precision."""
    pipeline.save_pretrained(folder)
    if not (place := folder / "text_encoder").is_dir():
        return
    weights, config = place / "model.safetensors", place / "config.json"
    settings = read_in_float32(config)
    tensors = load_file(weights)
    if settings["model_type"] == "clip_text_model" and not any(name.startswith("text_model.") for name in tensors):
        save_file({f"text_model.{name}": tensor for name, tensor in tensors.items()}, weights, {"format": "pt"})
    pipeline.tokenizer.backend_tokenizer.model.save(str(folder / "tokenizer"))


def read_in_float32(config: Path) -> dict[str, Any]:
    """Have libraries load a text encoder in float32, whatever its weights are in. Returns its configuration."""
    settings = {**json.loads(config.read_text()), "dtype": "float32"}
    config.write_text(json.dumps(settings, indent=2) + "\n")
    return settings
