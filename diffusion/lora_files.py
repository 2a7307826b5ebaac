"""LoRA files as the adapter: what diffusers, kohya's scripts (ComfyUI, A1111) and PEFT write. Only safetensors.

    unet.MODULE.lora.down.weight, .lora.up.weight             diffusers; rank and alpha in its metadata
    lora_unet_MODULE.lora_down.weight, .lora_up.weight        kohya, with _ for the dots in MODULE; MODULE.alpha beside
    base_model.model.MODULE.lora_A.weight, .lora_B.weight     PEFT; rank and alpha in adapter_config.json

down and A are [rank, in, ...], up and B [out, rank, ...]; the layer's weight gains alpha / rank * B A.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from diffusion import lora
from diffusion.base_model import BaseModel
from diffusion.snapshot import Snapshot, digest

PARTS = {
    "lora_A": "lora_A", "lora.down": "lora_A", "lora_down": "lora_A",
    "lora_B": "lora_B", "lora.up": "lora_B", "lora_up": "lora_B",
}  # fmt: skip
WEIGHT = re.compile(rf"(.+?)\.({'|'.join(map(re.escape, PARTS))})(?:\.default)?\.weight")
KOHYA_PREFIX = "lora_unet_"
PREFIXES = ("base_model.model.", "unet.", KOHYA_PREFIX)
TEXT_ENCODER = ("text_encoder", "lora_te", "text_model", "base_model.model.text_model")
# Names of a U-Net's parts that have underscores of their own; all others of a kohya name stand for dots.
WORDS = (
    "down_blocks", "mid_block", "up_blocks", "transformer_blocks", "to_q", "to_k", "to_v", "to_out", "proj_in",
    "proj_out", "conv_in", "conv_out", "conv_shortcut", "time_emb_proj", "time_embedding", "linear_1", "linear_2",
)  # fmt: skip
KOHYA_NAME = re.compile(rf"(?<![a-z])({'|'.join(WORDS)})(?![a-z])|_")
# Settings under which alpha / rank is not the scale, or weights are not all in A and B.
OTHER_KINDS = (
    "use_dora", "use_rslora", "use_qalora", "use_bdlora", "rank_pattern", "alpha_pattern", "lora_bias",
    "layer_replication", "modules_to_save",
)  # fmt: skip
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


class BadAdapter(ValueError):
    """LoRA files that cannot be read, or do not fit the model; the message names the file and the remedy."""


@dataclass(frozen=True)
class AdapterFile:
    """A LoRA as its file has it.

    `state` holds `MODULE.lora_A.weight` [rank, in, ...] and `MODULE.lora_B.weight` [out, rank, ...], float32, of the
    U-Net's modules by their names in diffusers. `metadata` is the file's own. `note` says what had to be assumed.
    """

    source: str  # the file, for messages
    rank: int
    alpha: float
    state: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    note: str | None = None

    @property
    def modules(self) -> list[str]:
        """Names of the adapted modules, sorted."""
        return sorted({name.rsplit(".", 2)[0] for name in self.state})

    @property
    def targets(self) -> list[str]:
        """The ends of these names: to_q, to_out.0, ..."""
        return sorted({re.findall(r"[^.]*[a-z][^.]*(?:\.\d+)?$", name)[0] for name in self.modules})

    @property
    def flat(self) -> np.ndarray:
        """The adapter as one float32 buffer [P], in the order of diffusion/lora.py."""
        return torch.cat([self.state[name].flatten() for name in sorted(self.state)]).numpy()

    @property
    def sha256(self) -> str:
        """Of that buffer: what receipts, checkpoints and records call the adapter's."""
        return digest(self.flat)


