"""Golden values of the aesthetic predictor as image-reward 1.5 has it, on openai-clip 1.0.1's own model. float32: that
model computes its layer norms in it. Run it with the Python of make_imagereward.py.
"""

# ruff: noqa: I001
from __future__ import annotations

import tempfile
from pathlib import Path

import torchvision_on_cpu  # noqa: F401
import clip.clip
import clip.model
import numpy as np
import torch
from PIL import Image

import inputs
from ImageReward.models.AestheticScore import MLP, AestheticScore

tiny = inputs.AESTHETIC_SIZE
model = clip.model.CLIP(
    embed_dim=tiny["embedding"], image_resolution=tiny["image"], vision_layers=tiny["layers"],
    vision_width=tiny["width"], vision_patch_size=tiny["patch"], context_length=4, vocab_size=8, transformer_width=64,
    transformer_heads=1, transformer_layers=1,
)  # fmt: skip
clip.load = lambda *_, **__: (model, clip.clip._transform(tiny["image"]))
predictor = AestheticScore(None)
full = {f"mlp.{key}": tensor.shape for key, tensor in predictor.mlp.state_dict().items()}
inputs.write_keys("aesthetic", full)
predictor.mlp = MLP(tiny["embedding"])
shapes = {key: tensor.shape for key, tensor in predictor.state_dict().items()}
held = {key: torch.from_numpy(np.array(value)).float() for key, value in inputs.state(shapes, seed=3).items()}
predictor.load_state_dict(held, strict=True)
predictor.eval()

pixels = torch.from_numpy(inputs.pixels(tiny["image"])).float().requires_grad_()
# As its score(), whose pictures come from files.
scores = predictor.mlp(torch.nn.functional.normalize(model.encode_image(pixels)).float())[:, 0]
gradients = torch.autograd.grad(scores.sum(), pixels)[0]

folder, reported = Path(tempfile.mkdtemp()), []
for index, picture in enumerate(inputs.pictures()):
    Image.fromarray(picture).save(folder / f"{index}.png")
    reported.append(predictor.score("", str(folder / f"{index}.png")))

inputs.write(
    "aesthetic",
    scores=scores.detach().numpy(), gradients=gradients.numpy(), reported=np.array(reported, np.float64),
)  # fmt: skip
