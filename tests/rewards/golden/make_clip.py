"""Golden values of PickScore and of the CLIP score by their published formulas, on transformers' own CLIPModel and
CLIPProcessor, of a release that is older than ours: `pip install --no-deps --target OLD transformers==4.49.0
tokenizers==0.21.4 huggingface-hub==0.36.2 requests==2.34.2 charset-normalizer==3.5.2`, then
`PYTHONPATH=OLD python tests/rewards/golden/make_clip.py`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import inputs
import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizerFast

assert transformers.__version__ == "4.49.0"
torch.set_default_dtype(torch.float64)
tiny = inputs.HPS_SIZE
folder = inputs.write_clip_tokenizer(Path(tempfile.mkdtemp()))
tokenizer = CLIPTokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt"))
side = tiny["image"]
processor = CLIPProcessor(
    CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}), tokenizer
)


def words(texts: list[str], **padding: object) -> dict[str, Tensor]:
    return processor(text=texts, truncation=True, max_length=77, return_tensors="pt", **padding)


def seen(pictures: list[np.ndarray]) -> Tensor:
    images = [Image.fromarray(picture) for picture in pictures]
    return processor(images=images, padding=True, truncation=True, max_length=77, return_tensors="pt")["pixel_values"]


def cosines(model: CLIPModel, pixels: Tensor, text: dict[str, Tensor]) -> Tensor:
    image_embs = model.get_image_features(pixel_values=pixels)
    image_embs = image_embs / torch.norm(image_embs, dim=-1, keepdim=True)
    text_embs = model.get_text_features(**text)
    text_embs = text_embs / torch.norm(text_embs, dim=-1, keepdim=True)
    return (text_embs @ image_embs.T).diagonal()


def pickscore(model: CLIPModel, pixels: Tensor, text: dict[str, Tensor]) -> Tensor:
    return model.logit_scale.exp() * cosines(model, pixels, text)


def clip_score(model: CLIPModel, pixels: Tensor, text: dict[str, Tensor]) -> Tensor:
    return 2.5 * torch.maximum(cosines(model, pixels, text), torch.zeros(()))


def make(name: str, config: dict, seed: int, score: Callable[..., Tensor]) -> None:
    model = CLIPModel(CLIPConfig(**config)).double().eval()
    held = inputs.state({key: tensor.shape for key, tensor in model.state_dict().items()}, seed)
    model.load_state_dict({key: torch.from_numpy(np.array(value)) for key, value in held.items()}, strict=True)
    pixels = torch.from_numpy(inputs.pixels(side)).requires_grad_()
    scores = score(model, pixels, words(inputs.PROMPTS, padding=True))
    gradients = torch.autograd.grad(scores.sum(), pixels)[0]
    # One by one, as the authors' examples; in float64, for which pixels of float32 are exact.
    pairs = zip(inputs.pictures(), inputs.REPORTED, strict=True)
    reported = [score(model, seen([picture]).double(), words([text], padding=True)).item() for picture, text in pairs]
    print(name, scores.tolist(), reported)
    tokens = words(inputs.TRICKY, padding="max_length")["input_ids"].numpy().astype(np.uint16)
    inputs.write(
        name, scores=scores.detach().numpy(), gradients=gradients.numpy(), reported=np.array(reported), tokens=tokens,
        preprocessed=np.stack([seen([picture])[0].numpy() for picture in inputs.pictures()]),
    )  # fmt: skip


make("pickscore", inputs.tiny_clip("gelu"), inputs.PICKSCORE_SEED, pickscore)
make("clip_score", inputs.tiny_clip("quick_gelu"), inputs.CLIP_SCORE_SEED, clip_score)
with torch.device("meta"):
    full = CLIPModel(CLIPConfig(**inputs.PUBLISHED_PICKSCORE)).state_dict()
# Published weights of that time hold these, too.
for tower, count in (("text", 77), ("vision", 257)):
    full[f"{tower}_model.embeddings.position_ids"] = torch.empty(1, count)
inputs.write_keys("pickscore", {key: tensor.shape for key, tensor in full.items()})
