"""Opens a base model by its family. Each is imported only if it is the one."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import import_module

import numpy as np
import torch

from diffusion.base_model import BaseModel
from diffusion.locate import family_of

CLASSES = {"base_model": "BaseModel", "sdxl": "StableDiffusionXL", "sd3": "StableDiffusion3", "flux": "Flux"}

Embed = Callable[[Sequence[str]], Iterable[np.ndarray]]  # rows [L, E] float32 of each prompt


def open_base_model(
    path: str,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    pixels: int | None = None,
    text_tokens: int | None = None,
    embedded: Mapping[str, np.ndarray] | None = None,
) -> BaseModel:
    """The base model of a pipeline, as BaseModel. Raises BaseModelError as `locate.is_unconditional`, and for a size
    that cannot be."""
    return class_of(path)(path, device, dtype, pixels, text_tokens, embedded)


def open_text_encoders(path: str, device: str = "cpu", text_tokens: int | None = None) -> Embed:
    """A pipeline's text encoders alone. Raises as `open_base_model`, also when they are first called."""
    model = class_of(path)(path, device, text_tokens=text_tokens, network=False)

    def embed(prompts: Sequence[str]) -> Iterator[np.ndarray]:
        for prompt in prompts:
            yield model.embed([prompt])[0].cpu().numpy()

    return embed


def class_of(path: str) -> type[BaseModel]:
    name = family_of(path).name
    kind: type[BaseModel] = getattr(import_module(f"diffusion.{name}"), CLASSES[name])
    return kind
