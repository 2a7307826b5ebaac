"""README.md of an export: the hub's front matter, and what was trained, how well, and how to use it.

It is made to be published: of paths on this machine only the last part is told. No date: equal exports are equal files.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from learner.config import Config, resolve
from records.storage import StorageError
from records.words import PROMPT, printable, short

if TYPE_CHECKING:  # torch comes with them
    from diffusion.lora_files import AdapterFile
    from evaluation.adapters import Trained

TEMPLATE = Path(__file__).with_name("model_card.md.j2")
LICENSES = {  # of models that are read from the hub's cache, where their cards are not
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "creativeml-openrail-m",
    "runwayml/stable-diffusion-v1-5": "creativeml-openrail-m",
    "CompVis/stable-diffusion-v1-4": "creativeml-openrail-m",
    "google/ddpm-cifar10-32": "apache-2.0",
}
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
PROMPTS = 5  # examples
KOHYA_FILE = "kohya.safetensors"
# How the run sampled, whatever scheduler the base model ships: diffusion/kernels.py.
DDIM = {"set_alpha_to_one": False, "steps_offset": 1}
DPM_SOLVER = {"algorithm_type": "sde-dpmsolver++", "solver_order": 1, "final_sigmas_type": "sigma_min"}


@dataclass(frozen=True)
class Base:
    """What a card says of the base model: its name, its hub id if it has one, its license."""

    name: str
    hub_id: str | None
    license: str


def base_of(path: str, hub_id: str | None = None) -> Base:
    """Of `model.path`; `hub_id` is said by whoever knows it. The license is that of the model's own card, where one is
    at hand, or known; `other` if not."""
    from huggingface_hub import metadata_load

    folder = resolve(path)
    if not folder.is_dir() and HUB_ID.fullmatch(path):
        hub_id = hub_id or path
    license = None
    with contextlib.suppress(OSError, ValueError, TypeError, yaml.YAMLError):  # no card, or one that nobody can read
        license = (metadata_load(folder / "README.md") or {}).get("license")
    known = license if isinstance(license, str) else LICENSES.get(hub_id or "", "other")
    return Base(hub_id or public(path), hub_id, known)


def public(path: str) -> str:
    """A path as it may be published."""
    return Path(path).name if Path(path).expanduser().is_absolute() or path.startswith(("~", ".")) else path


def reward_in_words(trained: Trained) -> str:
    """Its name, and of a sum what it sums."""
    prefix = "reward_mean/"
    parts = sorted({key.removeprefix(prefix) for line in trained.records.lines for key in line if prefix in key})
    return trained.config.reward.name + (f" of {', '.join(parts)}" if parts else "")


def objective_in_words(trained: Trained) -> str:
    """What was trained towards; without its target where the base model, whose size that takes, is not at hand."""
    from diffusion.locate import BaseModelError
    from diffusion.parts import latent_shape
    from learner.objectives.by_name import describe

    config = trained.config
    try:
        dimensions = prod(latent_shape(str(resolve(config.model.path)), config.model.pixels))
    except BaseModelError:
        return f"{config.objective.kind} ({config.objective.setting}), beta {config.objective.beta:g}"
    return describe(config, dimensions)


def usage(config: Config, form: str, base: str, place: str | None = None) -> str:
    """Python code that draws with diffusers as the run sampled, for an export of `form` in the folder `place`; `base`
    names the base model."""
    place = place or "path/to/this/folder"
    if (flow := _flow_options(config)) is not None:
        return flow_usage(config, base, place, flow)
    sampler, text, solver = config.sampler, config.prompts.path is not None, config.sampler.grid == "dpm_solver"
    ddim = (
        {"clip_sample": False, **DDIM} if text else DDIM
    )  # which PNDM's settings do not say; pixels as the model has it
    scheduler, settings = ("DPMSolverMultistepScheduler", DPM_SOLVER) if solver else ("DDIMScheduler", ddim)
    pipeline = (_pipeline(config) or "StableDiffusionPipeline") if text else "DDIMPipeline"
    names, own = [pipeline], scheduler
    load = [f"pipe = {pipeline}.from_pretrained({json.dumps(place if form == 'fused' else base)})"]
    code: list[str] = []
    if ends := config.noise_steps < sampler.steps:
        own, code = "NoiseAtFirst", noise_at_first(config.noise_steps, solver)
    if ends or form != "fused":
        names.append(scheduler)
        arguments = "".join(f", {key}={value!r}" for key, value in settings.items()) if form != "fused" else ""
        load.append(f"pipe.scheduler = {own}.from_config(pipe.scheduler.config{arguments})")
    imports = [f"from diffusers import {', '.join(sorted(names))}"]
    if form == "peft":
        imports.append("from peft import PeftModel")
        load.append(f"pipe.unet = PeftModel.from_pretrained(pipe.unet, {json.dumps(place)}).merge_and_unload()")
    elif form != "fused":
        name = f', weight_name="{KOHYA_FILE}"' if form == "kohya" else ""
        load.append("# Its warning of the text encoder is right: only the U-Net is trained.")
        load.append(f"pipe.load_lora_weights({json.dumps(place)}{name})")
    how = f"num_inference_steps={sampler.steps}, " + ("" if solver else f"eta={sampler.eta!r}, ")
    how = f'"a prompt", {how}guidance_scale={sampler.guidance!r}' if text else f"{how}batch_size=1"
    if text and config.model.pixels:
        how += f", height={config.model.pixels}, width={config.model.pixels}"
    first, end = config.objective.span(sampler.steps)
    if sampler.adapter == "window" and (first, end) != (0, sampler.steps):
        if text and form != "fused":
            code += lora_within(first, end)
            load.append(f"use_lora(pipe, {first <= 0 < end})")
            how += ", callback_on_step_end=lora_within"
        else:
            load.append(f"# The run used what was trained in steps {first} to {end - 1} alone; this uses it in all.")
    return "\n".join([*imports, "", *code, *load, f'pipe({how}).images[0].save("image.png")'])


def _pipeline(config: Config) -> str | None:
    """diffusers' class of the base model's pipeline; None where it is not here."""
    from diffusion.locate import BaseModelError, family_of

    try:
        return family_of(str(resolve(config.model.path))).pipelines[0]
    except BaseModelError:
        return None


def _flow_options(config: Config) -> str | None:
    """Of a flow model, what from_pretrained must be told beside its name; None of others, or where it is not here."""
    from diffusion.locate import BaseModelError, family_of
    from diffusion.parts import reads_by_t5

    path = str(resolve(config.model.path))
    with contextlib.suppress(BaseModelError):
        if family_of(path).flow:
            return "" if reads_by_t5(path) else ", text_encoder_3=None, tokenizer_3=None"
    return None


def flow_usage(config: Config, base: str, place: str, options: str) -> str:
    """As `usage`, of a flow model: its sampler's steps, diffusion/flow_kernels.py, are no scheduler of diffusers."""
    pipeline, pixels = _pipeline(config), config.model.pixels
    sampler = config.sampler
    first, end = config.objective.span(sampler.steps)
    within = sampler.adapter == "window" and (first, end) != (0, sampler.steps)
    eta = f"({sampler.eta!r} if i < {config.noise_steps} else 0.0)" if config.noise_steps < sampler.steps else None
    noisy = min(config.noise_steps, sampler.steps - 1)
    step = [
        "        clean, noise = sample - t * output, sample + (1 - t) * output",
        "        variance = eta**2 * s**2 * (t**2 - ((1 - t) / (1 - s) * s) ** 2) / t**2",
        "        mean = (1 - s) * clean + (s**2 - variance) ** 0.5 * noise",
    ]
    if sampler.kernel == "calibrated" and sampler.spread:
        spread = [*sampler.spread[:noisy], *[0.0] * (sampler.steps - noisy)]
        step.append(f"        spread = {spread}[i]")
        step.append("        variance += ((1 - s) - (1 - t) ** 2 / (1 - s) * s**2 / t**2) ** 2 * spread")
    elif sampler.kernel == "flow_grpo":
        step = [
            f"        inside, eta = self.sigmas[1].item() if t == 1 else t, eta if i < {sampler.steps - 1} else 0.0",
            "        variance = eta**2 * inside / (1 - inside) * (t - s)",
            "        mean = sample + (s - t) * output - variance / (2 * t) * (sample + (1 - t) * output)",
        ]
    return "\n".join([
        "import torch",
        f"from diffusers import FlowMatchEulerDiscreteScheduler, {pipeline}",
        "",
        "class WithNoise(FlowMatchEulerDiscreteScheduler):",
        "    def step(self, output, timestep, sample, **more):",
        "        i = self.index_for_timestep(timestep)",
        "        t, s, eta = self.sigmas[i].item(), self.sigmas[i + 1].item(), " + (eta or repr(sampler.eta)),
        *step,
        "        return (mean + variance**0.5 * torch.randn_like(mean),)",
        "",
        *(lora_within(first, end) if within else []),
        f"pipe = {pipeline}.from_pretrained({json.dumps(base)}{options})",
        "pipe.scheduler = WithNoise.from_config(pipe.scheduler.config)",
        f"pipe.load_lora_weights({json.dumps(place)})",
        *([f"use_lora(pipe, {first <= 0 < end})"] if within else []),
        f'pipe("a prompt", num_inference_steps={sampler.steps}, guidance_scale={sampler.guidance!r}'
        + (f", height={pixels}, width={pixels}" if pixels else "")
        + (f", max_sequence_length={config.model.text_tokens}" if config.model.text_tokens else "")
        + (", callback_on_step_end=lora_within" if within else "")
        + ').images[0].save("image.png")',
    ])  # fmt: skip


