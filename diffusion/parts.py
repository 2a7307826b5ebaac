"""The parts of a pipeline, looked at without their weights: what cannot be used is refused before a run starts."""

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffusion.families import Family
from diffusion.locate import (
    AGAIN,
    INDEX,
    TINY_DECODER,
    BaseModelError,
    family_of,
    is_unconditional,
    load_errors,
    locate,
    part_config,
    part_file,
    part_shapes,
    pipeline_index,
)

# U-Nets with one of these take more than latents, a timestep and text.
MORE_INPUTS = (
    "num_class_embeds", "class_embed_type", "addition_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim",
)  # fmt: skip
PACKED = 2  # side of the latents that FLUX makes one token of
T5 = "T5EncoderModel"
# Names in files from before diffusers 0.16, which it still reads; transformers 5 has left out the prefix of 4.
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def load_scheduler(path: str) -> Any:
    """The DDIMScheduler that stands in for a pipeline's; of a flow model its own. Raises BaseModelError as
    `is_unconditional`, if none can."""
    import diffusers

    config, file = part_config(path, "scheduler"), "scheduler/scheduler_config.json"
    name, schedule = config.get("_class_name"), config.get("beta_schedule")
    if family_of(path).flow:
        if name != "FlowMatchEulerDiscreteScheduler":
            raise BaseModelError(
                f"model.path: {path}/{file} names {name}, not FlowMatchEulerDiscreteScheduler; {AGAIN}"
            )
        with load_errors(path, part=file):
            return diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
    if "DDIMScheduler" not in getattr(getattr(diffusers, str(name), None), "_compatibles", ()):
        raise BaseModelError(f"model.path: {path}/{file} names {name}, a scheduler that DDIM cannot stand in for")
    # As StableDiffusionPipeline itself sets them, whatever the file says: latents are not clipped.
    changes = {} if is_unconditional(path) else {"clip_sample": False, "steps_offset": 1}
    with load_errors(path, part=file):
        try:
            return diffusers.DDIMScheduler.from_config(config, **changes)
        except NotImplementedError as error:
            raise ValueError(f"its beta_schedule is {schedule!r}, which DDIM does not have") from error


def load_tokenizer(path: str, number: str = "") -> Any:
    """Of a pipeline with text, the CLIP one of this `number` (_2). Raises BaseModelError as `is_unconditional`, and if
    it does not fit the text encoder."""
    from transformers import CLIPTokenizer

    encoder = part_config(path, f"text_encoder{number}")
    with load_errors(path, part=f"tokenizer{number}"):
        tokenizer = CLIPTokenizer.from_pretrained(locate(path), subfolder=f"tokenizer{number}")
        if len(tokenizer) != (tokens := encoder.get("vocab_size", 49408)):
            raise ValueError(f"it knows {len(tokenizer)} tokens, the text encoder's config.json {tokens} (vocab_size)")
        given, most = tokenizer.model_max_length, encoder.get("max_position_embeddings", 77)
        if given > most:
            said = f"model_max_length {given}" if given < 1e9 else "no model_max_length"
            raise ValueError(f"its tokenizer_config.json says {said}, the text encoder reads {most} tokens")
    return tokenizer


def load_t5_tokenizer(path: str, number: str) -> Any:
    """Raises BaseModelError where it cannot be loaded or does not fit its encoder: one without its file would be empty,
    and read every word as unknown. Encoders have a multiple of 128 tokens, of which the last may be unused."""
    from transformers import T5Tokenizer

    with load_errors(path, part=f"tokenizer{number}"):
        tokenizer = T5Tokenizer.from_pretrained(locate(path), subfolder=f"tokenizer{number}")
        known, tokens = len(tokenizer), part_config(path, f"text_encoder{number}").get("vocab_size", 32128)
        if not tokens - 128 < known <= tokens:
            raise ValueError(f"it knows {known} tokens, the text encoder's config.json {tokens} (vocab_size)")
    return tokenizer


def cut_prompts(path: str, prompts: Sequence[str], text_tokens: int | None = None) -> str | None:
    """What is to be said of prompts longer than the text encoder reads, whose rest is cut; raises as load_tokenizer.
    Where a T5 reads them too, it is what that one cuts at `text_tokens`, by default its pipeline's."""
    prompts = list(dict.fromkeys(prompts))
    if number := t5_number(path):
        tokenizer, limit = load_t5_tokenizer(path, number), text_tokens or family_of(path).t5_tokens
    else:
        tokenizer = load_tokenizer(path)
        limit = tokenizer.model_max_length
    lengths = [len(ids) for ids in tokenizer(prompts).input_ids]
    cut = [prompt for prompt, length in zip(prompts, lengths, strict=True) if length > limit]
    if not cut:
        return None
    ids = tokenizer(cut[0], truncation=True, max_length=limit).input_ids
    read = tokenizer.decode(ids, skip_special_tokens=True)
    return (
        f"{len(cut)} of {len(prompts)} prompts are longer than the {limit} tokens that {path} reads: of "
        f"{textwrap.shorten(cut[0], 200)!r} it reads {textwrap.shorten(read, 200)!r}"
    )


