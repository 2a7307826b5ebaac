"""Trains the embedded model's tiny decoder: `python -m models.shapes.distil --out models/shapes/tiny_decoder`.

A few minutes on one CPU core: an AutoencoderTiny whose decoder imitates the autoencoder's, on latents of drawings and
on what the U-Net predicts under way, means of several drawings. Only its decoder is of use. Figures: README.md beside
this file.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from models.shapes.train import encode, lr_at, pictures

HERE = Path(__file__).resolve().parent
BATCH = 16
RATE = 3e-3


def build_tiny() -> AutoencoderTiny:
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(12, 12, 12),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    )


def under_way(latents: torch.Tensor) -> torch.Tensor:
    """Latents [BATCH, 4, h, w]: each a drawing's own, or a random mean of four drawings'."""
    pick = torch.randint(len(latents), (BATCH, 4))
    share = torch.softmax(torch.randn(BATCH, 4) * 3, 1)
    return (latents[pick] * share[:, :, None, None, None]).sum(1)


def distil(vae: AutoencoderKL, latents: torch.Tensor, steps: int) -> AutoencoderTiny:
    """Least squares (and a little L1) between the two decoders' pictures in [-1, 1]."""
    tiny = build_tiny().train()
    optimizer = torch.optim.AdamW(tiny.decoder.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=1e-4)
    start = time.time()
    for step in range(steps):
        z = under_way(latents)
        with torch.no_grad():
            wanted = vae.decode(z).sample.clamp(-1, 1)
        error = tiny.decode(z).sample - wanted
        loss = error.square().mean() + 0.05 * error.abs().mean()
        for group in optimizer.param_groups:
            group["lr"] = RATE * lr_at(step, steps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tiny.decoder.parameters(), 1.0)
        optimizer.step()
        if step % 200 == 0 or step == steps - 1:
            psnr = -10 * torch.log10(error.square().mean() / 4).item()
            print(f"tiny {step}/{steps} psnr {psnr:.1f} dB {time.time() - start:.0f} s", flush=True)
    return tiny.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--pictures", type=int, default=4000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    vae = AutoencoderKL.from_pretrained(HERE / "vae", dtype=torch.float32, use_safetensors=True).eval()
    images, _ = pictures(args.pictures, np.random.default_rng(0))
    distil(vae, encode(vae, images), args.steps).half().save_pretrained(args.out)
    config = json.loads((args.out / "config.json").read_text())
    del config["block_out_channels"]  # diffusers writes it, and warns of it when it reads
    (args.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main()
