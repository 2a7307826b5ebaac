"""LoRA files as the adapter: what diffusers, kohya's scripts (ComfyUI, A1111) and PEFT write. Only safetensors.

Refused is what diffusers would silently load as something else than was trained: damage, several ranks or alphas, other
kinds of adapters. A layer gains alpha / rank * B A, A [rank, in, ...] and B [out, rank, ...]."""

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic_core import from_json
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from diffusion import lora
from diffusion.base_model import BaseModel
from diffusion.single_files import AGAIN, network_of
from diffusion.snapshot import Snapshot, digest

PLAIN = re.compile(r".+[._]lora[._](A|B|down|up)(\.default)?\.weight|.+\.alpha")
PREFIX = re.compile(r"(base_model\.model\.)?(unet\.|transformer\.)?")
TEXT_ENCODER = ("text_encoder", "lora_te", "text_model", "base_model.model.text_model")
# Settings under which alpha / rank is not the scale, or weights are not all in A and B.
OTHER_KINDS = (
    "use_dora", "use_rslora", "use_qalora", "use_bdlora", "rank_pattern", "alpha_pattern", "lora_bias",
    "layer_replication", "modules_to_save",
)  # fmt: skip
METADATA_KEY = "lora_adapter_metadata"  # diffusers'
# Stable Diffusion 1.x and 2.x, as kohya's scripts name them, by the width of the text that its attention takes.
GENERATIONS = {768: "sd_v1", 1024: "sd_v2"}
LARGEST = 65504.0  # of float16


class BadAdapter(ValueError):
    """LoRA files that cannot be read, or do not fit the model; the message names the file and the remedy."""