def read(path: str | Path) -> AdapterFile:
    """A LoRA from a .safetensors file, or from a folder with one: pytorch_lora_weights.safetensors, PEFT's
    adapter_model.safetensors, kohya.safetensors or, if it is the only one, any other.

    Where neither metadata nor alpha tensors say what alpha is, it is taken to be the rank, as diffusers does, and
    `note` says so.

    Raises:
        BadAdapter: there is none, it is damaged, or no LoRA of a kind and form known here.
    """
    file = _find(Path(path).expanduser())
    try:
        with safe_open(str(file), "pt") as opened:
            metadata = dict(opened.metadata() or {})
            names = list(opened.keys())
            _require_lora(file, names)
            tensors = {name: opened.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        remedy = "only safetensors files are read" if file.suffix in PICKLES else "copy or download it again"
        raise BadAdapter(
            f"{file} is no whole safetensors file ({' '.join(str(error).split())[:200]}); {remedy}"
        ) from error
    state, alphas = _sorted_out(file, tensors)
    settings = _settings(file, metadata)
    rank = _rank(file, state, settings)
    alpha, note = _alpha(file, alphas, settings, rank)
    return AdapterFile(str(file), rank, alpha, state, metadata, note)


def attach(model: BaseModel, adapter: AdapterFile) -> Snapshot:
    """Give the model this adapter, bit by bit, with its own rank, alpha and modules; or, where the model has an adapter
    of the very same kind already, load it into that. Returns it as the module then has it, as version 0.

    Raises:
        BadAdapter: it was made for another base model, or the model's adapter is of another kind.
    """
    unet = model.unet
    require_fit(unet, adapter)
    present = getattr(unet, "peft_config", {}).get(lora.ADAPTER)
    usual = tuple(f".{target}" for target in lora.TARGETS)
    if present is not None:
        _require_same(unet, present, adapter)
    elif set(adapter.modules) == {name for name, _ in unet.named_modules() if name.endswith(usual)}:
        model.attach_lora(adapter.rank, adapter.alpha, seed=0)
    else:
        exactly = "|".join(re.escape(name) for name in adapter.modules)
        unet.add_adapter(LoraConfig(r=adapter.rank, lora_alpha=adapter.alpha, target_modules=exactly), lora.ADAPTER)
        for _, parameter in lora.named(unet):
            parameter.data = parameter.data.float()
    lora.load(unet, adapter.flat)
    return lora.snapshot(unet, 0)


@torch.no_grad()
def merge(unet: nn.Module, adapter: AdapterFile) -> None:
    """Add alpha / rank * B A to the weights of a U-Net without adapter, computed in float32.

    Raises:
        BadAdapter: it was made for another base model.
    """
    require_fit(unet, adapter)
    for name in adapter.modules:
        weight: Any = unet.get_submodule(name).weight
        down, up = (adapter.state[f"{name}.{part}.weight"] for part in ("lora_A", "lora_B"))
        change = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape) * (adapter.alpha / adapter.rank)
        weight.copy_(weight.float() + change.to(weight.device))


def require_fit(unet: nn.Module, adapter: AdapterFile) -> None:
    """
    Raises:
        BadAdapter: the U-Net lacks a module that is adapted, or has another shape there; names the first.
    """
    layers = dict(unet.named_modules())
    for name in adapter.modules:
        down, up = (adapter.state[f"{name}.{part}.weight"] for part in ("lora_A", "lora_B"))
        wanted = [up.shape[0], *down.shape[1:]]
        weight = getattr(getattr(layers.get(name), "base_layer", layers.get(name)), "weight", None)
        shape = None if weight is None else list(weight.shape)
        if shape != wanted:
            raise BadAdapter(
                f"{adapter.source} is a LoRA of another base model: its {name} is {wanted}, in this U-Net "
                f"{shape or 'there is none'}; name the base model that it was made for"
            )


def with_metadata(content: bytes, entries: Mapping[str, str]) -> bytes:
    """A safetensors file with more metadata, its tensors untouched. Keys are sorted: safetensors itself writes several
    in a random order, and equal adapters are to be equal files.

    Raises:
        ValueError: it is no safetensors file.
    """
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    metadata = {"format": "pt", **header.pop("__metadata__", {}), **entries}
    head = json.dumps({"__metadata__": dict(sorted(metadata.items())), **header}, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)  # tensors begin at a multiple of 8
    return len(head).to_bytes(8, "little") + head + content[start:]


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise BadAdapter(f"{path}: no such file or folder; give a LoRA's .safetensors file, or the folder it is in")
    there = sorted(file.name for file in path.glob("*.safetensors"))
    known = [name for name in (lora.DIFFUSERS_FILE, lora.PEFT_FILES[1], lora.KOHYA_FILE) if name in there]
    if known or len(there) == 1:
        return path / (known or there)[0]
    if there:
        raise BadAdapter(f"{path} holds {len(there)} safetensors files ({', '.join(there[:3])} ...); name one of them")
    raise BadAdapter(f"{path} holds no LoRA: there is no {lora.DIFFUSERS_FILE} or other safetensors file in it")


