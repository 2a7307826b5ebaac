"""Trains the embedded model from nothing: `python -m models.shapes.train --out models/shapes`.

Three stages on one CPU core, about 40 minutes: an autoencoder (f=4) on true drawings, then text encoder and
v-prediction U-Net together on its latents, first with captions that say all, then with such as leave something open.
The recipe is standard (v-MSE, uniform t, EMA, caption dropout); README.md beside this file has the figures it reached.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffusion import pipeline_files
from models.shapes import world

MAX_TOKENS = 16
CAPTION_DROPOUT = 0.1
BATCH = 48
RATE, OPEN_RATE = 1.5e-3, 8e-4  # of learning, at most: with whole captions, with open ones


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIPTokenizer whose vocabulary makes one token of every word of the shapes world."""
    words = world.vocabulary()
    bpe = Tokenizer(BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = Whitespace()
    specials = ["<|startoftext|>", "<|endoftext|>"]
    alphabet = sorted(set("".join(words)))
    bpe.train_from_iterator(
        [" ".join(words)] * 2,
        BpeTrainer(
            vocab_size=2000,
            min_frequency=1,
            special_tokens=specials,
            initial_alphabet=alphabet,
            end_of_word_suffix="</w>",
            show_progress=False,
        ),
    )
    model = json.loads(bpe.to_str())["model"]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    vocabulary.write_text(json.dumps(model["vocab"]))
    pairs = (pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
    merges.write_text("#version: 0.2\n" + "\n".join(pairs) + "\n")
    tokenizer = CLIPTokenizer(str(vocabulary), str(merges), model_max_length=MAX_TOKENS)
    for word in words:
        ids = tokenizer(word, add_special_tokens=False).input_ids
        if len(ids) != 1:
            raise RuntimeError(f"tokenizer splits {word!r} into {len(ids)} tokens")
    return tokenizer


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=256,
            projection_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def start_from(folder: Path, tokenizer: CLIPTokenizer) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """A trained pipeline's U-Net and text encoder; the words that `tokenizer` shares with it keep their embeddings."""
    text_encoder = build_text_encoder(tokenizer)
    state = CLIPTextModel.from_pretrained(folder / "text_encoder", use_safetensors=True).float().state_dict()
    name = next(name for name in state if name.endswith("token_embedding.weight"))
    words = text_encoder.get_input_embeddings().weight.detach().clone()
    known = CLIPTokenizer.from_pretrained(folder / "tokenizer").get_vocab()
    for word, row in tokenizer.get_vocab().items():
        if word in known:
            words[row] = state[name][known[word]]
    text_encoder.load_state_dict(state | {name: words})
    unet = build_unet()
    unet.load_state_dict(UNet2DConditionModel.from_pretrained(folder / "unet", use_safetensors=True).state_dict())
    return unet, text_encoder


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(16, 16, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=world.IMAGE_SIZE,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=world.IMAGE_SIZE // 4,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 48, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=4,
        norm_num_groups=16,
        cross_attention_dim=64,
    )


def build_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_schedule="linear",
        beta_start=1e-4,
        beta_end=0.02,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        steps_offset=1,
        set_alpha_to_one=False,
        clip_sample=False,
    )


def pictures(count: int, rng: np.random.Generator) -> tuple[torch.Tensor, list[world.Scene]]:
    """`count` training drawings [count, 3, H, W] uint8 and what they show."""
    scenes = [world.training_scene(rng) for _ in range(count)]
    stack = np.stack([world.draw(scene, rng) for scene in scenes])
    return torch.from_numpy(stack).permute(0, 3, 1, 2).contiguous(), scenes


def to_model_range(images: torch.Tensor) -> torch.Tensor:
    """uint8 [0, 255] -> float32 [-1, 1]."""
    return images.float() / 127.5 - 1


def lr_at(step: int, steps: int, warmup: int = 100) -> float:
    """Linear warm-up, flat for the first tenth, then linear decay to 1 %."""
    if step < warmup:
        return (step + 1) / warmup
    progress = max(0.0, (step / steps - 0.1) / 0.9)
    return 1 - 0.99 * progress


def train_vae(images: torch.Tensor, steps: int, log_every: int = 200) -> AutoencoderKL:
    """Fits the autoencoder (L2 + a little L1, tiny KL) and whitens its latents inside its own 1x1 convolutions."""
    vae = build_vae().train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    start = time.time()
    for step in range(steps):
        x = to_model_range(images[torch.randint(len(images), (16,))])
        posterior = vae.encode(x).latent_dist
        error = vae.decode(posterior.sample()).sample - x
        loss = error.square().mean() + 0.05 * error.abs().mean() + 1e-6 * posterior.kl().mean()
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * lr_at(step, steps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % log_every == 0 or step == steps - 1:
            psnr = -10 * torch.log10(error.square().mean() / 4).item()
            print(f"vae {step}/{steps} psnr {psnr:.1f} dB {time.time() - start:.0f} s", flush=True)
    vae.eval()
    whiten(vae, images[:2048])
    return vae


@torch.no_grad()
def whiten(vae: AutoencoderKL, images: torch.Tensor) -> None:
    """Fold per-channel mean and standard deviation of the latents into quant_conv and its inverse into
    post_quant_conv, so that latents are about N(0, 1) with scaling_factor 1."""
    latents = encode(vae, images)
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    channels = len(mean)
    vae.quant_conv.weight[:channels] /= std[:, None, None, None]
    vae.quant_conv.bias[:channels] = (vae.quant_conv.bias[:channels] - mean) / std
    vae.quant_conv.bias[channels:] -= 2 * std.log()  # the log-variance scales along
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
    vae.post_quant_conv.weight *= std[None, :, None, None]


@torch.no_grad()
def encode(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Mean latents [B, 4, H/4, W/4] of uint8 pictures."""
    return torch.cat([vae.encode(to_model_range(part)).latent_dist.mean for part in images.split(64)])


def train_unet(unet, text_encoder, latents, tokens, empty, steps: int, rate: float, on_save, log_every: int = 100):
    """Text encoder and U-Net together: v-prediction MSE at uniform t; `on_save(unet, text_encoder)` gets the EMA, which
    is returned, too.

    latents [M, 4, h, w]; tokens [M, L] int64 captions; empty [L] the tokens of the empty caption.
    """
    scheduler = build_scheduler()
    both = torch.nn.ModuleList([unet, text_encoder]).train()
    ema = copy.deepcopy(both).eval()
    print(f"unet {sum(p.numel() for p in unet.parameters()) / 1e6:.2f} M parameters", flush=True)
    optimizer = torch.optim.AdamW(both.parameters(), lr=rate, betas=(0.9, 0.99))
    start, running = time.time(), None
    for step in range(steps):
        pick = torch.randint(len(latents), (BATCH,))
        x, caption = latents[pick], tokens[pick].clone()
        caption[torch.rand(BATCH) < CAPTION_DROPOUT] = empty
        noise, t = torch.randn_like(x), torch.randint(1000, (BATCH,))
        prediction = unet(scheduler.add_noise(x, noise, t), t, text_encoder(caption)[0]).sample
        loss = (prediction - scheduler.get_velocity(x, noise, t)).square().mean()
        for group in optimizer.param_groups:
            group["lr"] = rate * lr_at(step, steps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for average, current in zip(ema.parameters(), both.parameters(), strict=True):
                average.lerp_(current, 1 - min(0.999, (step + 1) / (step + 10)))
        running = loss.item() if running is None else 0.99 * running + 0.01 * loss.item()
        if step % log_every == 0 or step == steps - 1:
            print(f"unet {step}/{steps} loss {running:.4f} {time.time() - start:.0f} s", flush=True)
        if step % 500 == 499 or step == steps - 1:
            on_save(*ema)
    return ema


def save_pipeline(out: Path, vae, tokenizer, unet, text_encoder) -> None:
    """Write the diffusers folder with fp16 weights."""
    pipeline = StableDiffusionPipeline(
        vae=copy.deepcopy(vae).half(),
        text_encoder=copy.deepcopy(text_encoder).half(),
        tokenizer=tokenizer,
        unet=copy.deepcopy(unet).half(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline_files.save(pipeline, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pictures", type=int, default=24000)
    parser.add_argument("--vae-steps", type=int, default=3200)
    parser.add_argument("--unet-steps", type=int, default=5000)
    parser.add_argument("--open-steps", type=int, default=1500)
    parser.add_argument("--vae", type=Path, help="use this trained autoencoder folder, skip the first stage")
    parser.add_argument("--start", type=Path, help="start from this trained pipeline folder, skip the second stage")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(args.seed)
    images, scenes = pictures(args.pictures, rng)
    print(f"drew {len(images)} pictures", flush=True)
    if args.vae:
        vae = AutoencoderKL.from_pretrained(args.vae, use_safetensors=True).eval()
    else:
        vae = train_vae(images, args.vae_steps)
        vae.save_pretrained(args.out / "vae")
    tokenizer = build_tokenizer(args.out / "tokenizer")

    def tokenize(texts: list[str]) -> torch.Tensor:
        return tokenizer(
            texts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
        ).input_ids

    latents = encode(vae, images)
    print(f"latents mean {latents.mean():.3f} std {latents.std():.3f}", flush=True)

    def train(unet, text_encoder, captions: list[str], steps: int, rate: float):
        return train_unet(
            unet, text_encoder, latents, tokenize(captions), tokenize([""])[0], steps, rate,
            lambda *ema: save_pipeline(args.out, vae, tokenizer, *ema),
        )  # fmt: skip

    if args.start:
        unet, text_encoder = start_from(args.start, tokenizer)
    else:
        whole = [scene.caption() for scene in scenes]
        unet, text_encoder = train(build_unet(), build_text_encoder(tokenizer), whole, args.unet_steps, RATE)
    left_open = [world.training_caption(scene, rng) for scene in scenes]
    train(unet, text_encoder, left_open, args.open_steps, OPEN_RATE)


if __name__ == "__main__":
    main()
