"""The adapter as a flat buffer, and as files that other programs load.

One contiguous float32 vector plus a manifest is what crosses the network and what receipts hash; names are
sorted, so the layout depends on the module alone.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

from diffusion.snapshot import Snapshot, digest

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
ADAPTER = "default"
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")
KOHYA_FILE = "kohya.safetensors"
METADATA_KEY = "lora_adapter_metadata"


def attach(
    unet: nn.Module, rank: int, alpha: float, targets: Sequence[str] | str = TARGETS
) -> list[nn.Parameter]:  # fmt: skip
    """Add a LoRA (gaussian A, zero B) to the modules whose names end in `targets`, or match that regular expression;
    returns its float32 parameters by name. Draws from torch's global generator: seed it first."""
    unet.requires_grad_(False)
    modules = targets if isinstance(targets, str) else list(targets)
    config = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=modules)
    unet.add_adapter(config, adapter_name=ADAPTER)  # type: ignore[operator]
    parameters = [parameter for _, parameter in named(unet)]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    return parameters


def named(unet: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The adapter's parameters, sorted by name."""
    return sorted((name, p) for name, p in unet.named_parameters() if "lora_" in name)


def snapshot(unet: nn.Module, version: int) -> Snapshot:
    """Copy the adapter out of the module."""
    flat = torch.cat([p.detach().float().flatten() for _, p in named(unet)]).cpu().numpy()
    flat.flags.writeable = False
    return Snapshot(version, flat, digest(flat))


def fingerprint(unet: nn.Module) -> str:
    """`snapshot(...).sha256`, without the copy where the adapter is in the host's memory."""
    parameters = [p for _, p in named(unet)]
    if parameters[0].device.type != "cpu":
        return snapshot(unet, 0).sha256
    sha256 = hashlib.sha256()
    for parameter in parameters:
        sha256.update(np.ascontiguousarray(parameter.numpy(force=True), np.float32).data)
    return sha256.hexdigest()


def load(unet: nn.Module, flat: np.ndarray) -> None:
    """Copy a buffer into the module's adapter.

    Raises:
        ValueError: the buffer's length is not the adapter's.
    """
    parameters = named(unet)
    expected = sum(p.numel() for _, p in parameters)
    if flat.shape != (expected,):
        raise ValueError(f"adapter buffer holds {flat.shape} numbers, this module's adapter {expected}")
    parts = np.split(flat, np.cumsum([p.numel() for _, p in parameters])[:-1])
    with torch.no_grad():
        for (_, parameter), part in zip(parameters, parts, strict=True):
            if parameter.device.type == "cpu":
                np.copyto(parameter.numpy(force=True), part.reshape(parameter.shape))  # in place: it shares its memory
            else:
                parameter.copy_(torch.from_numpy(np.array(part)).view_as(parameter))


def save_files(unet: nn.Module, folder: Path) -> None:
    """Write the adapter for diffusers (with its alpha and rank as metadata) and for ComfyUI and A1111 (kohya). Of a
    model without text, which none of them loads adapters for, in PEFT's own form: PeftModel.from_pretrained."""
    folder.mkdir(parents=True, exist_ok=True)
    config: Any = unet.peft_config[ADAPTER]  # type: ignore[index, union-attr]
    state = get_peft_model_state_dict(unet, adapter_name=ADAPTER)
    state = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    if not isinstance(unet, UNet2DConditionModel):
        (folder / PEFT_FILES[0]).write_text(json.dumps(_metadata(config), indent=2, sort_keys=True) + "\n")
        save_file({f"base_model.model.{name}": value for name, value in state.items()}, str(folder / PEFT_FILES[1]))
        return
    named_as_in_diffusers = {f"unet.{name}": value for name, value in convert_state_dict_to_diffusers(state).items()}
    settings = json.dumps({f"unet.{key}": value for key, value in _metadata(config).items()}, indent=2, sort_keys=True)
    # One metadata key: safetensors writes several in a random order, and equal adapters are to be equal files.
    save_file(named_as_in_diffusers, str(folder / DIFFUSERS_FILE), {METADATA_KEY: settings})
    save_file(_kohya(state, float(config.lora_alpha)), str(folder / KOHYA_FILE))


def files(unet: nn.Module) -> dict[str, bytes]:
    """What save_files writes, by name."""
    with tempfile.TemporaryDirectory() as folder:
        save_files(unet, Path(folder))
        return {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir())}


def _metadata(config: LoraConfig) -> dict[str, Any]:
    """The adapter's settings as JSON types: without them alpha != rank reloads at the wrong scale, silently."""
    settings = {key: sorted(v) if isinstance(v, set) else v for key, v in config.to_dict().items()}
    return json.loads(json.dumps(settings, default=str))


def _kohya(state: dict[str, torch.Tensor], alpha: float) -> dict[str, torch.Tensor]:
    """kohya names of a PEFT state; the library's converter writes alpha = rank, ours is the real one."""
    renamed = convert_state_dict_to_kohya({f"unet.{name}": value for name, value in state.items()})
    return {
        name: torch.tensor(alpha) if name.endswith(".alpha") else value.contiguous() for name, value in renamed.items()
    }