def _require_lora(file: Path, names: list[str]) -> None:
    """Before anything is loaded: it may be a whole model."""
    if any(name.startswith(TEXT_ENCODER) for name in names):
        raise BadAdapter(f"{file} adapts the text encoder too, of which Tributary knows nothing: use a U-Net's LoRA")
    weights = [name for name in names if WEIGHT.fullmatch(name)]
    strange = sorted(name for name in set(names) - set(weights) if not name.endswith(".alpha"))
    if not weights and not any("lora" in name for name in strange):
        raise BadAdapter(f"{file} is no LoRA: it holds {strange[0] if strange else 'nothing'}; name a LoRA's file")
    if strange:
        raise BadAdapter(
            f"{file} is no plain LoRA in a form known here: it holds {strange[0]} (DoRA, LoHa and the like are not "
            "read; load it with diffusers and save it with save_lora_weights)"
        )


def _sorted_out(file: Path, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], set[float]]:
    """State by PEFT's names, and what the alphas are."""
    state: dict[str, Tensor] = {}
    alphas: set[float] = set()
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise BadAdapter(f"{file}: {name} holds values that are not finite; use an earlier checkpoint's")
        matched = WEIGHT.fullmatch(name)
        if tensor.ndim < 2 if matched else tensor.numel() != 1:
            raise BadAdapter(f"{file}: {name} is of shape {list(tensor.shape)}: no LoRA; copy or download it again")
        if matched:
            state[f"{_module(matched[1])}.{PARTS[matched[2]]}.weight"] = tensor.float().contiguous()
        else:
            # A kohya file's alpha is a float32: its shortest decimal is what was meant, 0.1 and not 0.10000000149.
            alphas.add(float(str(np.float32(tensor.item()))))
    for name in state:
        partner = "lora_B" if ".lora_A." in name else "lora_A"
        if f"{name.rsplit('.', 2)[0]}.{partner}.weight" not in state:
            raise BadAdapter(f"{file} is not whole: {name} has no {partner}; copy or download it again")
    return state, alphas


def _module(name: str) -> str:
    """A module's name in diffusers."""
    prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")
    name = name.removeprefix(prefix).removeprefix("unet.")  # PEFT around a whole pipeline's U-Net has both
    return KOHYA_NAME.sub(lambda found: found[1] or ".", name) if prefix == KOHYA_PREFIX else name


def _settings(file: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The LoRA's settings, from the file's metadata or adapter_config.json beside it; empty where there are none."""
    beside = file.with_name(lora.PEFT_FILES[0])
    place = str(file)
    try:
        if lora.METADATA_KEY in metadata:
            found = json.loads(metadata[lora.METADATA_KEY])
        elif file.name == lora.PEFT_FILES[1] and beside.is_file():
            place = str(beside)
            found = json.loads(beside.read_text(encoding="utf-8"))
        else:
            return {}
        settings = {name.removeprefix("unet."): value for name, value in found.items()}
        float(settings["lora_alpha"]), int(settings["r"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadAdapter(f"{place}: the LoRA's settings are damaged ({error!r}); copy or download it again") from error
    used = [name for name in OTHER_KINDS if settings.get(name)]
    if used:
        raise BadAdapter(f"{place} uses {', '.join(used)}, which Tributary does not: use a plain LoRA")
    return settings


def _rank(file: Path, state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> int:
    ranks = {tensor.shape[0 if ".lora_A." in name else 1] for name, tensor in state.items()}
    if len(ranks) > 1:
        raise BadAdapter(f"{file} has modules of ranks {sorted(ranks)}: use a LoRA of one rank")
    rank = ranks.pop()
    if int(settings.get("r", rank)) != rank:
        raise BadAdapter(f"{file}: its settings say rank {settings['r']}, its tensors have {rank}: not one LoRA's")
    return rank


def _alpha(file: Path, alphas: set[float], settings: Mapping[str, Any], rank: int) -> tuple[float, str | None]:
    if settings:
        return float(settings["lora_alpha"]), None
    if len(alphas) > 1:
        raise BadAdapter(f"{file} has modules of alphas {sorted(alphas)}: use a LoRA of one alpha")
    if alphas:
        return alphas.pop(), None
    return float(rank), f"{file} does not say its alpha: taken to be its rank {rank}, as diffusers does"


def _require_same(unet: nn.Module, present: Any, adapter: AdapterFile) -> None:
    has = f"rank {present.r}, alpha {float(present.lora_alpha):g}"
    given = f"rank {adapter.rank}, alpha {adapter.alpha:g}"
    modules = sorted({name.rsplit(".", 3)[0] for name, _ in lora.named(unet)})
    if has != given or modules != adapter.modules:
        other = f"{has}, not {given}" if has != given else "other modules"
        raise BadAdapter(f"{adapter.source}: the model's adapter has {other}; make them the same")