def check_parts(path: str, whole: bool = True) -> None:
    """Raises BaseModelError where a part is absent or damaged, is not what its configuration says, or cannot be trained
    here. Of weights only the headers are read, and unless `whole` neither they nor tokenizers."""
    index, family = pipeline_index(path), family_of(path)
    unconditional = not family.text
    for name, kind in {"scheduler": "a scheduler of diffusers", **family.all_parts}.items():
        found = _class_of(index, name)
        if found is None and name in family.optional:
            continue
        any_scheduler = name == "scheduler" and isinstance(found, str) and "." not in found
        any_scheduler &= name not in family.parts
        if str(found).removesuffix("Fast") != kind and not any_scheduler:
            raise BaseModelError(f"model.path: the {INDEX} of {path} names {found} as its {name}, not {kind}; {AGAIN}")
    if family.flow:
        _check_transformer(path, family, whole)
        return
    unet = part_config(path, "unet")
    wanted: dict[str, Any] = dict.fromkeys(MORE_INPUTS)
    if unconditional:
        channels = 3
    else:
        channels = part_config(path, "vae").get("latent_channels", 4)
        encoders = [part_config(path, name) for name in family.parts if name.startswith("text_encoder")]
        widths = [encoder.get("hidden_size") for encoder in encoders]
        wanted["cross_attention_dim"] = sum(widths) if all(widths) else None
        if family.name == "sdxl":
            told = encoders[1].get("projection_dim", 0) + 6 * (unet.get("addition_time_embed_dim") or 0)
            wanted |= {"addition_embed_type": "text_time", "projection_class_embeddings_input_dim": told}
    wanted |= {"in_channels": channels, "out_channels": channels}
    faults = [f"its {key} is {unet[key]}, not {good}" for key, good in wanted.items() if unet.get(key, good) != good]
    if not isinstance(unet.get("sample_size"), int):
        faults.append(f"its sample_size is {unet.get('sample_size')}, no single number")
    blocks = [*unet.get("down_block_types", ()), *unet.get("up_block_types", ())]
    if unconditional and not unet.get("add_attention", True) and not any("Attn" in block for block in blocks):
        faults.append("it has no attention for a LoRA to adapt")
    if faults:
        raise BaseModelError(f"model.path: the U-Net of {path} cannot be used: {', '.join(faults)}")
    if not whole:
        return
    parts = dict(zip(("unet", "vae"), without_weights(path), strict=True))
    if not unconditional:
        parts |= text_encoders_without_weights(path)
    for name in family.parts:
        if name.startswith("tokenizer"):
            load_tokenizer(path, name.removeprefix("tokenizer"))
    for name, model in parts.items():
        if model is not None:
            check_weights(path, name, model)


def _class_of(index: dict[str, Any], name: str) -> str | None:
    """The class that a pipeline's index names for a part, with its library, if that is another than it should be; None:
    it has none."""
    entry = index.get(name)
    if not isinstance(entry, list) or len(entry) != 2 or entry[1] is None:
        return None
    library = "transformers" if name.startswith(("text_encoder", "tokenizer")) else "diffusers"
    return entry[1] if entry[0] == library else f"{entry[0]}.{entry[1]}"


def reads_by_t5(path: str) -> bool:
    """Whether a T5 reads the prompts beside CLIP."""
    return t5_number(path) is not None


def t5_number(path: str) -> str | None:
    """Of the T5 that reads the prompts beside CLIP (_2 or _3), if there is one."""
    family, index = family_of(path), pipeline_index(path)
    encoders = [name for name, kind in family.all_parts.items() if kind == T5]
    return next((name.removeprefix("text_encoder") for name in encoders if _class_of(index, name) == T5), None)


