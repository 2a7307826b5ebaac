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
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from pydantic import ValidationError

from diffusion.failures import RunFailure
from diffusion.trajectory import Chunk
from evaluation.finished_run import LORA, open_trained
from learner.config import Config, load_config, resolve, saved_config
from learner.config.sections import SamplerConfig
from records.run_folder import RUN, Records
from records.storage import Storage

if TYPE_CHECKING:
    from diffusion.lora_files import AdapterFile

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
    import torch

    from diffusion import lora, lora_files
    from diffusion.base_model import BaseModel, Decoder
    from diffusion.rollout import Sampler
    from learner import build

    build.prepare_process(config)
    place = str(resolve(config.model.path)), build.device(config), getattr(torch, config.model.dtype)
    model = BaseModel(*place)
    if adapter is None:
        model.attach_lora(1, 1, seed=0)  # samplers have one; it stays off
        snapshot = lora.snapshot(model.unet, 0)
    else:
        snapshot = lora_files.attach(model, adapter)
    model.speed_up(config.model.channels_last)
    sampler, decoder = Sampler(model, config.rollout_settings()), Decoder(*place)

    @torch.no_grad()
    def pictures(prompt: str) -> np.ndarray:
        parts = []
        for chunk in _chunks(prompt, images, seed, config.sampler.chunk_size):
            _, clean = sampler.sample(chunk, snapshot)
            shown = decoder(torch.from_numpy(clean.latents.astype(np.float32)))  # rounded as the scorer does:
            parts.append(shown.mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy())
        return np.concatenate(parts)

    def row(prompt: str) -> tuple[np.ndarray, ...]:
        with model.without_lora():
            base = pictures(prompt)
        return (base,) if adapter is None else (base, pictures(prompt))

    return [row(prompt) for prompt in prompts]


