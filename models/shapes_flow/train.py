"""Trains the embedded flow model: `python -m models.shapes_flow.train --out FOLDER [--resume]`.

A Stable Diffusion 3 pipeline, small: a transformer of two streams over the latents of models/shapes' autoencoder, and
two CLIP encoders that learn beside it. Its T5 is one layer whose output is zero: plain diffusers wants one to be there,
and prompts of a dozen words need none. The recipe is standard (velocity MSE, logit-normal t, EMA, caption dropout), on
the drawings and captions of models/shapes. One CPU core; what was done is kept every 250 steps, and --resume goes on.
"""

from __future__ import annotations

import argparse
import copy
import math
import random
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from diffusion import pipeline_files
from models.shapes import train as shapes
from models.shapes import world

WIDTH, HEADS, LAYERS = 96, 6, 5  # of the transformer
TEXT = 48  # width of each CLIP encoder
T5_TOKENS = 256  # the pipeline's own default, and the most it is trained for
BATCH, RATE = 48, 1.5e-3
SAVED = "training.pt"


def build_transformer() -> SD3Transformer2DModel:
    side = world.IMAGE_SIZE // 4
    return SD3Transformer2DModel(
        sample_size=side, patch_size=2, in_channels=4, out_channels=4, num_layers=LAYERS,
        attention_head_dim=WIDTH // HEADS, num_attention_heads=HEADS, joint_attention_dim=2 * TEXT,
        caption_projection_dim=WIDTH, pooled_projection_dim=2 * TEXT, pos_embed_max_size=side, qk_norm="rms_norm",
    )  # fmt: skip


def build_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=TEXT, intermediate_size=4 * TEXT, projection_dim=TEXT,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=shapes.MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return CLIPTextModelWithProjection(config)


def build_t5() -> tuple[T5Tokenizer, T5EncoderModel]:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"\u2581{word}", -1.0) for word in world.vocabulary())]
    t5 = T5EncoderModel(T5Config(vocab_size=len(pieces), d_model=2 * TEXT, d_kv=8, d_ff=8, num_layers=1, num_heads=1))
    nn.init.zeros_(t5.encoder.final_layer_norm.weight)
    return T5Tokenizer(vocab=pieces, extra_ids=0), t5


class Network(nn.Module):
    """What learns: the transformer and both encoders."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.transformer = build_transformer()
        self.encoders = nn.ModuleList([build_encoder(tokenizer) for _ in range(2)])

    def forward(self, x: Tensor, sigma: Tensor, tokens: Tensor, rows_of_t5: int) -> Tensor:
        """Velocity [B, 4, h, w] at sigma [B], of captions' tokens [B, L], as the pipeline embeds them with so many rows
        of T5's. All zero and without a place, these are one row that counts as often."""
        read = [encoder(tokens, output_hidden_states=True) for encoder in self.encoders]
        rows = torch.cat([each.hidden_states[-2] for each in read], -1)
        rows = torch.cat([rows, rows.new_zeros(len(x), 1, rows.shape[-1])], 1)
        pooled = torch.cat([each.text_embeds for each in read], -1)
        with mock.patch.object(nn.functional, "scaled_dot_product_attention", last_key_counts(rows_of_t5)):
            return self.transformer(x, rows, pooled, 1000 * sigma).sample


def last_key_counts(times: int, plain=nn.functional.scaled_dot_product_attention):
    def attention(query: Tensor, key: Tensor, value: Tensor, **more) -> Tensor:
        bias = query.new_zeros(query.shape[2], key.shape[2])
        bias[:, -1] = math.log(times)
        return plain(query, key, value, attn_mask=bias, **more)

    return attention


