"""What a weights file is, by the names of its tensors: a checkpoint, a part, or a LoRA, and of which kind of model.
Imports neither torch nor diffusers, and unpickles nothing."""

import re
from collections.abc import Iterable
from pathlib import Path

from diffusion.families import FAMILIES

AGAIN = "copy or download it again"
LORA = re.compile(r"[._]lora\d*[._](A|B|up|down|linear_layer)\b|\.lora_|\.hada_|\.lokr_")
SD, PIXELS, XL, SD3, FLUX = (family.words for family in FAMILIES)
# By the names of a checkpoint's tensors, each of which must be in some: of whom, pipeline, class of the denoiser.
CHECKPOINTS = (
    (("double_blocks.0.img_attn.", "vector_in."), FLUX, "FluxPipeline", "FluxTransformer2DModel"),
    (("joint_blocks.0.",), SD3, "StableDiffusion3Pipeline", "SD3Transformer2DModel"),
    (("conditioner.embedders.1.", "model.diffusion_model."), XL, "StableDiffusionXLPipeline", ""),
    (("cond_stage_model.", "model.diffusion_model."), SD, "StableDiffusionPipeline", ""),
)
WHOLE = ("text_encoders.", "conditioner.", "cond_stage_model.")  # a file with one has text encoders
PARTS = (  # beginnings of names in the parts of diffusers' folders
    (("transformer_blocks.", "single_transformer_blocks."), "transformer"),
    (("down_blocks.", "up_blocks."), "U-Net"),
    (("encoder.down_blocks.", "decoder.up_blocks."), "VAE"),
    (("text_model.", "encoder.block.", "encoder.layers."), "text encoder"),
)
# By the names of a LoRA's or a network's modules, with dots or kohya's underscores; the first that matches.
NETWORKS = (
    (r"single_transformer_blocks|double_blocks|single_blocks", FLUX),
    (r"joint_blocks|(^|transformer[._])transformer_blocks", SD3),
    (r"input_blocks|output_blocks|middle_block|attentions[._]\d+[._]transformer_blocks[._][1-9]|^lora_te[12]_", XL),
    (r"attentions[._]\d+[._]transformer_blocks", SD),
    (r"(down|up|mid)_blocks?[._].*attentions[._]\d+[._]to_", PIXELS),
)


def network_of(names: Iterable[str]) -> str | None:
    """Whose network has modules of these names, or those that a LoRA of these adapts; None: they do not tell. A LoRA of
    FLUX on its double blocks alone has Stable Diffusion 3's names."""
    names = list(names)
    return next((words for pattern, words in NETWORKS if any(re.search(pattern, name) for name in names)), None)


def described(file: Path) -> str:
    """What a file is that was named in place of a diffusers folder, and how it becomes one."""
    if file.suffix != ".safetensors":
        return (
            f"a {file.suffix or 'nameless'} file, and not opened: such files can hold code. If it is a checkpoint, "
            "convert it to .safetensors on a machine where it is trusted, and name that file here to be told the rest"
        )
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), "np") as opened:
            names = list(opened.keys())
    except (SafetensorError, OSError) as error:
        return f"no whole safetensors file ({' '.join(str(error).split())[:200]}); {AGAIN}"
    if any(LORA.search(name) for name in names):
        whose = network_of(names)
        return (
            f"a LoRA{f' of {whose}' if whose else ''}, no model: name the folder of the model that it was made for; "
            "learner.generate --lora draws with a LoRA"
        )
    for marks, words, pipeline, denoiser in CHECKPOINTS:
        if all(any(mark in name for name in names) for mark in marks):
            if any(name.startswith(WHOLE) for name in names):
                return f"a checkpoint of {words} in one file: {_conversion(pipeline, 'FOLDER')}"
            way = _conversion(denoiser, "FOLDER/transformer")
            return f"the transformer of {words} alone: {way}, where FOLDER has the other parts of a {pipeline}"
    for beginnings, part in PARTS:
        if any(name.startswith(beginnings) for name in names):
            return f"a {part} alone, a part of a diffusers folder: name the folder with the model_index.json"
    return f"of no known kind: {len(names)} tensors, as {' '.join(min(names, default='none').split()):.100}"


def _conversion(kind: str, folder: str) -> str:
    return f"diffusers.{kind}.from_single_file(FILE).save_pretrained({folder})"
