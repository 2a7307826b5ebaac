"""Pictures of a prompt by the base model and by a LoRA, side by side at the same noise:
`python -m learner.generate --prompt "..." --lora RUN`. Without --lora: by the base model alone.

They are the project's own sampler's: picture j is what an evaluation with this seed draws of the prompt as its image j.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from pydantic import ValidationError

from commands.outcome import attempt, require_writable, warner
from diffusion.trajectory import Chunk
from evaluation.adapters import UNCALIBRATED, open_adapter
from learner.config import Config, load_config, resolve, saved_config
from learner.config.sections import Evaluation, SamplerConfig
from records.storage import Storage

if TYPE_CHECKING:
    from diffusion.lora_files import AdapterFile


def draw(
    config: Config, adapter: AdapterFile | None, prompts: Sequence[str], images: int
) -> list[tuple[np.ndarray, ...]]:  # fmt: skip
    """For each prompt `images` pictures [n, H, W, 3] uint8 by the base model of `config` and, with an adapter, by it
    with that. Raises BadAdapter, BaseModelError, OutOfMemory, or a ValueError for settings that do not fit it."""
    import torch

    from diffusion import lora, lora_files
    from diffusion.base_model import Decoder
    from diffusion.open_model import open_base_model
    from diffusion.rollout import Sampler
    from learner import build

    build.prepare_process(config)
    place = str(resolve(config.model.path)), build.device(config), getattr(torch, config.model.dtype)
    model = open_base_model(*place, config.model.pixels, config.model.text_tokens)
    if adapter is None:
        model.attach_lora(1, 1, seed=0)  # samplers have one; it stays off
        snapshot = lora.snapshot(model.unet, 0)
    else:
        snapshot = lora_files.attach(model, adapter)
    model.speed_up(config.model.channels_last)
    sampler, decoder = Sampler(model, config.rollout_settings()), Decoder(*place)
    size, seed = config.sampler.chunk_size, config.evaluation.seed

    @torch.no_grad()
    def pictures(prompt: str) -> np.ndarray:
        parts = []
        for start in range(0, images, size):
            ids = tuple(range(start, min(start + size, images)))
            _, clean = sampler.sample(Chunk(start // size, "evaluate", 0, seed, (prompt,) * len(ids), ids), snapshot)
            shown = decoder(torch.from_numpy(clean.latents.astype(np.float32)))  # rounded as the scorer does:
            parts.append(shown.mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy())
        return np.concatenate(parts)

    rows: list[tuple[np.ndarray, ...]] = []
    for prompt in prompts:
        with model.without_lora():
            base = pictures(prompt)
        rows.append((base,) if adapter is None else (base, pictures(prompt)))
    return rows


def settings(run_config: Config | None, base: str | None, seed: int | None, sampling: dict[str, Any]) -> Config:
    """The run's settings, the default preset's, or of another base model the defaults; with this base model, seed and
    `sampling`. Raises a ValueError for one that cannot be."""
    config = run_config or (Config() if base else load_config())
    if config.noise_steps < config.sampler.steps != sampling.get("steps", config.sampler.steps):
        first = f"noise in the first {config.noise_steps} of {config.sampler.steps} steps alone (sampler.noise=window)"
        raise ValueError(f"--steps: the run has {first}; leave it out")
    measured = config.sampler.spread if config.sampler.kernel == "calibrated" else None
    if measured and len(measured) != sampling.get("steps", len(measured)):
        raise ValueError(f"--steps: the run's calibrated variances are of {len(measured)} steps; leave it out")
    try:
        sampler = SamplerConfig(**config.sampler.model_dump() | sampling)
        evaluation = Evaluation(**config.evaluation.model_dump() | ({} if seed is None else {"seed": seed}))
    except ValidationError as error:
        fault = error.errors()[0]
        raise ValueError(f"--{fault['loc'][0]}: {fault['msg']}, got {fault['input']!r}") from error
    model = config.model.model_copy(update={"path": base or config.model.path})
    return config.model_copy(update={"model": model, "sampler": sampler, "evaluation": evaluation})


def write(args: argparse.Namespace) -> None:
    """Raises an OSError or a ValueError for bad input, OutOfMemory where the GPU is too small."""
    warn = warner("generate")
    if args.images < 1:
        raise ValueError(f"--images: expected 1 or more, got {args.images}")
    if args.out.suffix.lower() != ".png":
        raise ValueError(f"--out: {args.out} is no .png file")
    require_writable("--out", args.out)
    require_writable("--separate", args.separate, folder=True)
    if args.step is not None and args.lora is None:
        raise ValueError("--step: of which run? give --lora RUN")
    read_adapter, run, _ = open_adapter(args.lora, args.step, warn) if args.lora else (lambda: None, None, None)
    options = {"steps": args.steps, "guidance": args.guidance, "eta": args.eta}
    sampling = {key: value for key, value in options.items() if value is not None}
    config = settings(saved_config(run) if run else None, args.base, args.seed, sampling)
    adapter = read_adapter()
    if adapter is not None and adapter.note:
        warn(adapter.note)
    from diffusion.locate import is_unconditional
    from diffusion.parts import cut_prompts
    from diffusion.rehearsal import check_model
    from reports.pictures import LABELS, comparison, png

    unconditional = is_unconditional(str(resolve(config.model.path)))
    if unconditional and args.prompt:
        raise ValueError(f"--prompt: {config.model.path} takes no text; leave it out")
    if not unconditional and not args.prompt:
        raise ValueError("--prompt: what shall be drawn? give one or more")
    prompts, sampler = args.prompt or [""], config.sampler
    grid = sampler.steps, sampler.eta, sampler.grid, config.model.pixels
    check_model(str(resolve(config.model.path)), *grid, sampler.kernel, sampler.spread)
    if config.uncalibrated:
        raise ValueError(UNCALIBRATED)
    if args.prompt and (said := cut_prompts(str(resolve(config.model.path)), prompts, config.model.text_tokens)):
        warn(said)
    drawn = draw(config, adapter, prompts, args.images)
    for p, models in enumerate(drawn if args.separate else [], 1):
        for label, row in zip(LABELS, models, strict=False):
            for i, pixels in enumerate(row):
                name = f"prompt-{p:02d}-image-{i:02d}-{label}.png"
                Storage(str(args.separate)).write(name, png(Image.fromarray(pixels)))
    with_lora = f" tuned: with {args.lora} (rank {adapter.rank}, alpha {adapter.alpha:g})." if adapter else ""
    noise = f"{'Same noise in a column: s' if adapter else 'S'}eed {config.evaluation.seed}"
    ends = f" in the first {config.noise_steps}" if config.noise_steps < sampler.steps else ""
    legend = (
        f"base: {Path(config.model.path).name}.{with_lora} {noise}, {sampler.steps} steps, "
        f"guidance {sampler.guidance:g}, {sampler.kernel} kernel, eta {sampler.eta:g}{ends}"
    )
    Storage(str(args.out.parent)).write(args.out.name, png(comparison(prompts, drawn, legend)))
    print(args.out)


def main(arguments: list[str] | None = None) -> int:
    """Prints the file; exit status 0, 2 after one line on stderr: bad input, 1: the GPU is too small."""
    parser = argparse.ArgumentParser(
        prog="python -m learner.generate",
        description="Draw prompts with the base model and (if given) with a LoRA, at the same noise, side by side.",
        epilog="Base model, steps, guidance, eta and seed are the run's, where the LoRA is a run's or lies in one; "
        "else the default preset's, or with --base the defaults of learner.run.",
    )
    add = parser.add_argument
    add("--prompt", action="append", help="what to draw; may be given again. Not for models without text")
    add("--lora", help="run directory or URL, a LoRA's folder, or its .safetensors file; without: the base model alone")
    add("--step", type=int, help="of a run: its checkpoint of this step; default: the newest whole one")
    add("--base", metavar="MODEL", help="diffusers pipeline folder, or hub id")
    add("--images", type=int, default=4, help="pictures of each prompt and model (default: 4)")
    add("--steps", type=int, help="DDIM steps")
    add("--guidance", type=float, help="classifier-free guidance scale; 1: off")
    add("--eta", type=float, help="noise scale of DDIM; above 0, at most 1")
    add("--seed", type=int, help="of the noise")
    add("--out", type=Path, default=Path("grid.png"), help="the sheet (default: grid.png)")
    add("--separate", type=Path, metavar="DIR", help="also write every picture as a file of its own")
    args = parser.parse_args(arguments)
    return attempt("generate", lambda: write(args))
