"""Pictures of a prompt by the base model and by a LoRA, side by side at the same noise:
`python -m learner.generate --prompt "..." --lora RUN`. Without --lora: by the base model alone.

They are the project's own sampler's: picture j is what an evaluation with this seed draws of the prompt as its image j.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import ValidationError

from diffusion import lora, lora_files
from diffusion.gpu_memory import OutOfMemory
from diffusion.loading import load_decoder, load_model
from diffusion.locate import is_unconditional
from diffusion.lora_files import AdapterFile
from diffusion.rollout import Sampler
from diffusion.snapshot import Snapshot
from diffusion.trajectory import Chunk
from evaluation.finished_run import LORA, open_trained, run_around
from learner import build
from learner.config import Config, load_config, resolve
from learner.config.sections import SamplerConfig
from records.run_folder import RUN, Records
from records.storage import Storage
from reports.pictures import LABELS, comparison, png

SAMPLING = ("steps", "guidance", "eta")


def draw(
    config: Config, adapter: AdapterFile | None, prompts: Sequence[str], images: int, seed: int
) -> list[tuple[np.ndarray, ...]]:
    """For each prompt `images` pictures [n, H, W, 3] uint8 by the base model of `config` and, with an adapter, by it
    with that.

    Raises:
        BadAdapter: the adapter was made for another base model.
        BaseModelError: the base model is not there.
        OutOfMemory: a chunk does not fit on the GPU.
        ValueError: the sampling settings do not fit the model.
    """
    build.prepare_process(config)
    given, device = config.model, build.device(config)
    path, dtype = str(resolve(given.path)), getattr(torch, given.dtype)
    model = load_model(path, device, dtype)
    if adapter is None:
        model.attach_lora(1, 1, seed=0)  # samplers have one; it stays off
        tuned = lora.snapshot(model.unet, 0)
    else:
        tuned = lora_files.attach(model, adapter)
    model.speed_up(given.channels_last)
    sampler, decoder = Sampler(model, config.rollout_settings()), load_decoder(path, device, dtype)
    drawn: list[tuple[np.ndarray, ...]] = []
    for prompt in prompts:
        chunks = list(_chunks(prompt, images, seed, config.sampler.chunk_size))
        with model.without_lora():
            rows = [[_pictures(sampler, decoder, chunk, tuned) for chunk in chunks]]
        if adapter is not None:
            rows.append([_pictures(sampler, decoder, chunk, tuned) for chunk in chunks])
        drawn.append(tuple(np.concatenate(row) for row in rows))
    return drawn


def _chunks(prompt: str, images: int, seed: int, size: int) -> Iterator[Chunk]:
    for start in range(0, images, size):
        ids = tuple(range(start, min(start + size, images)))
        yield Chunk(start // size, "evaluate", 0, seed, (prompt,) * len(ids), ids)


@torch.no_grad()
def _pictures(sampler: Sampler, decoder: Any, chunk: Chunk, snapshot: Snapshot) -> np.ndarray:
    """[b, H, W, 3] uint8, rounded as the scorer does."""
    _, clean = sampler.sample(chunk, snapshot)
    shown = decoder(torch.from_numpy(clean.latents.astype(np.float32)))
    return shown.mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def find(lora: str, step: int | None, warn: Callable[[str], None]) -> tuple[AdapterFile, Config | None]:
    """The LoRA of a run, of one of its checkpoints, or of files anywhere; and the run's settings, if there is a run.

    Raises:
        BadAdapter, CheckpointError, ConfigError, StorageError: as `open_trained` and `adapter_files.read`.
        ValueError: a step of what is no run.
    """
    storage = Storage(lora)
    if "://" in lora or storage.exists(RUN):
        trained = open_trained(lora, step, warn)
        return trained.adapter(), trained.config
    if step is not None:
        raise ValueError(f"--step: {lora} is no run's directory (it has no {RUN})")
    path = Path(lora).expanduser()
    inside = path / LORA
    adapter = lora_files.read(inside if inside.is_dir() else path)
    run = run_around(path)
    return adapter, Records.open(Storage(str(run))).config() if run else None


def settings(config: Config | None, base: str | None, given: dict[str, Any]) -> Config:
    """The run's settings, the demo's, or of another base model the defaults; with the base model and what is `given` of
    steps, guidance and eta in their place.

    Raises:
        ValueError: one of them is out of range.
    """
    config = config or (Config() if base else load_config())
    if base:
        config = config.model_copy(update={"model": config.model.model_copy(update={"path": base})})
    try:
        sampler = SamplerConfig(**{**config.sampler.model_dump(), **given})
    except ValidationError as error:
        fault = error.errors()[0]
        raise ValueError(f"--{fault['loc'][0]}: {fault['msg']}, got {fault['input']!r}") from error
    return config.model_copy(update={"sampler": sampler})


def _check(args: argparse.Namespace, base: str) -> list[str]:
    """What would otherwise show only after minutes. Returns the prompts.

    Raises:
        ValueError: see the messages.
        BaseModelError: there is no such model.
    """
    if args.images < 1:
        raise ValueError(f"--images: expected 1 or more, got {args.images}")
    if args.seed is not None and args.seed < 0:
        raise ValueError(f"--seed: expected 0 or more, got {args.seed}")
    if args.out.suffix.lower() != ".png":
        raise ValueError(f"--out: {args.out} is no .png file")
    if not args.out.parent.is_dir():
        raise ValueError(f"--out: there is no folder {args.out.parent}; make it first")
    if args.out.is_dir():
        raise ValueError(f"--out: {args.out} is a folder")
    if is_unconditional(str(resolve(base))):
        if args.prompt:
            raise ValueError(f"--prompt: {base} takes no text; leave it out")
        return [""]
    if not args.prompt:
        raise ValueError("--prompt: what shall be drawn? give one or more")
    return args.prompt


def _write(file: Path, picture: Image.Image) -> None:
    """In one piece."""
    aside = file.with_name(f".{file.name}.{os.getpid()}.new")
    try:
        aside.write_bytes(png(picture))
        aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)


def _write_separate(folder: Path, drawn: Sequence[tuple[np.ndarray, ...]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for p, both in enumerate(drawn, 1):
        for label, row in zip(LABELS, both, strict=False):
            for i, pixels in enumerate(row):
                _write(folder / f"prompt-{p:02d}-image-{i:02d}-{label}.png", Image.fromarray(pixels))


def main(arguments: list[str] | None = None) -> int:
    """Prints the file; exit status 0, 2 after one line on stderr: bad input, 1: the GPU is too small."""
    args = _parser().parse_args(arguments)
    try:
        adapter, of_run = None, None
        if args.lora is not None:
            adapter, of_run = find(args.lora, args.step, lambda text: _complain(f"warning: {text}"))
        elif args.step is not None:
            raise ValueError("--step: of which run? give --lora RUN")
        if adapter is not None and adapter.note:
            _complain(f"warning: {adapter.note}")
        given = {key: getattr(args, key) for key in SAMPLING if getattr(args, key) is not None}
        config = settings(of_run, args.base, given)
        prompts = _check(args, config.model.path)
        seed = config.evaluation.seed if args.seed is None else args.seed
        drawn = draw(config, adapter, prompts, args.images, seed)
        sampler = config.sampler
        with_lora = f" tuned: with {args.lora} (rank {adapter.rank}, alpha {adapter.alpha:g})." if adapter else ""
        noise = f"{'Same noise in a column: s' if adapter else 'S'}eed {seed}"
        legend = (
            f"base: {Path(config.model.path).name}.{with_lora} {noise}, {sampler.steps} steps, "
            f"guidance {sampler.guidance:g}, eta {sampler.eta:g}"
        )
        if args.separate:
            _write_separate(args.separate, drawn)
        _write(args.out, comparison(prompts, drawn, legend))
    except (OSError, ValueError) as error:
        _complain(str(error))
        return 2
    except OutOfMemory as error:
        _complain(str(error))
        return 1
    print(args.out)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m learner.generate",
        description="Draw prompts with the base model and (if given) with a LoRA, at the same noise, side by side.",
        epilog="Base model, steps, guidance, eta and seed are the run's, where the LoRA is a run's or lies in one; "
        "else the demo's, or with --base the defaults of learner.run.",
    )
    parser.add_argument(
        "--prompt", action="append", help="what to draw; may be given again. Not for models without text"
    )
    parser.add_argument(
        "--lora", help="run directory or URL, a LoRA's folder, or its .safetensors file; without: the base model alone"
    )
    parser.add_argument("--step", type=int, help="of a run: its checkpoint of this step; default: the newest whole one")
    parser.add_argument("--base", metavar="MODEL", help="diffusers pipeline folder, or hub id")
    parser.add_argument("--images", type=int, default=4, help="pictures of each prompt and model (default: 4)")
    parser.add_argument("--steps", type=int, help="DDIM steps")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance scale; 1: off")
    parser.add_argument("--eta", type=float, help="noise scale of DDIM; above 0")
    parser.add_argument("--seed", type=int, help="of the noise")
    parser.add_argument("--out", type=Path, default=Path("grid.png"), help="the sheet (default: grid.png)")
    parser.add_argument("--separate", type=Path, metavar="DIR", help="also write every picture as a file of its own")
    return parser


def _complain(text: str) -> None:
    print(f"learner.generate: {' '.join(text.split())}", file=sys.stderr)
