"""CLIP score (arXiv 2104.08718): 2.5 times the cosine of CLIP's embeddings of picture and prompt, or 0 below 0.

The cut is the authors'. It leaves no gradient below 0, where no picture gets under a real CLIP: its embeddings of
pictures and of texts are all within one cone. "A photo depicts", which they put before captions, is not added: prompts
may ask for a drawing."""

from torch import Tensor

from rewards import clip
from rewards.weights import Asset, find

WEIGHT = 2.5


class Network(clip.Network):
    """Normalised pixels [B, 3, S, S] and token ids [B, 77] -> scores [B] in [0, 2.5]."""

    def forward(self, pixels: Tensor, ids: Tensor) -> Tensor:  # type: ignore[override]
        return WEIGHT * super().forward(pixels, ids).clamp(min=0)


class ClipScore(clip.ClipReward):
    name = "clip_score"

    @staticmethod
    def assets(weights: str | None = None) -> list[Asset]:
        """What is read: a CLIP with its tokenizer as transformers saves them, a folder or hub id."""
        return [clip.asset("reward.weights", weights or clip.CLIP, *clip.WHOLE)]

    def __init__(self, weights: str | None = None, device: str = "cpu") -> None:
        """Raises WeightsNotFound, BadWeights."""
        [folder] = find(self.assets(weights))
        super().__init__(*clip.load(Network, folder, device))
