"""Golden values of hpsv2 1.2.0's own code. Run it with a Python that has

hpsv2==1.2.0 (--no-deps) clint requests tqdm ftfy==6.3.1 regex "protobuf<4" timm sentencepiece pillow huggingface-hub
"setuptools<81" torch==2.13.0 torchvision==0.28.0
"""

# ruff: noqa: I001
from __future__ import annotations

import gzip
import os
import tempfile
from pathlib import Path

import torchvision_on_cpu  # noqa: F401
import numpy as np
import torch
from PIL import Image

import inputs

folder = Path(tempfile.mkdtemp())
merges = inputs.write_bpe(folder / "merges.gz")
opened = gzip.open
gzip.open = lambda *_: opened(merges)  # its tokenizer opens a file that its wheel lacks
from hpsv2 import img_score  # noqa: E402
from hpsv2.src.open_clip import CLIP, get_model_config, image_transform, tokenize, tokenizer  # noqa: E402

gzip.open = opened

# The keys of the published size.
with torch.device("meta"):
    full = CLIP(**get_model_config("ViT-H-14"))
inputs.write_keys("hpsv2", {key: tensor.shape for key, tensor in full.state_dict().items()})
print(len(full.state_dict()), "keys")

# A tiny one of the same code: sizes are all that changes.
tiny, vocabulary = inputs.HPS_SIZE, len(inputs.bpe_vocabulary("<start_of_text>", "<end_of_text>"))
model = CLIP(
    embed_dim=tiny["embedding"],
    vision_cfg={
        "image_size": tiny["image"], "layers": tiny["vision_layers"], "width": tiny["vision_width"],
        "head_width": tiny["vision_width"] // tiny["vision_heads"], "patch_size": tiny["patch"],
    },
    text_cfg={
        "context_length": tiny["context"], "vocab_size": vocabulary, "width": tiny["text_width"],
        "heads": tiny["text_heads"], "layers": tiny["text_layers"],
    },
    output_dict=True,
)  # fmt: skip
shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
held = {key: torch.from_numpy(np.array(value)) for key, value in inputs.state(shapes, seed=2).items()}
model.double().load_state_dict(held, strict=True)
model.eval()
pixels = torch.from_numpy(inputs.pixels(tiny["image"])).requires_grad_()
outputs = model(pixels, tokenize(inputs.PROMPTS))
scores = torch.diagonal(outputs["image_features"] @ outputs["text_features"].T)
gradients = torch.autograd.grad(scores.sum(), pixels)[0]

# Its own score(), from a checkpoint and pictures; in float32, as there.
checkpoint = str(folder / "tiny.pt")
torch.save({"state_dict": held}, checkpoint)
mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
transform = image_transform(tiny["image"], is_train=False, mean=mean, std=std, resize_longest_max=True)
img_score.model_dict.update(model=model.float(), preprocess_val=transform)
pictures = [Image.fromarray(picture) for picture in inputs.pictures()]
reported = [img_score.score(picture, inputs.REPORTED[i], cp=checkpoint)[0] for i, picture in enumerate(pictures)]

small = image_transform(20, is_train=False, mean=mean, std=std, resize_longest_max=True)
inputs.write(
    "hpsv2",
    scores=scores.detach().numpy(), gradients=gradients.numpy(), reported=np.array(reported, np.float64),
    tokens=tokenize(inputs.TRICKY).numpy().astype(np.int16),
    preprocessed=np.stack([small(picture).numpy() for picture in pictures]),
)  # fmt: skip

if "CLIP_BPE" in os.environ:
    tokenizer._tokenizer = tokenizer.SimpleTokenizer(os.environ["CLIP_BPE"])
    inputs.write("hpsv2_true_tokens", tokens=tokenize(inputs.TRICKY).numpy().astype(np.uint16))
