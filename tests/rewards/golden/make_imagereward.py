"""Golden values of image-reward 1.5's own code. Run it with a Python that has

image-reward==1.5 transformers==4.49.0 huggingface-hub==0.36.2 diffusers==0.39.0 openai-clip==1.0.1 "setuptools<81"
torch==2.13.0 torchvision==0.28.0
"""

# ruff: noqa: I001
from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path

import torchvision_on_cpu  # noqa: F401
import numpy as np
import torch
from PIL import Image
from transformers import BertTokenizer

import inputs
from ImageReward.ImageReward import ImageReward, MLP, _transform
from ImageReward.models.BLIP import blip, blip_pretrain
from ImageReward.models.BLIP.vit import VisionTransformer

torch.manual_seed(0)
folder = Path(tempfile.mkdtemp())
words = str(inputs.write_bert_tokenizer(folder) / "vocab.txt")
blip_pretrain.init_tokenizer = blip.init_tokenizer = lambda: BertTokenizer(words)


def med_config(values: dict) -> str:
    file = folder / "med_config.json"
    file.write_text(json.dumps(values))
    return str(file)


# The keys of the published size.
linspace = torch.linspace
torch.linspace = functools.partial(linspace, device="cpu")  # it reads numbers off it
with torch.device("meta"):
    full = ImageReward(med_config=med_config(inputs.PUBLISHED_MED_CONFIG))
torch.linspace = linspace
inputs.write_keys("imagereward", {key: tensor.shape for key, tensor in full.state_dict().items()})
print(len(full.state_dict()), "keys")

# A tiny one of the same code: sizes are all that changes.
tiny = inputs.IMAGEREWARD_VISION


def create_vit(*_: object) -> tuple[VisionTransformer, int]:
    # As create_vit does for "large", drop_path included.
    model = VisionTransformer(
        img_size=tiny["image"], patch_size=tiny["patch"], embed_dim=tiny["width"], depth=tiny["layers"],
        num_heads=tiny["heads"], drop_path_rate=0.1,
    )  # fmt: skip
    return model, tiny["width"]


blip_pretrain.create_vit = create_vit
model = ImageReward(med_config=med_config(inputs.MED_CONFIG))
model.mlp = MLP(inputs.MED_CONFIG["hidden_size"])
shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
held = {key: torch.from_numpy(value) for key, value in inputs.state(shapes, seed=1).items()}
model.double().load_state_dict(held, strict=True)
model.eval()

tokens = model.blip.tokenizer(
    inputs.PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
)  # as its score()
pixels = torch.from_numpy(inputs.pixels(tiny["image"])).requires_grad_()
scores = model.score_gard(tokens.input_ids, tokens.attention_mask, pixels)[:, 0]
gradients = torch.autograd.grad(scores.sum(), pixels)[0]

pictures = [Image.fromarray(picture) for picture in inputs.pictures()]
model.float().preprocess = _transform(tiny["image"])  # score() turns to float32 before the last layers
reported = [model.score(inputs.REPORTED[i], picture) for i, picture in enumerate(pictures)]

small = _transform(20)
inputs.write(
    "imagereward",
    scores=scores.detach().numpy(), gradients=gradients.numpy(), reported=np.array(reported, np.float64),
    tokens=np.stack([model.blip.tokenizer(p, padding="max_length", truncation=True, max_length=35).input_ids
                     for p in inputs.TRICKY]).astype(np.int16),
    preprocessed=np.stack([small(picture).numpy() for picture in pictures]),
)  # fmt: skip
