"""A run's LoRA as an MLflow model: prompts in, PNG pictures out. This file is that model's code.

reports/mlflow_registry.py logs it, as it stands, beside each adapter ("models from code"), so it imports nothing of
Tributary's: a serving host needs diffusers and peft alone. Nothing is pickled; weights come from safetensors.

A request is rows of `prompt` and, if wanted, `seed`; the params steps, guidance, eta and seed default to the run's own.
"""

from __future__ import annotations

import base64
import io
import threading
from typing import Any

import mlflow
import pandas as pd  # type: ignore[import-untyped]
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PythonModel, PythonModelContext

ADAPTER = "adapter_weights"  # the artifact
SCHEDULERS = {"DDIMScheduler": DDIMScheduler, "DPMSolverMultistepScheduler": DPMSolverMultistepScheduler}
MOST_STEPS, MOST_SEED = 1000, 2**63 - 1


class LoraModel(PythonModel):
    """Draws with the base model that the logged config names (`base_model` there can be given anew on loading).

    Pictures are drawn one by one, each from a generator of its own, so that a picture depends on its own row alone:
    plain diffusers draws the same pixels with the same scheduler, adapter and `torch.Generator("cpu")` seed.
    """

    def load_context(self, context: PythonModelContext) -> None:
        """
        Raises:
            MlflowException: INVALID_PARAMETER_VALUE, the base model is not there.
        """
        given = context.model_config
        try:
            pipeline: Any = DiffusionPipeline.from_pretrained(
                given["base_model"],
                revision=given["revision"],
                dtype=getattr(torch, given["dtype"]),
                use_safetensors=True,  # never a pickle
            )
        except (OSError, ValueError) as error:
            raise MlflowException.invalid_parameter_value(
                f"cannot open the base model {given['base_model']} ({error}); name another place as base_model in "
                "load_model's model_config or in MLFLOW_PYFUNC_INFERENCE_CONFIG"
            ) from error
        scheduler = SCHEDULERS[given["scheduler"]]
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, **given["scheduler_settings"])
        pipeline.load_lora_weights(context.artifacts[ADAPTER], weight_name="pytorch_lora_weights.safetensors")
        pipeline.set_progress_bar_config(disable=True)
        self._pipeline = pipeline.to(given["device"] or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._own = {key: given[key] for key in ("steps", "guidance", "eta")}
        self._turn = threading.Lock()  # a pipeline's scheduler counts its steps: one picture at a time

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """For each row `image`, a PNG file in base64, and the `seed` it was drawn with: the row's, else params["seed"]
        plus the row's number.

        Raises:
            MlflowException: INVALID_PARAMETER_VALUE, naming what is wrong with the request.
        """
        how = self._own | {"seed": 0} | (params or {})
        _require(1 <= how["steps"] <= MOST_STEPS, f"steps must be in 1..{MOST_STEPS}, got {how['steps']}")
        for name in ("guidance", "eta"):
            _require(how[name] >= 0, f"{name} must not be negative, got {how[name]}")
        wanted = []
        for number, row in enumerate(model_input.to_dict("records")):
            prompt, seed = row["prompt"], row.get("seed", how["seed"] + number)
            _require(isinstance(prompt, str), f"each prompt must be a string, got {prompt!r}")
            _require(0 <= seed <= MOST_SEED, f"seeds must be in 0..{MOST_SEED}, got {seed}")
            wanted.append((prompt, int(seed)))
        return [{"image": self._draw(prompt, seed, how), "seed": seed} for prompt, seed in wanted]

    def _draw(self, prompt: str, seed: int, how: dict[str, Any]) -> str:
        with self._turn:
            picture = self._pipeline(
                prompt,
                num_inference_steps=int(how["steps"]),
                guidance_scale=float(how["guidance"]),
                eta=float(how["eta"]),
                generator=torch.Generator("cpu").manual_seed(seed),  # the same noise on every device
            ).images[0]
        file = io.BytesIO()
        picture.save(file, "PNG")
        return base64.b64encode(file.getvalue()).decode("ascii")


def _require(holds: bool, fault: str) -> None:
    if not holds:
        raise MlflowException.invalid_parameter_value(fault)


mlflow.models.set_model(LoraModel())
