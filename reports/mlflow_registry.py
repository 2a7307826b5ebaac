"""A run's LoRA as a model in MLflow: a logged model of two flavours, and a version in the model registry.

    mlflow.diffusers.load_model   the adapter, beside the base model: safetensors alone, no code
    mlflow.pyfunc.load_model      draws as the run sampled; its code is reports/mlflow_serving.py, logged with it

Aliases of a registered model: `candidate` is the newest version that was evaluated; `champion` moves by command alone.
What is there already is found by tags, and a model half sent is sent again under its own id.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow.diffusers
import mlflow.pyfunc
from huggingface_hub import try_to_load_from_cache
from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelOutput, LoggedModelStatus, Metric
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

from diffusion.lora import DIFFUSERS_FILE
from learner.config import Config, resolve
from records import checkpoint
from records.run_folder import Records
from records.storage import StorageError
from reports import mlflow_serving
from reports.evaluation_views import judged
from reports.model_card import DDIM, DPM_SOLVER

CANDIDATE, CHAMPION = "candidate", "champion"
RUN, STEP, EVALUATED = "tributary.run_id", "tributary.step", "tributary.evaluated"  # tags
LORA = f"lora/{DIFFUSERS_FILE}"
MODEL_FILE, CODE_KEY = "MLmodel", "model_code_path"
VERSIONS_TAG = "mlflow.modelVersions"  # of a logged model: MLflow's page shows its versions by it


class NoModel(ValueError):
    """What was asked cannot be had of this run; the message says why."""


@dataclass(frozen=True)
class Registry:
    """The models of one run."""

    client: MlflowClient
    experiment_id: str
    run_id: str  # MLflow's
    records: Records

    def log(self, manifest: dict[str, Any]) -> LoggedModel:
        """The model of a checkpoint; nothing is sent of one that is there.

        Raises:
            NoModel: its adapter, or its way of sampling, is none that a diffusers pipeline has.
            StorageError: the adapter cannot be read, or is not as written.
        """
        config, step = self.records.config(), manifest["step"]
        settings = serving_settings(config)
        if LORA not in manifest["files"]:
            raise NoModel("no model in MLflow: diffusers loads no LoRA for a model without text")
        model = next((one for one in self._models() if one.tags[STEP] == str(step)), None)
        if model is None:
            facts = {"base_model": config.model.path, "rank": config.lora.rank, "alpha": config.lora.alpha}
            facts |= {key: settings[key] for key in ("steps", "guidance", "eta")} | {"reward": config.reward.name}
            model = self.client.create_logged_model(
                self.experiment_id, f"lora-step-{step:06d}", self.run_id, self._tags(manifest),
                {key: str(value) for key, value in facts.items()}, "lora",
            )  # fmt: skip
        if model.status != LoggedModelStatus.READY:
            content = self.records.storage.read(f"{checkpoint.FOLDER}/step-{step:06d}/{LORA}")
            if hashlib.sha256(content).hexdigest() != manifest["files"][LORA]:
                raise StorageError(f"{self.records.storage}: the adapter of step {step} is not what was written")
            with tempfile.TemporaryDirectory() as folder:
                _save(Path(folder) / "model", content, settings, model, self.run_id)
                self.client.log_model_artifacts(model.model_id, str(Path(folder) / "model"))
            model = self.client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
        outputs = self.client.get_run(self.run_id).outputs
        if model.model_id not in {one.model_id for one in (outputs.model_outputs if outputs else ())}:
            self.client.log_outputs(self.run_id, [LoggedModelOutput(model.model_id, manifest["next_epoch"])])
        self._send_figures(manifest, model)
        return model

    def register(self, name: str, manifest: dict[str, Any], model: LoggedModel) -> ModelVersion:
        """The model's version, made if there is none, and the alias `candidate` where it belongs."""
        with contextlib.suppress(MlflowException):  # it is there; if it is not, what follows says so
            self.client.create_registered_model(name)
        versions = self._versions(name)
        mine = next((one for one in versions if one.tags.get(STEP) == str(manifest["step"]) and self._own(one)), None)
        if mine is None:
            # A store that is read in this process looks models:/ up on the server of the environment, not on its own.
            apart = self.client.tracking_uri.startswith(("http://", "https://"))
            source = f"models:/{model.model_id}" if apart else model.artifact_location
            mine = self.client.create_model_version(
                name, source, self.run_id, self._tags(manifest), model_id=model.model_id,
                description=f"LoRA of {self.records.about['name']} after {manifest['next_epoch']} epochs",
            )  # fmt: skip
            versions.append(mine)
        said = json.dumps([{"name": name, "version": mine.version}])
        if model.tags.get(VERSIONS_TAG) != said:
            self.client.set_logged_model_tags(model.model_id, {VERSIONS_TAG: said})
        if evaluated := [int(one.version) for one in versions if one.tags.get(EVALUATED)]:
            self._point(name, CANDIDATE, str(max(evaluated)))
        return mine

    def promote(self, name: str) -> ModelVersion:
        """Point `champion` at this run's newest evaluated version, or newest one where none is.

        Raises:
            NoModel: the run has no version of that name.
        """
        mine = [one for one in self._versions(name) if self._own(one)]
        if not mine:
            raise NoModel(f"no version of {name} is of this run")
        best = max(mine, key=lambda one: (bool(one.tags.get(EVALUATED)), int(one.version)))
        self._point(name, CHAMPION, best.version)
        return best

    def _own(self, version: ModelVersion) -> bool:
        return version.tags.get(RUN) == self.records.run_id

    def _models(self) -> list[LoggedModel]:
        found = self.client.search_logged_models([self.experiment_id], f"source_run_id = '{self.run_id}'")
        return [model for model in found if STEP in model.tags]

    def _versions(self, name: str) -> list[ModelVersion]:
        found: list[ModelVersion] = []
        token = None
        while True:
            page = self.client.search_model_versions(f"name = '{name}'", page_token=token)
            found += page
            token = page.token
            if not token:
                return found

    def _point(self, name: str, alias: str, version: str) -> None:
        with contextlib.suppress(MlflowException):  # no such alias yet
            if self.client.get_model_version_by_alias(name, alias).version == version:
                return
        self.client.set_registered_model_alias(name, alias, version)

    def _tags(self, manifest: dict[str, Any]) -> dict[str, str]:
        tags = {RUN: self.records.run_id, STEP: str(manifest["step"]), "tributary.epochs": str(manifest["next_epoch"])}
        tags |= {"tributary.adapter_sha256": manifest["adapter_sha256"]}
        return tags | ({EVALUATED: "true"} if manifest["next_epoch"] - 1 in self.records.evaluated() else {})

    def _send_figures(self, manifest: dict[str, Any], model: LoggedModel) -> None:
        """What is known of the model's very weights, so that MLflow's page of models can compare it."""
        epochs = manifest["next_epoch"]
        line = next((line for line in self.records.lines if line["epoch"] + 1 == epochs), None)
        if line is None:
            return
        known = {key: value for key, value in line.items() if key.startswith("eval_") and isinstance(value, float)}
        for one in judged(self.records.storage):
            known |= one.metrics() if one.epochs == epochs else {}
        time = int(line["time"] * 1000)
        there = {metric.key for metric in model.metrics or ()}
        metrics = [
            Metric(key, value, time, epochs, model_id=model.model_id, run_id=self.run_id)
            for key, value in known.items()
            if key not in there
        ]
        if metrics:
            self.client.log_batch(self.run_id, metrics=metrics)


