"""Kinds of pipelines that can be trained, told by the class that a folder's model_index.json names.

A family's own code is a subclass of BaseModel in the module of its name, or BaseModel itself. Imports neither torch nor
diffusers: a path is checked before anything slow starts."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Family:
    name: str  # of the module with its base model
    pipelines: tuple[str, ...]  # diffusers' classes
    words: str
    parts: Mapping[str, str]  # the class that the index must name for each part: other ones would be loaded as these
    optional: Mapping[str, str] = field(default_factory=dict)  # parts that may be null
    text: bool = True  # takes prompts, and has a VAE
    flow: bool = False  # rectified flow: the network predicts a velocity
    t5_tokens: int = 0  # that the pipeline has its T5 read, by default
    distilled: bool = False  # guidance is told to the network: one pass, and there is no output without it

    @property
    def all_parts(self) -> Mapping[str, str]:
        return {**self.parts, **self.optional}

    @property
    def network(self) -> str:  # the part that denoises
        return next(name for name in self.parts if name in ("unet", "transformer"))


FAMILIES = (
    Family(
        "base_model",
        ("StableDiffusionPipeline",),
        "Stable Diffusion 1.x, 2.x",
        {
            "unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel",
            "tokenizer": "CLIPTokenizer",
        },
    ),
    Family("base_model", ("DDPMPipeline", "DDIMPipeline"), "pixels without text", {"unet": "UNet2DModel"}, text=False),
    Family(
        "sdxl",
        ("StableDiffusionXLPipeline",),
        "Stable Diffusion XL",
        {
            "unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel",
            "tokenizer": "CLIPTokenizer", "text_encoder_2": "CLIPTextModelWithProjection",
            "tokenizer_2": "CLIPTokenizer",
        },
    ),
    Family(
        "sd3",
        ("StableDiffusion3Pipeline",),
        "Stable Diffusion 3, 3.5",
        {
            "transformer": "SD3Transformer2DModel", "vae": "AutoencoderKL",
            "text_encoder": "CLIPTextModelWithProjection", "tokenizer": "CLIPTokenizer",
            "text_encoder_2": "CLIPTextModelWithProjection", "tokenizer_2": "CLIPTokenizer",
            "scheduler": "FlowMatchEulerDiscreteScheduler",
        },
        {"text_encoder_3": "T5EncoderModel", "tokenizer_3": "T5Tokenizer"},
        flow=True,
        t5_tokens=256,
    ),
    Family(
        "flux",
        ("FluxPipeline",),
        "FLUX.1",
        {
            "transformer": "FluxTransformer2DModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel",
            "tokenizer": "CLIPTokenizer", "text_encoder_2": "T5EncoderModel", "tokenizer_2": "T5Tokenizer",
            "scheduler": "FlowMatchEulerDiscreteScheduler",
        },
        flow=True,
        t5_tokens=512,
        distilled=True,
    ),
)  # fmt: skip


def known() -> str:
    """All that can be trained, for messages."""
    return "; ".join(f"{', '.join(family.pipelines)} ({family.words})" for family in FAMILIES)
