"""A run's LoRA for other programs and for the hub: `python -m learner.export RUN --format diffusers|kohya|fused|peft`.

    diffusers  pytorch_lora_weights.safetensors, for load_lora_weights
    kohya      kohya.safetensors, for ComfyUI and A1111
    fused      a whole diffusers pipeline, the LoRA merged into its U-Net, with the scheduler that the run sampled with
    peft       PEFT's own form: the only one of an adapter alone for models without text

Each with README.md, a model card (reports/model_card.py), and tributary.json (reports/export_folder.py). Equal
checkpoints give equal files.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMPipeline, DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DModel

from diffusion import lora, lora_files
from diffusion.loading import load_model
from diffusion.locate import is_unconditional, load_errors, locate
from diffusion.lora_files import AdapterFile
from evaluation.finished_run import Trained, open_trained
from learner.config import Config, resolve
from records.run_folder import BEFORE
from reports import model_card
from reports.export_folder import new_folder
from reports.usage import DDIM, DPM_SOLVER

FORMATS = {"diffusers": (lora.DIFFUSERS_FILE,), "kohya": (lora.KOHYA_FILE,), "peft": lora.PEFT_FILES, "fused": ()}
GENERATIONS = {768: "sd_v1", 1024: "sd_v2"}  # Stable Diffusion's, by the width of the text that its attention takes


class CannotExport(ValueError):
    """A form that this model has not; the message says which it has."""


def export(trained: Trained, form: str, url: str, base_model: str | None = None) -> None:
    """Write the folder `url` in one piece. Where model.path is a folder, the card names `base_model`, a hub id.

    Raises:
        CannotExport: the model has no such form.
        BadAdapter, CheckpointError: the checkpoint's LoRA is not what it should be.
        BaseModelError: `fused`, and the base model is not there.
        FolderTaken: `url` holds other files.
        StorageError, OSError: something cannot be read or written.
    """
    files = trained.lora_files
    if missing := set(FORMATS[form]) - set(files):
        without_text = lora.PEFT_FILES[1] in files
        raise CannotExport(
            f"--format {form}: this model takes no text, and {form} knows no LoRA of such; use --format peft or fused"
            if without_text
            else f"--format {form}: the checkpoint has no {sorted(missing)[0]}; use --format diffusers, kohya or fused"
        )
    adapter = trained.adapter()
    base = model_card.base_of(trained.config.model.path, base_model)
    about = facts(trained, adapter, base.name)
    with new_folder(url, {"form": form, **about}) as folder:
        for name in FORMATS[form]:
            content = files[name]
            if name.endswith(".safetensors"):
                content = lora_files.with_metadata(content, _metadata(about, form, adapter))
            (folder / name).write_bytes(content)
        if form == "fused":
            _save_fused(trained.config, adapter, folder)
        sheets = _sheets(trained)
        for name, sheet in sheets.items():
            (folder / name).write_bytes(sheet)
        page = model_card.card(trained, form, adapter, base, list(sheets), about["version"])
        (folder / "README.md").write_text(page, encoding="utf-8")


def facts(trained: Trained, adapter: AdapterFile, base: str) -> dict[str, str]:
    """Where an adapter comes from."""
    records = trained.records
    return {
        "version": (records.about.get("environment") or {}).get("tributary") or _version(),
        "run": records.about["name"],
        "run_id": records.run_id,
        "step": str(trained.step),
        "reward": model_card.reward_in_words(trained),
        "objective": model_card.objective_in_words(trained),
        "base_model": base,
        "adapter_sha256": adapter.sha256,
    }


def _metadata(about: dict[str, str], form: str, adapter: AdapterFile) -> dict[str, str]:
    found = {f"tributary.{key}": value for key, value in about.items()}
    if form != "kohya":
        return found
    widths = {
        adapter.state[f"{name}.lora_A.weight"].shape[1] for name in adapter.modules if name.endswith("attn2.to_k")
    }
    generation = GENERATIONS.get(widths.pop()) if len(widths) == 1 else None
    known = {"ss_base_model_version": generation, "ss_v2": str(generation == "sd_v2")} if generation else {}
    return {
        **found,
        **known,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(adapter.rank),
        "ss_network_alpha": str(adapter.alpha),
        "ss_sd_model_name": about["base_model"],
        "ss_output_name": about["run"],
        "ss_steps": about["step"],
        "ss_training_comment": f"Tributary, reward {about['reward']}, {about['objective']}",
    }


def _save_fused(config: Config, adapter: AdapterFile, folder: Path) -> None:
    """In float32: rounding the merged weights to half precision would lose part of a small LoRA."""
    path = str(resolve(config.model.path))
    pipeline: Any
    if is_unconditional(path):
        model = load_model(path)
        lora_files.merge(model.unet, adapter)
        unet = UNet2DModel.from_config(model.unet.config)
        unet.load_state_dict(model.unet.state_dict())
        pipeline = DDIMPipeline(unet, model.scheduler)
    else:
        place = locate(path)
        with load_errors(path):
            pipeline = StableDiffusionPipeline.from_pretrained(place, dtype=torch.float32, use_safetensors=True)
        lora_files.merge(pipeline.unet, adapter)
    shipped = pipeline.scheduler.config
    pipeline.scheduler = (
        DPMSolverMultistepScheduler.from_config(shipped, **DPM_SOLVER)
        if config.sampler.grid == "dpm_solver"
        else DDIMScheduler.from_config(shipped, **DDIM)
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    for file in folder.rglob("*.json"):
        _forget_place(file)


def _forget_place(file: Path) -> None:
    """Where the base model was read from is nobody's business, and would make equal exports differ."""
    found = json.loads(file.read_text(encoding="utf-8"))
    if isinstance(found, dict) and found.pop("_name_or_path", None):
        file.write_text(json.dumps(found, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _sheets(trained: Trained) -> dict[str, bytes]:
    """The run's pictures of the base model, and of this very checkpoint, where there are both."""
    there, last = trained.records.evaluated(), trained.epochs - 1
    if last < 0 or BEFORE not in there or last not in there:
        return {}
    return {"before.png": trained.records.sheet(BEFORE), "after.png": trained.records.sheet(last)}


def _version() -> str:
    try:
        return version("tributary")
    except PackageNotFoundError:
        return ""


def main(arguments: list[str] | None = None) -> int:
    """Prints the folder; exit status 0, or 2 after one line on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m learner.export", description="Write a run's LoRA for other programs, with a model card."
    )
    parser.add_argument("run", help="run directory or URL")
    parser.add_argument("--format", required=True, choices=FORMATS, help="peft: for models without text")
    parser.add_argument("--out", help="folder or URL to write; default: RUN/export/FORMAT")
    parser.add_argument("--step", type=int, help="checkpoint of this step; default: the newest whole one")
    parser.add_argument("--base-model", metavar="ID", help="hub id for the card, where model.path is a folder")
    args = parser.parse_args(arguments)
    try:
        trained = open_trained(args.run, args.step, lambda text: _complain(f"warning: {text}"))
        url = args.out or f"{trained.records.storage}/export/{args.format}"
        export(trained, args.format, url, args.base_model)
    except (OSError, ValueError) as error:
        _complain(f"{args.run}: {error}")
        return 2
    print(url)
    return 0


def _complain(text: str) -> None:
    print(f"learner.export: {' '.join(text.split())}", file=sys.stderr)