def save_pipeline(out: Path, vae: AutoencoderKL, tokenizer: CLIPTokenizer, network: Network) -> None:
    """Write the diffusers folder with fp16 weights."""
    words, t5 = build_t5()
    vae = copy.deepcopy(vae)
    vae.register_to_config(shift_factor=0.0)
    first, second = network.encoders
    StableDiffusion3Pipeline(
        transformer=copy.deepcopy(network.transformer).half(), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae.half(), text_encoder=copy.deepcopy(first).half(), tokenizer=tokenizer,
        text_encoder_2=copy.deepcopy(second).half(), tokenizer_2=tokenizer, text_encoder_3=t5.half(),
        tokenizer_3=words,
    ).save_pretrained(out)  # fmt: skip
    for config in out.glob("text_encoder*/config.json"):  # beside a float32 transformer
        pipeline_files.read_in_float32(config)


def train(network: Network, latents: Tensor, tokens: Tensor, empty: Tensor, steps: int, out: Path, resume: bool, save):
    """`save(EMA)` every 500 steps. latents [M, 4, h, w]; tokens [M, L] int64 captions; empty [L] of the empty one."""
    network.train()
    average = copy.deepcopy(network).eval()
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=0.01)
    print(f"{sum(p.numel() for p in network.parameters()) / 1e6:.2f} M parameters", flush=True)
    first, start, running = 0, time.process_time(), None
    if resume and (out / SAVED).is_file():
        saved = torch.load(out / SAVED, weights_only=True)
        network.load_state_dict(saved["network"])
        average.load_state_dict(saved["average"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
        torch.manual_seed(first)
        random.seed(first)
    for step in range(first, steps):
        pick = torch.randint(len(latents), (BATCH,))
        x, caption = latents[pick], tokens[pick].clone()
        caption[torch.rand(BATCH) < shapes.CAPTION_DROPOUT] = empty
        noise, sigma = torch.randn_like(x), torch.randn(BATCH).sigmoid()
        mixed = sigma[:, None, None, None]
        rows_of_t5 = round(T5_TOKENS ** random.random())  # whatever a pipeline is told
        velocity = network((1 - mixed) * x + mixed * noise, sigma, caption, rows_of_t5)
        loss = (velocity - (noise - x)).square().mean()
        for group in optimizer.param_groups:
            group["lr"] = RATE * shapes.lr_at(step, steps, warmup=300)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for mean, current in zip(average.parameters(), network.parameters(), strict=True):
                mean.lerp_(current, 1 - min(0.999, (step + 1) / (step + 10)))
        running = loss.item() if running is None else 0.99 * running + 0.01 * loss.item()
        if step % 100 == 0 or step == steps - 1:
            print(f"{step}/{steps} loss {running:.4f} {time.process_time() - start:.0f} CPU s", flush=True)
        if step % 250 == 249 or step == steps - 1:
            parts: dict[str, Any] = {"network": network, "average": average, "optimizer": optimizer}
            states: dict[str, Any] = {name: part.state_dict() for name, part in parts.items()}
            torch.save({**states, "step": step + 1}, out / f"{SAVED}.new")
            (out / f"{SAVED}.new").replace(out / SAVED)
        if step % 500 == 499 or step == steps - 1:
            save(average)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", type=Path, default=Path("models/shapes"), help="autoencoder and tokenizer are its")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pictures", type=int, default=24000)
    parser.add_argument("--steps", type=int, default=12000)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(args.seed)
    images, scenes = shapes.pictures(args.pictures, rng)
    vae = AutoencoderKL.from_pretrained(args.base / "vae", use_safetensors=True).float().eval()
    tokenizer = CLIPTokenizer.from_pretrained(args.base / "tokenizer")

    def tokenize(texts: list[str]) -> Tensor:
        return tokenizer(
            texts, padding="max_length", max_length=shapes.MAX_TOKENS, truncation=True, return_tensors="pt"
        ).input_ids

    latents = shapes.encode(vae, images)
    captions = tokenize([world.training_caption(scene, rng) for scene in scenes])
    print(f"latents mean {latents.mean():.3f} std {latents.std():.3f}", flush=True)
    network = Network(tokenizer)
    train(
        network, latents, captions, tokenize([""])[0], args.steps, args.out, args.resume,
        lambda average: save_pipeline(args.out / "pipeline", vae, tokenizer, average),
    )  # fmt: skip


if __name__ == "__main__":
    main()
