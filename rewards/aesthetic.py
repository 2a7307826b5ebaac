"""LAION's aesthetic predictor: OpenAI's CLIP ViT-L/14 image embedding, of length 1, into a linear stack. About 1 to 10.

github.com/christophschuhmann/improved-aesthetic-predictor; the head as DDPO uses it."""

from functools import partial
from pathlib import Path

from torch import Tensor, nn
from transformers.models.clip.modeling_clip import CLIPVisionModelWithProjection

from rewards.clip import CLIP, POSITIONS, SAVED, asset, saved_config
from rewards.network import NetworkReward, Published, fill, score_head
from rewards.weights import Asset, BadWeights, find, read

HEAD = "trl-lib/ddpo-aesthetic-predictor:aesthetic-model.pth"
OTHERS = ("text_model.", "text_projection.", "logit_scale", *POSITIONS)  # of CLIP, not needed


class Network(nn.Module):
    """Normalised pixels [B, 3, S, S] -> scores [B]."""

    def __init__(self, clip: CLIPVisionModelWithProjection, head: nn.Module) -> None:
        super().__init__()
        self.clip, self.head = clip, head

    def forward(self, pixels: Tensor) -> Tensor:
        embedding = self.clip.visual_projection(self.clip.vision_model(pixel_values=pixels).pooler_output)
        return self.head(embedding / embedding.norm(dim=-1, keepdim=True))[:, 0]


class Aesthetic(NetworkReward):
    name = "aesthetic"

    @staticmethod
    def assets(weights: str | None = None, *, clip: str = CLIP) -> list[Asset]:
        """What is read: the head's file, and the folder or hub id of OpenAI's CLIP as transformers saves it."""
        head = Asset("reward.weights", weights or HEAD, ("aesthetic-model.pth",))
        return [head, clip_asset("reward.options.clip", clip)]

    def __init__(self, weights: str | None = None, device: str = "cpu", *, clip: str = CLIP) -> None:
        """Raises WeightsNotFound, BadWeights."""
        file, folder = find(self.assets(weights, clip=clip))
        tower = clip_tower(folder, device)
        make = partial(score_head, tower.config.projection_dim)
        head = fill(make, read(file), f"{file}: no aesthetic head", device, lambda key: Published(f"layers.{key}"))
        super().__init__(Network(tower, head), tower.config.image_size)


def clip_asset(key: str, source: str) -> Asset:
    return asset(key, source, "config.json", SAVED)


def clip_tower(folder: Path, device: str) -> CLIPVisionModelWithProjection:
    """The image tower of OpenAI's CLIP, from the folder that `clip_asset` names. Raises BadWeights where it is not
    CLIP's, or not with OpenAI's activation, which the aesthetic head was trained on."""
    config = saved_config(folder).vision_config
    if config.hidden_act != "quick_gelu":
        file = folder / "config.json"
        raise BadWeights(f"{file}: hidden_act is {config.hidden_act}, expected quick_gelu, as in OpenAI's CLIP")
    make, what = partial(CLIPVisionModelWithProjection, config), f"{folder / SAVED}: no CLIP image tower"
    return fill(make, read(folder / SAVED), what, device, unused=OTHERS)