@dataclass(frozen=True)
class AdapterFile:
    """A LoRA as its file has it."""

    source: str  # the file, for messages
    rank: int
    alpha: float
    state: dict[str, Tensor]  # MODULE.lora_A.weight, MODULE.lora_B.weight, float32; MODULE as diffusers' U-Net names it
    note: str | None = None  # what had to be assumed
    made_for: str | None = None  # the kind of model, as far as the file's names tell

    @property
    def modules(self) -> list[str]:
        return sorted({name.rsplit(".", 2)[0] for name in self.state})

    @property
    def targets(self) -> list[str]:  # the ends of these names: to_q, to_out.0 ...
        return sorted({re.findall(r"[^.]*[a-z][^.]*(?:\.\d+)?$", name)[0] for name in self.modules})

    @property
    def flat(self) -> np.ndarray:  # float32 [P], in the order of diffusion/lora.py
        return torch.cat([self.state[name].flatten() for name in sorted(self.state)]).numpy()

    @property
    def sha256(self) -> str:  # of that buffer
        return digest(self.flat)

    @property
    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """A and B by module."""
        state = self.state
        return {name: (state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"]) for name in self.modules}


def read(path: str | Path) -> AdapterFile:
    """A LoRA from a .safetensors file, or from a folder with one: pytorch_lora_weights.safetensors, PEFT's
    adapter_model.safetensors, kohya.safetensors or, if it is the only one, any other. Raises BadAdapter."""
    file, note, made_for = _find(Path(path).expanduser()), None, None
    try:
        with safe_open(str(file), "pt") as opened:
            names = list(opened.keys())
            made_for = network_of(names)
            others = [name for name in names if name.startswith(TEXT_ENCODER) or not PLAIN.fullmatch(name)]
            if others or not any("lora" in name and not name.endswith(".alpha") for name in names):
                of, held = made_for or "a U-Net", " ".join(min(others, default="nothing").split())
                raise BadAdapter(
                    f"{file} is no plain LoRA of {of}: it holds {held:.200} (text "
                    "encoders', DoRA, LoHa and the like are not read; diffusers' save_lora_weights writes what is)"
                )
            tensors = {name: opened.get_tensor(name) for name in names}
            settings = _settings(file, opened.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise BadAdapter(f"{file} is no whole safetensors file, and no other is read ({error}); {AGAIN}") from error
    for name, tensor in tensors.items():
        if not tensor.isfinite().all() or (tensor.numel() != 1 if name.endswith(".alpha") else tensor.ndim < 2):
            raise BadAdapter(f"{file}: {name}, of shape {list(tensor.shape)}, is not finite or no LoRA's; {AGAIN}")
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_unet_state_dict_to_peft

    try:
        named, kohya_alphas = StableDiffusionPipeline.lora_state_dict(tensors)
        state = {
            PREFIX.sub("", name, count=1).replace(".default.", "."): tensor.float().contiguous()
            for name, tensor in convert_unet_state_dict_to_peft(named).items()
        }
        factors = AdapterFile(str(file), 0, 0, state).factors.values()
    except (KeyError, ValueError) as error:  # a partner is missing, or weights of an alpha are
        whose = f" (a LoRA of {made_for})" if made_for else ""
        raise BadAdapter(f"{file}{whose} is not whole: {' '.join(str(error).split())[:200]}; {AGAIN}") from error
    ranks = {rank for a, b in factors for rank in (a.shape[0], b.shape[1])}
    # A kohya file's alpha is a float32: its shortest decimal is what was meant, 0.1 and not 0.10000000149.
    alphas = {float(str(np.float32(alpha))) for alpha in (kohya_alphas or {}).values()}
    if settings:
        ranks.add(int(settings["r"]))
        alphas = {float(settings["lora_alpha"])}
    elif not alphas:
        alphas = {float(min(ranks))}
        note = f"{file} does not say its alpha: taken to be its rank {min(ranks)}, as diffusers does"
    if len(ranks) > 1 or len(alphas) > 1:
        raise BadAdapter(f"{file} has ranks {sorted(ranks)} and alphas {sorted(alphas)}: use a LoRA of one each")
    adapter = AdapterFile(str(file), ranks.pop(), alphas.pop(), state, note, made_for)
    for name, (a, b) in adapter.factors.items():
        largest = float(a.abs().max()), float(b.abs().max()), abs(adapter.alpha) * float(a.abs().max() * b.abs().max())
        if not max(largest) <= LARGEST:  # NaN, too
            raise BadAdapter(
                f"{file}: values of {name} or alpha ({adapter.alpha:g}) are beyond what half precision holds, "
                f"{LARGEST:g}: no picture could come of it; {AGAIN}"
            )
    return adapter


def attach(model: BaseModel, adapter: AdapterFile) -> Snapshot:
    """Give a model without adapter this one, bit by bit; raises as require_fit. Returns it as the module has it."""
    require_fit(model.unet, adapter)
    model.attach_lora(adapter.rank, adapter.alpha, seed=0, targets="|".join(map(re.escape, adapter.modules)))
    lora.load(model.unet, adapter.flat)
    return lora.snapshot(model.unet, 0)


@torch.no_grad()
def merge(unet: nn.Module, adapter: AdapterFile) -> None:
    """Add alpha / rank * B A to the weights of a U-Net without adapter, computed in float32; raises as require_fit."""
    require_fit(unet, adapter)
    for name, (a, b) in adapter.factors.items():
        weight: Any = unet.get_submodule(name).weight
        change = (b.flatten(1) @ a.flatten(1)).reshape(weight.shape) * (adapter.alpha / adapter.rank)
        weight.copy_(weight.float() + change.to(weight.device))


def require_fit(unet: nn.Module, adapter: AdapterFile) -> None:
    """Raises BadAdapter if the U-Net lacks a module that is adapted, or has another shape there; names the first."""
    layers = dict(unet.named_modules())
    for name, (a, b) in adapter.factors.items():
        weight, shape = getattr(layers.get(name), "weight", None), [b.shape[0], *a.shape[1:]]
        if weight is None or list(weight.shape) != shape:
            there, mine = "there is none" if weight is None else list(weight.shape), network_of(layers)
            remedy = "name the base model that it was made for"
            if adapter.made_for == mine and weight is None:
                remedy += ", or have diffusers' load_lora_weights and save_lora_weights write it in the names read here"
            other = mine and adapter.made_for and adapter.made_for != mine
            told = f"made for {adapter.made_for}, and the model is {mine}: " if other else ""
            raise BadAdapter(
                f"{adapter.source} is a LoRA of another base model: {told}its {name} is {shape}, in this model {there};"
                f" {remedy}"
            )


def generation(adapter: AdapterFile) -> str | None:
    """Whose U-Net the LoRA fits, of those that ComfyUI and A1111 know; None: of neither."""
    from diffusers import UNet2DConditionModel

    texts = [a.shape[1] for name, (a, _) in adapter.factors.items() if name.endswith("attn2.to_k")]
    if not texts or texts[0] not in GENERATIONS:
        return None
    with contextlib.suppress(BadAdapter), torch.device("meta"):
        require_fit(UNet2DConditionModel(cross_attention_dim=texts[0]), adapter)
        return GENERATIONS[texts[0]]
    return None


def _find(path: Path) -> Path:
    if path.is_dir():
        there = sorted(file.name for file in path.glob("*.safetensors"))
        known = [name for name in (lora.DIFFUSERS_FILE, lora.PEFT_FILES[1], lora.KOHYA_FILE) if name in there]
        if not known and len(there) != 1:
            raise BadAdapter(f"{path} holds no LoRA or several: {len(there)} safetensors files; name the LoRA's file")
        return path / (known or there)[0]
    if not path.is_file():
        raise BadAdapter(f"{path}: no such file or folder; give a LoRA's .safetensors file, or the folder it is in")
    return path


def _settings(file: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The LoRA's settings, from the file's metadata or adapter_config.json beside it; empty where there are none."""
    beside, text = file.with_name(lora.PEFT_FILES[0]), metadata.get(METADATA_KEY)
    try:
        if text is None and file.name == lora.PEFT_FILES[1] and beside.is_file():
            text = beside.read_text(encoding="utf-8")
        settings = {
            name.removeprefix("unet.").removeprefix("transformer."): value
            for name, value in from_json(text or "{}").items()
        }
        if settings:
            float(settings["lora_alpha"]), int(settings["r"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise BadAdapter(f"{file}: its settings, or {beside.name}, are damaged ({error!r}); {AGAIN}") from error
    if used := [name for name in OTHER_KINDS if settings.get(name)]:
        raise BadAdapter(f"{file} uses {', '.join(used)}, which Tributary does not: use a plain LoRA")
    return settings
