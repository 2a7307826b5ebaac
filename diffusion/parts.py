"""The parts of a pipeline, looked at without their weights: what cannot be used is refused before a run starts."""

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffusion.locate import (
    AGAIN,
    INDEX,
    TINY_DECODER,
    BaseModelError,
    is_unconditional,
    load_errors,
    locate,
    part_config,
    part_file,
    part_shapes,
    pipeline_index,
)

# The classes that a pipeline's index must name: other ones would be loaded as these.
TEXT_PARTS = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "tokenizer": "CLIPTokenizer",
}
# U-Nets with one of these take more than latents, a timestep and text.
MORE_INPUTS = (
    "num_class_embeds", "class_embed_type", "addition_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim",
)  # fmt: skip
# Names in files from before diffusers 0.16, which it still reads; transformers 5 has left out the prefix of 4.
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def load_scheduler(path: str) -> Any:
    """The DDIMScheduler that stands in for a pipeline's. Raises BaseModelError as `is_unconditional`, if none can."""
    import diffusers

    config, file = part_config(path, "scheduler"), "scheduler/scheduler_config.json"
    name, schedule = config.get("_class_name"), config.get("beta_schedule")
    if "DDIMScheduler" not in getattr(getattr(diffusers, str(name), None), "_compatibles", ()):
        raise BaseModelError(f"model.path: {path}/{file} names {name}, a scheduler that DDIM cannot stand in for")
    # As StableDiffusionPipeline itself sets them, whatever the file says: latents are not clipped.
    changes = {} if is_unconditional(path) else {"clip_sample": False, "steps_offset": 1}
    with load_errors(path, part=file):
        try:
            return diffusers.DDIMScheduler.from_config(config, **changes)
        except NotImplementedError as error:
            raise ValueError(f"its beta_schedule is {schedule!r}, which DDIM does not have") from error


def load_tokenizer(path: str) -> Any:
    """Of a pipeline with text. Raises BaseModelError as `is_unconditional`, and if it does not fit the text encoder."""
    from transformers import CLIPTokenizer

    encoder = part_config(path, "text_encoder")
    with load_errors(path, part="tokenizer"):
        tokenizer = CLIPTokenizer.from_pretrained(locate(path), subfolder="tokenizer")
        if len(tokenizer) != (tokens := encoder.get("vocab_size", 49408)):
            raise ValueError(f"it knows {len(tokenizer)} tokens, the text encoder's config.json {tokens} (vocab_size)")
        given, most = tokenizer.model_max_length, encoder.get("max_position_embeddings", 77)
        if given > most:
            said = f"model_max_length {given}" if given < 1e9 else "no model_max_length"
            raise ValueError(f"its tokenizer_config.json says {said}, the text encoder reads {most} tokens")
    return tokenizer


def cut_prompts(path: str, prompts: Sequence[str]) -> str | None:
    """What is to be said of prompts longer than the text encoder reads, whose rest is cut; raises as load_tokenizer."""
    tokenizer, prompts = load_tokenizer(path), list(dict.fromkeys(prompts))
    lengths, limit = [len(ids) for ids in tokenizer(prompts).input_ids], tokenizer.model_max_length
    cut = [prompt for prompt, length in zip(prompts, lengths, strict=True) if length > limit]
    if not cut:
        return None
    read = tokenizer.decode(tokenizer(cut[0], truncation=True).input_ids, skip_special_tokens=True)
    return (
        f"{len(cut)} of {len(prompts)} prompts are longer than the {limit} tokens that {path} reads: of "
        f"{textwrap.shorten(cut[0], 200)!r} it reads {textwrap.shorten(read, 200)!r}"
    )