def lora_within(first: int, end: int) -> list[str]:
    """Lines of a pipeline's callback that uses the LoRA in steps `first` to `end` - 1, as sampler.adapter=window."""
    return [
        "def use_lora(pipe, on):",
        "    pipe.enable_lora() if on else pipe.disable_lora()",
        "",
        "def lora_within(pipe, step, timestep, more):",
        f"    use_lora(pipe, {first} <= step + 1 < {end})",
        "    return more",
        "",
    ]


def noise_at_first(count: int, solver: bool) -> list[str]:
    """Lines of a scheduler that adds noise in its first `count` steps, as sampler.noise=window has it."""
    last = f"timestep >= self.timesteps[{count - 1}]"
    if solver:
        return [
            "class NoiseAtFirst(DPMSolverMultistepScheduler):",
            "    def step(self, output, timestep, sample, generator=None, **more):",
            f'        self.register_to_config(algorithm_type="sde-dpmsolver++" if {last} else "dpmsolver++")',
            "        return super().step(output, timestep, sample, generator=generator, **more)",
            "",
        ]
    return [
        "class NoiseAtFirst(DDIMScheduler):",
        "    def step(self, output, timestep, sample, eta=0.0, generator=None, **more):",
        f"        eta = eta if {last} else 0.0",
        "        return super().step(output, timestep, sample, eta=eta, generator=generator, **more)",
        "",
    ]


