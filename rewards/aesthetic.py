"""LAION's aesthetic predictor: OpenAI's CLIP ViT-L/14 image embedding, of length 1, into a linear stack. About 1 to 10.

github.com/christophschuhmann/improved-aesthetic-predictor; the head as DDPO uses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn
from transformers import CLIPConfig, CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPVisionModelWithProjection

from rewards import preprocess
from rewards.network import check_keys, fill, full_precision, head_layout, match, on_meta, score_head, shapes_of
from rewards.weights import Asset, BadWeights, find, read

HEAD, CLIP = "trl-lib/ddpo-aesthetic-predictor:aesthetic-model.pth", "openai/clip-vit-large-patch14"
TOWER = ("vision_model.", "visual_projection.")
OTHERS = ("text_model.", "text_projection.", "logit_scale", "vision_model.embeddings.position_ids")  # not needed


class Network(nn.Module):
    """Normalised pixels [B, 3, S, S] -> scores [B]."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.clip = CLIPVisionModelWithProjection(config)
        self.head = score_head(config.projection_dim)

    def forward(self, pixels: Tensor) -> Tensor:
        embedding = self.clip.visual_projection(self.clip.vision_model(pixel_values=pixels).pooler_output)
        return self.head(embedding / embedding.norm(dim=-1, keepdim=True))[:, 0]


class Aesthetic:
    """How well liked a picture would be, whatever the prompt."""

    name = "aesthetic"
    differentiable = True

    @staticmethod
    def assets(weights: str | None = None, *, clip: str = CLIP) -> list[Asset]:
        """What `__init__` reads."""
        return [
            Asset("reward.weights", weights or HEAD, ("aesthetic-model.pth",)),
            Asset("reward.options.clip", clip, ("config.json", "model.safetensors|pytorch_model.bin"), folder=True),
        ]

    def __init__(self, weights: str | None = None, device: str = "cpu", *, clip: str = CLIP) -> None:
        """`weights`: the head's file; `clip`: the folder or hub id of OpenAI's CLIP as transformers saves it.

        Raises:
            WeightsNotFound, BadWeights: see there.
        """
        head, folder = find(self.assets(weights, clip=clip))
        config = vision_config(folder / "config.json")
        network = on_meta(lambda: Network(config))
        layout = head_layout("layers.", config.projection_dim)
        state = read(head)
        check_keys(shapes_of(state), layout, f"{head}: no aesthetic head")
        saved = next(path for name in ("model.safetensors", "pytorch_model.bin") if (path := folder / name).is_file())
        tower = {key: value for key, value in read(saved).items() if not key.startswith(OTHERS)}
        check_keys(shapes_of(tower), shapes_of(network.clip.state_dict()), f"{saved}: no CLIP image tower")
        joined = {f"clip.{key}": value for key, value in tower.items()}
        joined |= {key.replace("layers.", "head.", 1): value for key, value in state.items()}
        self.network = fill(network, joined, head, device)
        self.side = config.image_size

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images [B, 3, H, W] in [0, 1], prompts ignored -> [B], with autograd to the images."""
        match(images, prompts)
        weight = next(self.network.parameters())
        pixels = preprocess.short_side(images, self.side).to(weight.device, weight.dtype)
        with full_precision(weight.device):
            return self.network(pixels)


def vision_config(path: Path) -> CLIPVisionConfig:
    """Of the image tower.

    Raises:
        BadWeights: not CLIP's, or not with OpenAI's activation, which the head was trained on.
    """
    try:
        whole = CLIPConfig.from_json_file(path)
    except Exception as error:  # json, and transformers' own validation
        raise BadWeights(f"{path} is no configuration of a CLIP model: {type(error).__name__}: {error}") from error
    config = whole.vision_config
    config.projection_dim = whole.projection_dim
    config._attn_implementation = "sdpa"
    if config.hidden_act != "quick_gelu":
        raise BadWeights(f"{path}: hidden_act is {config.hidden_act}, expected quick_gelu, as in OpenAI's CLIP")
    return config