def check_parts(path: str) -> None:
    """Raises BaseModelError where a part is absent or damaged, is not what its configuration says, or cannot be trained
    here. Of weights only the headers are read."""
    index, unet, unconditional = pipeline_index(path), part_config(path, "unet"), is_unconditional(path)
    for name, kind in ({"unet": "UNet2DModel"} if unconditional else TEXT_PARTS).items():
        library_and_class = index.get(name)
        found = library_and_class[-1] if isinstance(library_and_class, list) and library_and_class else None
        if str(found).removesuffix("Fast") != kind:
            raise BaseModelError(f"model.path: the {INDEX} of {path} names {found} as its {name}, not {kind}; {AGAIN}")
    wanted: dict[str, Any] = dict.fromkeys(MORE_INPUTS)
    if unconditional:
        channels = 3
    else:
        channels = part_config(path, "vae").get("latent_channels", 4)
        wanted["cross_attention_dim"] = part_config(path, "text_encoder").get("hidden_size")
    wanted |= {"in_channels": channels, "out_channels": channels}
    faults = [f"its {key} is {unet[key]}, not {good}" for key, good in wanted.items() if unet.get(key, good) != good]
    if not isinstance(unet.get("sample_size"), int):
        faults.append(f"its sample_size is {unet.get('sample_size')}, no single number")
    blocks = [*unet.get("down_block_types", ()), *unet.get("up_block_types", ())]
    if unconditional and not unet.get("add_attention", True) and not any("Attn" in block for block in blocks):
        faults.append("it has no attention for a LoRA to adapt")
    if faults:
        raise BaseModelError(f"model.path: the U-Net of {path} cannot be used: {', '.join(faults)}")
    parts = dict(zip(("unet", "vae"), without_weights(path), strict=True))
    if not unconditional:
        load_tokenizer(path)
        parts["text_encoder"] = text_encoder_without_weights(path)
    for name, model in parts.items():
        if model is not None:
            check_weights(path, name, model)


def check_tiny_decoder(path: str, pipeline: str) -> None:
    """Raises BaseModelError if it is no AutoencoderTiny, or decodes other latents than the pipeline's."""
    tiny, vae = tiny_without_weights(path).config, without_weights(pipeline)[1]
    if vae is None:
        raise BaseModelError(f"objective.forward_looking_decoder: {pipeline} has no VAE that a tiny one could spare")
    tiny_shape = tiny.latent_channels, 2 ** (len(tiny.decoder_block_out_channels) - 1)
    shape = vae.config.latent_channels, 2 ** (len(vae.config.block_out_channels) - 1)
    if tiny_shape != shape:
        raise BaseModelError(
            f"model.tiny_decoder: {path} decodes (channels, magnification) {tiny_shape}, the VAE of {pipeline} {shape}"
        )


def check_weights(path: str, name: str, model: nn.Module) -> None:
    """Raises BaseModelError as `part_shapes`, and where a part's file has a tensor in another shape than its model or
    lacks it: libraries would make one up at random. `model` may be on the meta device."""
    there = {_today(key): shape for key, shape in (part_shapes(path, name) or {}).items()}
    for key, tensor in model.state_dict().items() if there else ():
        if (shape := there.get(_today(key))) != list(tensor.shape):
            has = f"has no {key}" if shape is None else f"has {key} of shape {shape}"
            file = Path(path, name, part_file(name))
            raise BaseModelError(f"model.path: {file} {has}, its config.json says {list(tensor.shape)}; {AGAIN}")


def _today(key: str) -> str:
    """The name that a tensor has today."""
    key = key.removeprefix("text_model.")
    return re.sub(r"(?<=\.)(query|key|value|proj_attn)(?=\.(weight|bias)$)", lambda match: OLD_NAMES[match[0]], key)


def without_weights(path: str) -> tuple[Any, Any]:
    """U-Net and VAE (None if there is none) on torch's meta device, for counting. Raises BaseModelError."""
    from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel

    def empty(kind: Any, name: str) -> Any:
        config = part_config(path, name)
        with load_errors(path, part=f"{name}/config.json"), torch.device("meta"):
            return kind.from_config(config)

    if is_unconditional(path):
        return empty(UNet2DModel, "unet"), None
    return empty(UNet2DConditionModel, "unet"), empty(AutoencoderKL, "vae")


def text_encoder_without_weights(path: str) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = part_config(path, "text_encoder")
    with load_errors(path, part="text_encoder/config.json"), torch.device("meta"):
        return CLIPTextModel(CLIPTextConfig.from_dict(config))


def tiny_without_weights(path: str) -> Any:
    """The AutoencoderTiny on torch's meta device. Raises as check_tiny_decoder."""
    from diffusers import AutoencoderTiny

    folder = locate(path, *TINY_DECODER)
    with load_errors(path, TINY_DECODER[1]), torch.device("meta"):
        return AutoencoderTiny.from_config(AutoencoderTiny.load_config(folder))
