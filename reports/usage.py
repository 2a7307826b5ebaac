"""How to use an export, for its card: code with the steps, eta and guidance that the run trained with."""

from __future__ import annotations

from diffusion import lora
from learner.config import Config

HERE = "path/to/this/folder"
# How the run sampled, whatever scheduler the base model ships: diffusion/kernels.py.
DDIM = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, "thresholding": False}
DPM_SOLVER = {"algorithm_type": "sde-dpmsolver++", "solver_order": 1, "final_sigmas_type": "sigma_min"}


def usage(config: Config, form: str, base: str) -> str:
    """Markdown for an export of `form`; `base` names the base model."""
    sampler, text = config.sampler, config.prompts.path is not None
    solver = sampler.grid == "dpm_solver"
    scheduler, settings = ("DPMSolverMultistepScheduler", DPM_SOLVER) if solver else ("DDIMScheduler", DDIM)
    pipeline = "StableDiffusionPipeline" if text else "DDIMPipeline"
    said = ", ".join(f"{key}={value!r}" for key, value in settings.items())
    lines = [f"from diffusers import {', '.join(sorted([pipeline] + [scheduler] * (form != 'fused')))}"]
    lines += ["from peft import PeftModel"] * (form == "peft")
    lines += ["", f'pipe = {pipeline}.from_pretrained("{HERE if form == "fused" else base}")']
    if form != "fused":
        lines.append(f"pipe.scheduler = {scheduler}.from_config(pipe.scheduler.config, {said})")
    lines += {
        "diffusers": [f'pipe.load_lora_weights("{HERE}")'],
        "kohya": [f'pipe.load_lora_weights("{HERE}", weight_name="{lora.KOHYA_FILE}")'],
        "peft": [f'pipe.unet = PeftModel.from_pretrained(pipe.unet, "{HERE}").merge_and_unload()'],
        "fused": [],
    }[form]
    how = f"num_inference_steps={sampler.steps}, " + ("" if solver else f"eta={sampler.eta!r}, ")
    how += f"guidance_scale={sampler.guidance!r}" if text else "batch_size=1"
    call = f'pipe("a prompt", {how})' if text else f"pipe({how})"
    code = "\n".join([*lines, f'{call}.images[0].save("image.png")'])
    found = [f"With diffusers, as the run sampled:\n\n```python\n{code}\n```"]
    if form == "diffusers":
        found.append("For ComfyUI and A1111 export it with `--format kohya`.")
    if form == "kohya":
        found.append(
            f"ComfyUI: put `{lora.KOHYA_FILE}` into `models/loras` and load it with LoraLoader at strength 1. A1111: "
            f"put it into `models/Lora`. {sampler.steps} steps, CFG scale {sampler.guidance:g}; their samplers are "
            "others than DDIM with this eta, so pictures will differ."
        )
    return "\n\n".join(found)
