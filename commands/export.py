"""A run's LoRA for other programs and for the hub: `python -m learner.export RUN --format diffusers|kohya|fused|peft`.

    diffusers  pytorch_lora_weights.safetensors, for load_lora_weights
    kohya      kohya.safetensors, for ComfyUI and A1111
    fused      a whole diffusers pipeline, the LoRA merged into its U-Net, with the scheduler that the run sampled with
    peft       PEFT's own form: the only one of an adapter alone for models without text

Each with README.md, a model card (reports/model_card.py), and tributary.json, a manifest with the sha256 of every other
file: a folder whose files are all as their manifest says is an earlier export and may be replaced; anything else is
somebody's. Equal checkpoints give equal files.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from records.storage import Storage

if TYPE_CHECKING:  # torch comes with them
    from diffusion.lora_files import AdapterFile
    from evaluation.finished_run import Trained
    from learner.config import Config

MANIFEST = "tributary.json"
FORMATS = ("diffusers", "kohya", "peft", "fused")
GENERATIONS = {768: "sd_v1", 1024: "sd_v2"}  # Stable Diffusion's, by the width of the text that its attention takes


class CannotExport(ValueError):
    """A form that this model has not, or a folder with files that no export wrote; the message names the remedy."""


def export(trained: Trained, form: str, url: str, base_model: str | None = None) -> None:
    """Write the folder `url` in one piece. Where model.path is a folder, the card names `base_model`, a hub id.

    Raises:
        CannotExport: the model has no such form, or `url` holds other files.
        BadAdapter, CheckpointError: the checkpoint's LoRA is not what it should be.
        BaseModelError: `fused`, and the base model is not there.
        StorageError, OSError: something cannot be read or written.
    """
    from diffusion import lora, lora_files
    from records.run_folder import BEFORE
    from reports import model_card

    files, records = trained.lora_files, trained.records
    wanted = {"diffusers": (lora.DIFFUSERS_FILE,), "kohya": (lora.KOHYA_FILE,), "peft": lora.PEFT_FILES}.get(form, ())
    if missing := [name for name in wanted if name not in files]:
        raise CannotExport(
            f"--format {form}: this model takes no text, and {form} knows no LoRA of such; use --format peft or fused"
            if lora.PEFT_FILES[1] in files
            else f"--format {form}: the checkpoint has no {missing[0]}; use --format diffusers, kohya or fused"
        )
    adapter = trained.adapter()
    base = model_card.base_of(trained.config.model.path, base_model)
    about = {
        "version": (records.about.get("environment") or {}).get("tributary") or "",
        "run": records.about["name"],
        "run_id": records.run_id,
        "step": str(trained.step),
        "reward": model_card.reward_in_words(trained),
        "objective": model_card.objective_in_words(trained),
        "base_model": base.name,
        "adapter_sha256": adapter.sha256,
    }
    _place(url)  # before the work: may it be written?
    content = {name: files[name] for name in wanted}
    for name in content:
        if name.endswith(".safetensors"):
            content[name] = lora_files.with_metadata(content[name], _metadata(about, form, adapter))
    if form == "fused":
        content = _fused(trained.config, adapter)
    sheets = {"before.png": BEFORE, "after.png": trained.epochs - 1}  # of the base model, and of this very checkpoint
    if trained.epochs and set(sheets.values()) <= set(records.evaluated()):
        content |= {name: records.sheet(epoch) for name, epoch in sheets.items()}
    page = model_card.card(trained, form, adapter, base, [name for name in sheets if name in content], about)
    write(url, content | {"README.md": page.encode()}, {"form": form, **about})


def _metadata(about: dict[str, str], form: str, adapter: AdapterFile) -> dict[str, str]:
    metadata = {f"tributary.{key}": value for key, value in about.items()}
    if form != "kohya":
        return metadata
    weights = (adapter.state[f"{name}.lora_A.weight"] for name in adapter.modules if name.endswith("attn2.to_k"))
    widths = {weight.shape[1] for weight in weights}
    generation = GENERATIONS.get(widths.pop()) if len(widths) == 1 else None
    known = {"ss_base_model_version": generation, "ss_v2": str(generation == "sd_v2")} if generation else {}
    return metadata | known | {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(adapter.rank),
        "ss_network_alpha": str(adapter.alpha),
        "ss_sd_model_name": about["base_model"],
        "ss_output_name": about["run"],
        "ss_steps": about["step"],
        "ss_training_comment": f"Tributary, reward {about['reward']}, {about['objective']}",
    }  # fmt: skip


def _fused(config: Config, adapter: AdapterFile) -> dict[str, bytes]:
    """Files of the pipeline, in float32: rounding the merged weights to half precision would lose part of a small
    LoRA."""
    import torch
    from diffusers import DDIMPipeline, DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DModel

    from diffusion import lora_files
    from diffusion.base_model import BaseModel
    from diffusion.locate import is_unconditional, load_errors, locate
    from learner.config import resolve
    from reports.model_card import DDIM, DPM_SOLVER

    path = str(resolve(config.model.path))
    pipeline: Any
    if is_unconditional(path):
        model = BaseModel(path)
        lora_files.merge(model.unet, adapter)
        unet = UNet2DModel.from_config(model.unet.config)
        unet.load_state_dict(model.unet.state_dict())
        pipeline = DDIMPipeline(unet, model.scheduler)
    else:
        place = locate(path)
        with load_errors(path):
            pipeline = StableDiffusionPipeline.from_pretrained(place, dtype=torch.float32, use_safetensors=True)
        lora_files.merge(pipeline.unet, adapter)
    solver = config.sampler.grid == "dpm_solver"
    scheduler, settings = (DPMSolverMultistepScheduler, DPM_SOLVER) if solver else (DDIMScheduler, DDIM)
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, **settings)
    with tempfile.TemporaryDirectory() as folder:
        pipeline.save_pretrained(folder, safe_serialization=True)
        content = {name: Path(folder, name).read_bytes() for name in _files(Path(folder))}
    for name in [name for name in content if name.endswith(".json")]:
        tree = json.loads(content[name])
        if isinstance(tree, dict) and tree.pop("_name_or_path", None):  # where the base model was read from
            content[name] = (json.dumps(tree, indent=2, sort_keys=True) + "\n").encode()
    return content


def write(url: str, content: Mapping[str, bytes], about: Mapping[str, Any]) -> None:
    """Make `url` the folder of these files and of a manifest, in one piece; an earlier export is replaced.

    Raises:
        CannotExport: it holds other files.
        StorageError: it cannot be read or written.
    """
    storage, name = _place(url)
    sums = {file: _sha256(data) for file, data in content.items()}
    manifest = json.dumps({**about, "files": sums}, indent=1) + "\n"
    storage.write_folder(name, {**content, MANIFEST: manifest.encode()})  # on an object store in this order


def _place(url: str) -> tuple[Storage, str]:
    """The folder's parent, and its name in there, if an export may be written there."""
    storage = Storage(url)
    folder = storage.local.resolve() if storage.local else None
    if folder and folder.is_file():
        raise CannotExport(f"{folder} is a file; give another --out")
    strange = _files(folder) if folder else storage.entries()
    if folder:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            sums = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
            sums[MANIFEST] = _sha256((folder / MANIFEST).read_bytes())  # it cannot have its own
            strange = [name for name in strange if sums.get(name) != _sha256((folder / name).read_bytes())]
    elif storage.exists(MANIFEST):
        strange = []
    if strange:
        raise CannotExport(
            f"{storage} holds {strange[0]}, which is not as an export wrote it: give another --out, or empty the folder"
        )
    parent, _, name = str(folder or storage).rstrip("/").rpartition("/")
    return Storage(parent), name


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _files(folder: Path) -> list[str]:
    """Names of everything beneath that is no folder, sorted."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())


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

    from evaluation.finished_run import open_trained  # here: --help and argument errors must come fast

    try:
        trained = open_trained(args.run, args.step, lambda text: _complain(f"warning: {text}"))
        url = args.out or f"{trained.records.storage}/export/{args.format}"
        export(trained, args.format, url, args.base_model)
    except (OSError, ValueError) as error:
        _complain(f"{args.run}: {error}")
        return 2
    except (AttributeError, LookupError, TypeError, ArithmeticError) as error:  # a value of another kind
        _complain(f"{args.run}: its files are damaged, or of another Tributary: {error!r}")
        return 2
    print(url)
    return 0


def _complain(text: str) -> None:
    print(f"learner.export: {' '.join(text.split())}", file=sys.stderr)