def card(
    trained: Trained, form: str, adapter: AdapterFile, base: Base, sheets: Sequence[str], about: dict[str, str],
    generation: str | None = None,
) -> str:  # fmt: skip
    """The page, for an export of `form`; `sheets` are files of contact sheets beside it, of the base model and tuned;
    `about` is what every file of the export says of itself; `generation` whose U-Net it fits, as lora_files.generation.
    Raises a StorageError if a record cannot be read."""
    from huggingface_hub import ModelCard, ModelCardData

    from reports.summary import Facts, figures, plural

    config, records = trained.config, trained.records
    task = "text-to-image" if config.prompts.path is not None else "unconditional-image-generation"
    tags = [task, "diffusers"] + ["stable-diffusion"] * (task == "text-to-image") + ["lora"] * (form != "fused")
    front = ModelCardData(
        license=base.license, library_name="diffusers", pipeline_tag=task, base_model=base.hub_id,
        base_model_relation=("finetune" if form == "fused" else "adapter") if base.hub_id else None,
        tags=[*tags, "gflownet", config.objective.kind.replace("_", "-"), "tributary"],
    )  # fmt: skip
    page = ModelCard.from_template(
        front, template_path=str(TEMPLATE), plain=plain, public=public, trained=trained, form=form, adapter=adapter,
        base=base, sheets=sheets, about=about, generation=generation, usage=usage(config, form, base.name),
        prompts=_prompts(trained), figures=figures(records, trained.step), plural=plural,
        facts=Facts(records, config, trained.epochs),
    )  # fmt: skip
    return re.sub(r"\n{3,}", "\n\n", str(page)).rstrip() + "\n"


def _prompts(trained: Trained) -> list[str]:
    """Examples, out of the records: the file may be elsewhere, or another by now."""
    if not trained.epochs or trained.config.prompts.path is None:
        return []
    try:
        table = trained.records.trajectories(trained.epochs - 1, "prompt")
    except StorageError as error:
        trained.records.warn(f"{error}; the card names no prompts")
        return []
    return [short(text or "", PROMPT) for text in dict.fromkeys(table["prompt"].to_pylist())][:PROMPTS]


def plain(text: str) -> str:
    """In one line, without control characters, and no end of a code span or of a table's cell."""
    shown = " ".join(printable(short(text)).split())
    return shown.replace("`", "'").replace("|", "\\|")
