"""A run's LoRA for other programs and for the hub: `python -m learner.export RUN --format diffusers|kohya|fused|peft`.

    diffusers  pytorch_lora_weights.safetensors, for load_lora_weights
    kohya      kohya.safetensors, for ComfyUI and A1111: the same, named and described for them
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
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic_core import from_json

from commands.outcome import attempt, warner
from records.storage import Storage, StorageError

if TYPE_CHECKING:  # torch comes with them
    from diffusion.lora_files import AdapterFile
    from evaluation.adapters import Trained
    from learner.config import Config

MANIFEST = "tributary.json"
FORMATS = ("diffusers", "kohya", "peft", "fused")


def export(trained: Trained, form: str, url: str, base_model: str | None = None) -> None:
    """Write the folder `url` in one piece. Where model.path is a folder, the card names `base_model`, a hub id.

    Raises a ValueError, which names the remedy, if the model has no such form or `url` holds other files; BadAdapter,
    CheckpointError, BaseModelError and OSError for what cannot be read or written."""
    from diffusion import lora, lora_files
    from records.run_folder import BEFORE
    from reports import model_card

    files, records = trained.lora_files, trained.records
    wanted = {"diffusers": (lora.DIFFUSERS_FILE,), "kohya": (lora.KOHYA_FILE,), "peft": lora.PEFT_FILES}.get(form, ())
    if any(name not in files for name in wanted):
        if lora.PEFT_FILES[1] in files:
            raise ValueError(f"--format {form}: this model takes no text; use --format peft or fused")
        if lora.KOHYA_FILE not in files:
            raise ValueError(f"--format {form}: no such form of this kind of model is written; use --format diffusers")
        raise ValueError(f"--format {form}: this model takes text; use --format diffusers, kohya or fused")
    if form == "fused":
        _require_fusable(trained.config)
    require_replaceable(Storage(url))  # before the work
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
    known = lora_files.generation(adapter) if form in ("diffusers", "kohya") else None
    content = _fused(trained.config, adapter) if form == "fused" else {name: files[name] for name in wanted}
    # Under its name older runs have a file that only the newest libraries read.
    if form == "diffusers" and lora.KOHYA_FILE in files:
        content[lora.DIFFUSERS_FILE] = files[lora.KOHYA_FILE]
    for name in wanted:
        if name.endswith(".safetensors"):
            content[name] = lora.with_metadata(content[name], _metadata(about, form, adapter, known))
    sheets = {"before.png": BEFORE, "after.png": trained.epochs - 1}  # of the base model, and of this very checkpoint
    if trained.epochs and set(sheets.values()) <= set(records.evaluated()):
        try:
            content |= {name: records.sheet(epoch) for name, epoch in sheets.items()}
        except StorageError as error:
            records.warn(f"{error}; the card shows no sheets")
    page = model_card.card(trained, form, adapter, base, [name for name in sheets if name in content], about, known)
    write(url, content | {"README.md": page.encode()}, {"form": form, **about})


def _require_fusable(config: Config) -> None:
    """Raises a ValueError where no whole pipeline is written, a BaseModelError where there is none to be fused with."""
    from diffusion.locate import family_of
    from learner.config import resolve

    family = family_of(str(resolve(config.model.path)))
    if family.name != "base_model":
        raise ValueError(f"--format fused: of {family.words} no whole pipeline is written; use --format diffusers")


def _metadata(about: dict[str, str], form: str, adapter: AdapterFile, generation: str | None) -> dict[str, str]:
    metadata = {f"tributary.{key}": value for key, value in about.items()}
    if form != "kohya":
        return metadata
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

    from diffusion import lora_files, pipeline_files
    from diffusion.base_model import OPTIONAL, BaseModel
    from diffusion.locate import BaseModelError, is_unconditional, load_errors, locate
    from diffusion.parts import load_scheduler
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

        def load(**parts: Any) -> Any:
            place = locate(path)
            with load_errors(path):
                return StableDiffusionPipeline.from_pretrained(
                    place, dtype=torch.float32, use_safetensors=True, **parts
                )

        try:
            pipeline = load()
        except BaseModelError:
            pipeline = load(**dict.fromkeys(OPTIONAL), requires_safety_checker=False)
            warner("export")(f"{path} lacks one of {', '.join(OPTIONAL)}: the export has none of them")
        lora_files.merge(pipeline.unet, adapter)
    solver = config.sampler.grid == "dpm_solver"
    scheduler, settings = (DPMSolverMultistepScheduler, DPM_SOLVER) if solver else (DDIMScheduler, DDIM)
    pipeline.scheduler = scheduler.from_config(load_scheduler(path).config, **settings)
    with tempfile.TemporaryDirectory() as folder:
        pipeline_files.save(pipeline, Path(folder))
        content = {name: Path(folder, name).read_bytes() for name in files_in(Path(folder))}
    for name in [name for name in content if name.endswith(".json")]:
        tree = json.loads(content[name])
        if isinstance(tree, dict) and tree.pop("_name_or_path", None):  # where the base model was read from
            content[name] = (json.dumps(tree, indent=2, sort_keys=True) + "\n").encode()
    return content


def write(url: str, content: Mapping[str, bytes], about: Mapping[str, Any]) -> None:
    """Make `url` the folder of these files and of a manifest, in one piece; an earlier export is replaced. Raises a
    ValueError if it holds other files, a StorageError if it cannot be read or written."""
    storage = Storage(url)
    require_replaceable(storage)
    manifest = json.dumps({**about, "files": {file: _sha256(data) for file, data in content.items()}}, indent=1) + "\n"
    place = str(storage.local.resolve() if storage.local else storage)  # a link stays one
    parent, _, name = place.rstrip("/").rpartition("/")
    Storage(parent).write_folder(name, {**content, MANIFEST: manifest.encode()})  # on an object store in this order


def require_replaceable(storage: Storage) -> None:
    """Raises a ValueError for something that no export wrote, or that was changed since; and a StorageError."""
    folder = storage.local
    strange = files_in(folder) if folder else storage.entries()
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        sums = from_json(storage.read(MANIFEST))["files"]
        names = [name for name in strange if name != MANIFEST] if folder else []  # an object store's: as it is named
        strange = [name for name in names if sums.get(name) != _sha256(storage.read(name))]
    if strange:
        raise ValueError(
            f"{storage} holds {strange[0]}, which is not as an export wrote it: give another --out, or empty the folder"
        )


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def files_in(folder: Path) -> list[str]:
    """Names of everything beneath that is no folder, sorted; of a file its own."""
    if folder.is_file():
        return [folder.name]
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())


def main(arguments: list[str] | None = None) -> int:
    """Prints the folder; exit status 0, or 2 after one line on stderr."""
    parser = argparse.ArgumentParser("python -m learner.export", description="Write a run's LoRA for other programs.")
    parser.add_argument("run", help="run directory or URL")
    parser.add_argument("--format", required=True, choices=FORMATS, help="peft: for models without text")
    parser.add_argument("--out", help="folder or URL to write; default: RUN/export/FORMAT")
    parser.add_argument("--step", type=int, help="checkpoint of this step; default: the newest whole one")
    parser.add_argument("--base-model", metavar="ID", help="hub id for the card, where model.path is a folder")
    args = parser.parse_args(arguments)

    def work() -> None:
        from evaluation.adapters import open_trained  # here: --help and argument errors must come fast

        trained = open_trained(args.run, args.step, warner("export"))
        storage, place = trained.records.storage, f"export/{args.format}"
        if not args.out:
            storage.exists(place)  # a StorageError where a link in the run's folder leads out of it
        url = args.out or f"{storage}/{place}"
        export(trained, args.format, url, args.base_model)
        print(url)

    return attempt("export", work, args.run)