def _check_transformer(path: str, family: Family, whole: bool) -> None:
    """Of a Stable Diffusion 3 or FLUX pipeline: raises as check_parts."""
    config, channels = part_config(path, "transformer"), part_config(path, "vae").get("latent_channels", 4)
    encoders: list[dict[str, Any]] = []  # whose rows are side by side
    if family.name == "flux":
        clip, t5 = part_config(path, "text_encoder"), part_config(path, "text_encoder_2")
        wanted = {"in_channels": PACKED**2 * channels, "joint_attention_dim": t5.get("d_model")}
        wanted["pooled_projection_dim"] = clip.get("hidden_size")
    else:
        encoders = [part_config(path, f"text_encoder{number}") for number in ("", "_2")]
        pooled = sum(encoder.get("projection_dim", 0) for encoder in encoders)
        wanted = {"in_channels": channels, "out_channels": channels, "pooled_projection_dim": pooled}
        if reads_by_t5(path):
            wanted["joint_attention_dim"] = part_config(path, "text_encoder_3").get("d_model")
    faults = [
        f"its {key} is {config[key]}, not {good}" for key, good in wanted.items() if config.get(key, good) != good
    ]
    width, most = sum(encoder.get("hidden_size", 0) for encoder in encoders), config.get("joint_attention_dim", 4096)
    if encoders and not (isinstance(most, int) and width <= most):
        faults.append(f"its joint_attention_dim is {most}, less than {width} of CLIP")
    if faults:
        raise BaseModelError(f"model.path: the transformer of {path} cannot be used: {', '.join(faults)}")
    if not whole:
        return
    for number in ("", "_2")[: len(encoders) or 1]:
        load_tokenizer(path, number)
    if reads_by_t5(path):
        load_t5_tokenizer(path, "_2" if family.name == "flux" else "_3")
    parts = dict(zip(("transformer", "vae"), without_weights(path), strict=True))
    for name, model in {**parts, **text_encoders_without_weights(path)}.items():
        check_weights(path, name, model)


def magnification(path: str) -> int:
    """Pixels a side for each of the latents'."""
    if not family_of(path).text:
        return 1
    return 2 ** (len(part_config(path, "vae").get("block_out_channels", [0])) - 1)


def latent_shape(path: str, pixels: int | None = None) -> tuple[int, int, int]:
    """C, H, W of a pipeline's states, for pictures of a side of `pixels`; None: its own. Raises BaseModelError as
    `is_unconditional`, and for a size that its network cannot have."""
    family, scale = family_of(path), magnification(path)
    config = part_config(path, family.network)
    channels, side = config.get("in_channels", 4), config.get("sample_size") or 128
    if family.name == "flux":  # packed; the pipeline's own size
        channels, side = channels // PACKED**2, 128
    if pixels is None:
        return channels, side, side
    if family.network == "unet":
        step = scale * 2 ** (len(config.get("block_out_channels", [0])) - 1)
    else:
        step = scale * (PACKED if family.name == "flux" else config.get("patch_size", 2))
    if pixels % step:
        raise BaseModelError(f"model.pixels: {pixels} is no multiple of {step}, as {path} needs")
    most = config.get("pos_embed_max_size")
    if most and pixels // step > most:
        raise BaseModelError(f"model.pixels: {pixels} is more than {most * step}, for which {path} has places")
    return channels, pixels // scale, pixels // scale


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
    parameters = dict(model.named_parameters(remove_duplicate=False))  # what is tied has one name in the file
    held = {id(parameter) for key, parameter in parameters.items() if _today(key) in there}
    for key, tensor in model.state_dict().items() if there else ():
        if _today(key) not in there and id(parameters.get(key)) in held:
            continue
        if (shape := there.get(_today(key))) != list(tensor.shape):
            has = f"has no {key}" if shape is None else f"has {key} of shape {shape}"
            file = Path(path, name, part_file(name))
            raise BaseModelError(f"model.path: {file} {has}, its config.json says {list(tensor.shape)}; {AGAIN}")


def _today(key: str) -> str:
    """The name that a tensor has today."""
    key = key.removeprefix("text_model.")
    return re.sub(r"(?<=\.)(query|key|value|proj_attn)(?=\.(weight|bias)$)", lambda match: OLD_NAMES[match[0]], key)


def without_weights(path: str) -> tuple[Any, Any]:
    """The denoising network and VAE (None if there is none) on torch's meta device, for counting. Raises
    BaseModelError."""
    import diffusers

    def empty(kind: Any, name: str) -> Any:
        config = part_config(path, name)
        with load_errors(path, part=f"{name}/config.json"), torch.device("meta"):
            return kind.from_config(config)

    family = family_of(path)
    network = empty(getattr(diffusers, family.parts[family.network]), family.network)
    return network, empty(diffusers.AutoencoderKL, "vae") if family.text else None


def text_encoders_without_weights(path: str) -> dict[str, Any]:
    """Those that the pipeline has, by their parts' names, on torch's meta device. Raises BaseModelError."""
    import transformers

    family, index, found = family_of(path), pipeline_index(path), {}
    for name, kind in family.all_parts.items():
        if name.startswith("text_encoder") and _class_of(index, name) is not None:
            settings = transformers.T5Config if kind == "T5EncoderModel" else transformers.CLIPTextConfig
            config = part_config(path, name)
            with load_errors(path, part=f"{name}/config.json"), torch.device("meta"):
                found[name] = getattr(transformers, kind)(settings.from_dict(config))
    return found


def tiny_without_weights(path: str) -> Any:
    """The AutoencoderTiny on torch's meta device. Raises as check_tiny_decoder."""
    from diffusers import AutoencoderTiny

    folder = locate(path, *TINY_DECODER)
    with load_errors(path, TINY_DECODER[1]), torch.device("meta"):
        return AutoencoderTiny.from_config(AutoencoderTiny.load_config(folder))