def serving_settings(config: Config) -> dict[str, Any]:
    """What reports/mlflow_serving.py needs to draw as the run sampled.

    Raises:
        NoModel: no diffusers scheduler steps as the run did.
    """
    sampler, solver = config.sampler, config.sampler.grid == "dpm_solver"
    if solver and sampler.eta != 1:
        raise NoModel(f"no model in MLflow: no scheduler has sampler.grid=dpm_solver with eta {sampler.eta:g}")
    path = resolve(config.model.path)
    cached = None if path.is_dir() else try_to_load_from_cache(config.model.path, "model_index.json")
    return {
        "base_model": str(path.absolute()) if path.is_dir() else config.model.path,
        "revision": Path(cached).parent.name if isinstance(cached, str) else None,  # the hub's commit that is here
        "dtype": config.model.dtype,
        "device": None,
        "scheduler": "DPMSolverMultistepScheduler" if solver else "DDIMScheduler",
        "scheduler_settings": DPM_SOLVER if solver else DDIM,
        "steps": sampler.steps,
        "guidance": sampler.guidance,
        "eta": sampler.eta,
    }


def signature(settings: dict[str, Any]) -> ModelSignature:
    """Of a request and its answer (reports/mlflow_serving.py)."""
    return ModelSignature(
        inputs=Schema([ColSpec(DataType.string, "prompt"), ColSpec(DataType.long, "seed", required=False)]),
        outputs=Schema([ColSpec(DataType.string, "image"), ColSpec(DataType.long, "seed")]),
        params=ParamSchema([
            ParamSpec("steps", DataType.long, settings["steps"]),
            ParamSpec("guidance", DataType.double, settings["guidance"]),
            ParamSpec("eta", DataType.double, settings["eta"]),
            ParamSpec("seed", DataType.long, 0),
        ]),
    )  # fmt: skip


def _save(place: Path, adapter: bytes, settings: dict[str, Any], logged: LoggedModel, run_id: str) -> None:
    """The folder of a model of both flavours."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that no example of a request is given: the signature is
        source, aside = Path(folder) / DIFFUSERS_FILE, Path(folder) / "aside"
        source.write_bytes(adapter)
        # Of the diffusers flavour we take the weights as it lays them out, and what it says of them. A name that is no
        # path would have it ask the hub for the newest commit, which need not be the one trained on: hence ./
        base = settings["base_model"]
        mlflow.diffusers.save_model(str(source), str(aside), base if Path(base).is_absolute() else f"./{base}")
        flavour = Model.load(str(aside / MODEL_FILE)).flavors[mlflow.diffusers.FLAVOR_NAME]
        model = Model(
            artifact_path=logged.artifact_location, model_uuid=logged.model_id, model_id=logged.model_id, run_id=run_id
        )
        mlflow.pyfunc.save_model(
            place,
            python_model=mlflow_serving.__file__,
            artifacts={mlflow_serving.ADAPTER: str(aside / flavour["adapter_weights"])},
            model_config=settings,
            signature=signature(settings),
            mlflow_model=model,
            pip_requirements=mlflow.diffusers.get_default_pip_requirements(),
        )
    own = model.flavors[mlflow.pyfunc.FLAVOR_NAME]
    weights = own["artifacts"][mlflow_serving.ADAPTER]
    weights["uri"], own[CODE_KEY] = weights["path"], Path(mlflow_serving.__file__).name  # not this machine's paths
    revision = {"base_model_revision": settings["revision"]} if settings["revision"] else {}
    model.add_flavor(
        mlflow.diffusers.FLAVOR_NAME, **{**flavour, "base_model": base, "adapter_weights": weights["path"], **revision}
    )
    model.save(str(place / MODEL_FILE))
