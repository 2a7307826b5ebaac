"""PickScore v1 (arXiv 2305.01569, github.com/yuvalkirstain/PickScore): how well people would prefer a picture for its
prompt. A CLIP ViT-H/14 tuned on their choices: exp(logit_scale) times the cosine of both embeddings, about 15 to 25."""

from torch import Tensor

from rewards import clip
from rewards.network import Sizes, fill
from rewards.weights import Asset, find, read

WEIGHTS, TOKENIZER = "yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class Network(clip.Network):
    """Normalised pixels [B, 3, S, S] and token ids [B, 77] -> scores [B]."""

    def forward(self, pixels: Tensor, ids: Tensor) -> Tensor:  # type: ignore[override]
        return self.logit_scale.exp() * super().forward(pixels, ids)


class PickScore(clip.ClipReward):
    name = "pickscore"

    @staticmethod
    def assets(weights: str | None = None, *, tokenizer: str = TOKENIZER, size: Sizes = None) -> list[Asset]:
        """What is read: `weights`, as transformers saves them, and CLIP's `tokenizer`, a folder or hub id. `size`: of
        `clip.vit_h`, where it is not the published one. Raises ValueError or TypeError for others."""
        clip.vit_h(**size or {})
        file = Asset("reward.weights", weights or WEIGHTS, (clip.SAVED,))
        return [file, clip.asset("reward.options.tokenizer", tokenizer, *clip.WORDS)]

    def __init__(
        self, weights: str | None = None, device: str = "cpu", *, tokenizer: str = TOKENIZER, size: Sizes = None
    ) -> None:
        """As `assets`. Raises WeightsNotFound, BadWeights."""
        file, folder = find(self.assets(weights, tokenizer=tokenizer, size=size))
        config = clip.vit_h(**size or {})
        network = fill(lambda: Network(config), read(file), f"{file}: no PickScore", device, unused=clip.POSITIONS)
        super().__init__(network, clip.load_tokenizer(folder, config))
