"""The adapter as a flat buffer, and as files that other programs load.

One float32 vector is what crosses the network and what receipts hash, its parameters sorted by name."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from diffusion.snapshot import Snapshot, digest

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_STREAM = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")  # of transformers with a stream of text
# What a LoRA may adapt: attention alone, or also feed-forward layers, convolutions and what they are told of the time.
TARGETS: dict[str, tuple[str, ...]] = {
    "attention": (*ATTENTION, *TEXT_STREAM),
    "all": (
        *ATTENTION,
        *TEXT_STREAM,
        "ff_context.net.0.proj",
        "ff_context.net.2",
        "ff.net.0.proj",
        "ff.net.2",
        "proj_in",
        "proj_out",
        "conv1",
        "conv2",
        "time_emb_proj",
    ),
}
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")
KOHYA_FILE = "kohya.safetensors"


def attach(unet: nn.Module, rank: int, alpha: float, targets: Sequence[str] | str = TARGETS["attention"]) -> None:
    """Add a float32 LoRA to the modules whose names end in `targets`, or match that regular expression. Draws from
    torch's global generator: seed it first."""
    from peft import LoraConfig, inject_adapter_in_model

    unet.requires_grad_(False)
    names = [name for name, _ in unet.named_modules()]
    streams = any(name.endswith(TEXT_STREAM) for name in names)  # what is not there, no file is to name
    modules: Any = targets
    if not isinstance(targets, str):
        modules = [each for each in targets if streams or not each.startswith(("add_", "to_add", "ff_context"))]
    config = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=modules)
    inject_adapter_in_model(config, unet)
    for _, parameter in named(unet):
        parameter.data = parameter.data.float()


def switch(unet: nn.Module, on: bool) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in unet.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(on)


def named(unet: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The adapter's parameters, sorted by name."""
    return sorted((name, p) for name, p in unet.named_parameters() if "lora_" in name)


def snapshot(unet: nn.Module, version: int) -> Snapshot:
    flat = torch.cat([p.detach().float().flatten() for _, p in named(unet)]).cpu().numpy()
    flat.flags.writeable = False
    return Snapshot(version, flat, digest(flat))


def differs(unet: nn.Module) -> bool:
    """Whether the adapter changes anything: a fresh one's second factor is zero."""
    return any(bool(p.any()) for name, p in named(unet) if "lora_A" not in name)


@torch.no_grad()
def load(unet: nn.Module, flat: np.ndarray) -> None:
    """Copy a buffer into the module's adapter. Raises ValueError if its length is not the adapter's."""
    parameters = [p for _, p in named(unet)]
    sizes = [p.numel() for p in parameters]
    if flat.shape != (sum(sizes),):
        raise ValueError(f"adapter buffer holds {flat.shape} numbers, this module's adapter {sum(sizes)}")
    for parameter, values in zip(parameters, torch.tensor(flat).split(sizes), strict=True):
        parameter.copy_(values.view_as(parameter))


def save_files(unet: nn.Module, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files(unet).items():
        (folder / name).write_bytes(content)


def files(unet: nn.Module) -> dict[str, bytes]:
    """The adapter by file name: for diffusers, and the same for ComfyUI and A1111 (ADR 24). Of a model without text,
    which none of them loads adapters for, in PEFT's own form: PeftModel.from_pretrained. Of a transformer as
    save_lora_weights of its pipeline writes it."""
    from diffusers import (
        FluxPipeline,
        FluxTransformer2DModel,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
        UNet2DConditionModel,
    )
    from diffusers.utils import convert_state_dict_to_kohya
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save

    config: Any = unet.peft_config["default"]  # type: ignore[index, union-attr]
    state = {name: value.detach().cpu().contiguous() for name, value in get_peft_model_state_dict(unet).items()}
    if isinstance(unet, SD3Transformer2DModel | FluxTransformer2DModel):
        pipeline = FluxPipeline if isinstance(unet, FluxTransformer2DModel) else StableDiffusion3Pipeline
        told = {"r": config.r, "lora_alpha": config.lora_alpha, "target_modules": sorted(config.target_modules)}
        with tempfile.TemporaryDirectory() as folder:
            pipeline.save_lora_weights(folder, transformer_lora_layers=state, transformer_lora_adapter_metadata=told)
            return {DIFFUSERS_FILE: with_metadata(Path(folder, DIFFUSERS_FILE).read_bytes(), {})}
    if not isinstance(unet, UNet2DConditionModel):
        usual, always = LoraConfig().to_dict(), ("peft_type", "r", "lora_alpha")  # an older PEFT refuses what it lacks
        settings = {key: value for key, value in config.to_dict().items() if key in always or value != usual[key]}
        text = json.dumps(settings, indent=2, sort_keys=True, default=lambda v: sorted(v) if isinstance(v, set) else v)
        tensors = {f"base_model.model.{name}": value for name, value in state.items()}
        return dict(zip(PEFT_FILES, (f"{text}\n".encode(), save(tensors)), strict=True))
    tensors = convert_state_dict_to_kohya({f"unet.{name}": value for name, value in state.items()})
    alpha = torch.tensor(float(config.lora_alpha))  # the library's converter writes alpha = rank
    content = save(tensors | {name: alpha.clone() for name in tensors if name.endswith(".alpha")})
    return {DIFFUSERS_FILE: content, KOHYA_FILE: content}


def with_metadata(content: bytes, entries: Mapping[str, str]) -> bytes:
    """A safetensors file with more metadata, its tensors untouched. Keys are sorted: safetensors itself writes several
    in a random order, and equal adapters are to be equal files."""
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    metadata = {"format": "pt", **header.pop("__metadata__", {}), **entries}
    head = json.dumps({"__metadata__": dict(sorted(metadata.items())), **header}, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)  # tensors begin at a multiple of 8
    return len(head).to_bytes(8, "little") + head + content[start:]
