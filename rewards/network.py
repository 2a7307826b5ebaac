"""What the reward models share: how they see pictures, and how they are built from published weights.

CLIP's and BLIP's authors resize 8-bit pictures with PIL, which autograd does not reach through; torch's bicubic resize
has the same kernel, but does not round to 8 bits in between. So there is one for reports, one for gradients."""

from collections.abc import Callable, Mapping, Sequence
from textwrap import shorten
from typing import NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from rewards.weights import BadWeights

Module = TypeVar("Module", bound=nn.Module)
Sizes = dict[str, int] | None  # that differ from the published model's
MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, RGB
STD = (0.26862954, 0.26130258, 0.27577711)


def short_side(images: Tensor, side: int, half: Callable[[float], int] = round) -> Tensor:
    """The short side to `side`, the centre cut out, normalised: CLIP, BLIP. [B, 3, H, W] in [0, 1] -> [B, 3, side,
    side]. By PIL, unless the images need a gradient. Where the centre is between two pixels torchvision rounds, and
    transformers does not: there `half` is int."""
    height, width = images.shape[-2:]
    longer = int(side * max(height, width) / min(height, width))
    size = (longer, side) if height > width else (side, longer)
    by_torch = images.requires_grad and torch.is_grad_enabled()
    resized = _resize(images, size) if by_torch else _resize_as_pictures(images, size)
    top, left = half((size[0] - side) / 2), half((size[1] - side) / 2)
    return _normalise(resized[..., top : top + side, left : left + side])


def long_side(images: Tensor, side: int) -> Tensor:
    """The long side to `side`, padded with black to a square, normalised: HPSv2, which resizes tensors itself."""
    scale = side / max(images.shape[-2:])
    height, width = (round(length * scale) for length in images.shape[-2:])
    resized = _resize(images, (height, width))
    down, right = side - height, side - width
    return _normalise(F.pad(resized, (right // 2, right - right // 2, down // 2, down - down // 2)))


def _normalise(images: Tensor) -> Tensor:
    return (images - images.new_tensor(MEAN)[:, None, None]) / images.new_tensor(STD)[:, None, None]


def _resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    images = images.to(torch.promote_types(images.dtype, torch.float32))
    if tuple(images.shape[-2:]) == size:
        return images
    return F.interpolate(images, size, mode="bicubic", align_corners=False, antialias=True)


def _resize_as_pictures(images: Tensor, size: tuple[int, int]) -> Tensor:
    images = images.detach().to(torch.promote_types(images.dtype, torch.float32))
    pixels = images.clamp(0, 1).mul(255).round().to(torch.uint8)
    if tuple(images.shape[-2:]) != size:
        pictures = [
            np.asarray(Image.fromarray(picture).resize(size[::-1], Image.Resampling.BICUBIC))
            for picture in pixels.permute(0, 2, 3, 1).cpu().numpy()
        ]
        pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).to(images.device)
    return pixels.float() / 255


class NetworkReward:
    differentiable = True
    resize: Callable[[Tensor, int], Tensor] = staticmethod(short_side)

    def __init__(self, network: nn.Module, side: int) -> None:
        self.network, self.side = network, side

    def tokens(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        """[B, length] each; nothing where prompts do not matter."""
        return ()

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images [B, 3, H, W] in [0, 1], B prompts -> [B] float32, with autograd to the images."""
        if images.ndim != 4 or images.shape[1] != 3 or len(images) != len(prompts):
            raise ValueError(f"expected images [B, 3, H, W] and B prompts, got {list(images.shape)} and {len(prompts)}")
        weight = next(self.network.parameters())
        pixels = self.resize(images, self.side).to(weight.device, weight.dtype)
        tokens = [ids.to(weight.device) for ids in self.tokens(prompts)]
        with torch.autocast(weight.device.type, enabled=False):  # the caller's does not reach a reward model
            return self.network(pixels, *tokens)


class Published(NamedTuple):
    """Where a network's tensor is in its authors' checkpoint."""

    key: str
    third: int | None = None  # of a tensor that is q, k and v
    transposed: bool = False


def layout(network: nn.Module, published: Callable[[str], Published] = Published) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for key, tensor in network.state_dict().items():
        origin, shape = published(key), tuple(tensor.shape)
        if origin.third is not None:
            shape = (3 * shape[0], *shape[1:])
        shapes[origin.key] = shape[::-1] if origin.transposed else shape
    return shapes


def fill(
    make: Callable[[], Module], state: Mapping[str, Tensor], what: str, device: str = "cpu",
    published: Callable[[str], Published] = Published, unused: tuple[str, ...] = (),
) -> Module:  # fmt: skip
    """The network that `make` builds, with its tensors as float32, frozen and in evaluation mode. `state` holds the
    checkpoint's tensors: `layout`'s, and `unused` ones, by how their keys begin. Raises BadWeights, which names `what`,
    and the keys that are missing, extra or of another shape."""
    with torch.device("meta"):
        network = make()
    wanted = layout(network, published)
    held = {key: tensor for key, tensor in state.items() if not key.startswith(unused)}
    shapes = {key: tuple(tensor.shape) for key, tensor in held.items()}
    faults = {
        "missing": [key for key in wanted if key not in held],
        "extra": [key for key in held if key not in wanted],
        "of another shape": [
            f"{key} {list(shapes[key])} (expected {list(shape)})"
            for key, shape in wanted.items()
            if shapes.get(key, shape) != shape
        ],
    }
    texts = [f"{len(keys)} {kind}: {shorten(', '.join(keys), 400)}" for kind, keys in faults.items() if keys]
    if texts:
        raise BadWeights(f"{what}, of {len(wanted)} keys {'; '.join(texts)}")
    tensors = {}
    for key in network.state_dict():
        origin = published(key)
        tensor = held[origin.key].float()
        if origin.third is not None:
            tensor = tensor.chunk(3)[origin.third]
        tensors[key] = tensor.T if origin.transposed else tensor
    network.load_state_dict(tensors, strict=True, assign=True)
    for part in network.modules():
        if isinstance(ids := getattr(part, "position_ids", None), Tensor):  # [1, length], in no checkpoint
            part.position_ids = torch.arange(ids.shape[-1])[None]
    return network.eval().requires_grad_(False).to(device)


def score_head(width: int) -> nn.Sequential:
    """The linear stack width-1024-128-64-16-1 of aesthetic predictor and ImageReward: keys 0, 2, 4, 6 and 7, for its
    authors trained it with dropout in between."""
    first = [nn.Linear(width, 1024), nn.Identity(), nn.Linear(1024, 128), nn.Identity(), nn.Linear(128, 64)]
    return nn.Sequential(*first, nn.Identity(), nn.Linear(64, 16), nn.Linear(16, 1))


def tower(width: int, layers: int, heads: int) -> dict[str, int]:
    """A transformer's part of its configuration; the MLPs are four times as wide."""
    sizes = {"hidden_size": width, "intermediate_size": 4 * width}
    return sizes | {"num_hidden_layers": layers, "num_attention_heads": heads}