def _chunks(prompt: str, images: int, seed: int, size: int) -> Iterator[Chunk]:
    for start in range(0, images, size):
        ids = tuple(range(start, min(start + size, images)))
        yield Chunk(start // size, "evaluate", 0, seed, (prompt,) * len(ids), ids)


def find(lora: str, step: int | None, warn: Callable[[str], None]) -> tuple[AdapterFile, Config | None]:
    """The LoRA of a run, of one of its checkpoints, or of files anywhere; and the run's settings, if there is a run.

    Raises:
        BadAdapter, CheckpointError, ConfigError, StorageError: as `open_trained` and `lora_files.read`.
        ValueError: there is nothing, or a step of what is no run.
    """
    if "://" in lora or Storage(lora).exists(RUN):
        trained = open_trained(lora, step, warn)
        return trained.adapter(), trained.config
    if step is not None:
        raise ValueError(f"--step: {lora} is no run's directory (it has no {RUN})")
    path = Path(lora).expanduser()
    if not path.exists():
        raise ValueError(f"--lora: {lora}: no such file or folder; give a run's directory, or a LoRA's file or folder")
    from diffusion import lora_files

    adapter = lora_files.read(path / LORA if (path / LORA).is_dir() else path)
    run = next((folder for folder in (path, *path.resolve().parents) if (folder / RUN).is_file()), None)
    return adapter, saved_config(Records.open(Storage(str(run)))) if run else None


def settings(config: Config | None, base: str | None, sampling: dict[str, Any]) -> Config:
    """The run's settings, the demo's, or of another base model the defaults; with this base model and `sampling`."""
    config = config or (Config() if base else load_config())
    if base:
        config = config.model_copy(update={"model": config.model.model_copy(update={"path": base})})
    return config.model_copy(update={"sampler": config.sampler.model_copy(update=sampling)})


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling settings that are given; with them everything is checked that can be found to be wrong at once.

    Raises:
        ValueError: see the messages.
    """
    for wrong, message in (
        (args.lora is None and args.step is not None, "--step: of which run? give --lora RUN"),
        (args.images < 1, f"--images: expected 1 or more, got {args.images}"),
        ((args.seed or 0) < 0, f"--seed: expected 0 or more, got {args.seed}"),
        (args.out.suffix.lower() != ".png", f"--out: {args.out} is no .png file"),
        (not args.out.parent.is_dir(), f"--out: there is no folder {args.out.parent}; make it first"),
        (args.out.is_dir(), f"--out: {args.out} is a folder"),
    ):
        if wrong:
            raise ValueError(message)
    sampling = {key: getattr(args, key) for key in SAMPLING if getattr(args, key) is not None}
    try:
        SamplerConfig(**sampling)
    except ValidationError as error:
        fault = error.errors()[0]
        raise ValueError(f"--{fault['loc'][0]}: {fault['msg']}, got {fault['input']!r}") from error
    return sampling


def _run(args: argparse.Namespace) -> None:
    """
    Raises:
        OSError, ValueError: bad input.
        OutOfMemory: the GPU is too small.
    """
    sampling = _sampling(args)
    adapter, run_config = find(args.lora, args.step, _warn) if args.lora else (None, None)
    if adapter is not None and adapter.note:
        _warn(adapter.note)
    config = settings(run_config, args.base, sampling)
    from diffusion.locate import is_unconditional

    unconditional = is_unconditional(str(resolve(config.model.path)))
    if unconditional and args.prompt:
        raise ValueError(f"--prompt: {config.model.path} takes no text; leave it out")
    if not unconditional and not args.prompt:
        raise ValueError("--prompt: what shall be drawn? give one or more")
    prompts, seed = args.prompt or [""], config.evaluation.seed if args.seed is None else args.seed
    drawn = draw(config, adapter, prompts, args.images, seed)
    from reports.pictures import LABELS, comparison

    if args.separate:
        args.separate.mkdir(parents=True, exist_ok=True)
        for p, both in enumerate(drawn, 1):
            for label, row in zip(LABELS, both, strict=False):
                for i, pixels in enumerate(row):
                    _write(args.separate / f"prompt-{p:02d}-image-{i:02d}-{label}.png", Image.fromarray(pixels))
    sampler = config.sampler
    with_lora = f" tuned: with {args.lora} (rank {adapter.rank}, alpha {adapter.alpha:g})." if adapter else ""
    noise = f"{'Same noise in a column: s' if adapter else 'S'}eed {seed}"
    legend = (
        f"base: {Path(config.model.path).name}.{with_lora} {noise}, {sampler.steps} steps, "
        f"guidance {sampler.guidance:g}, eta {sampler.eta:g}"
    )
    _write(args.out, comparison(prompts, drawn, legend))


def _write(file: Path, picture: Image.Image) -> None:
    """In one piece."""
    aside = file.with_name(f".{file.name}.{os.getpid()}.new")
    try:
        picture.save(aside, "PNG")
        aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)


def main(arguments: list[str] | None = None) -> int:
    """Prints the file; exit status 0, 2 after one line on stderr: bad input, 1: the GPU is too small."""
    args = _parser().parse_args(arguments)
    try:
        _run(args)
    except (OSError, ValueError) as error:
        _complain(str(error))
        return 2
    except RunFailure as error:
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
    add = parser.add_argument
    add("--prompt", action="append", help="what to draw; may be given again. Not for models without text")
    add("--lora", help="run directory or URL, a LoRA's folder, or its .safetensors file; without: the base model alone")
    add("--step", type=int, help="of a run: its checkpoint of this step; default: the newest whole one")
    add("--base", metavar="MODEL", help="diffusers pipeline folder, or hub id")
    add("--images", type=int, default=4, help="pictures of each prompt and model (default: 4)")
    add("--steps", type=int, help="DDIM steps")
    add("--guidance", type=float, help="classifier-free guidance scale; 1: off")
    add("--eta", type=float, help="noise scale of DDIM; above 0")
    add("--seed", type=int, help="of the noise")
    add("--out", type=Path, default=Path("grid.png"), help="the sheet (default: grid.png)")
    add("--separate", type=Path, metavar="DIR", help="also write every picture as a file of its own")
    return parser


def _complain(text: str) -> None:
    print(f"learner.generate: {' '.join(text.split())}", file=sys.stderr)


def _warn(text: str) -> None:
    _complain(f"warning: {text}")
