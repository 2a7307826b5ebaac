"""One run in MLflow: what the server lacks of the run's durable records is found by asking it, and sent.

    metrics                         by epoch (0: before training); update/... by policy update; judged/... by epoch
    images                          evaluation/samples and judged/base_and_tuned, by epoch
    evaluation.json                 table: prompt, reward, ... of the fixed images, a row for each image and epoch
    config.yaml, report.html
    logged model lora-step-NNNNNN   the newest LoRA, flavour mlflow.diffusers

judged/... is what `python -m learner.evaluate` found. The run's files may be somebody else's: they are read as data, by
names within its folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlflow.diffusers
import yaml
from mlflow.entities import LoggedModelOutput, LoggedModelStatus, Metric, Param, RunTag
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from PIL import Image

from learner.config import Config, resolve, saved_config
from records import checkpoint
from records.checkpoint import CheckpointError
from records.heartbeat import without_passwords
from records.run_folder import BEFORE, CONFIG, EVALUATION, Records
from records.storage import Storage, StorageError
from reports import html

SENTINEL = "epochs_done"  # the last metric of an epoch's batch: where it is, the others are
KIND = {"mlflow.experimentKind": "custom_model_development"}  # MLflow's page opens as "Model training", not as "GenAI"
PARENT, GROUP, GROUP_PARENT = "mlflow.parentRunId", "tributary.group", "tributary.group_parent"
TABLE = "evaluation.json"
SHOWN = {  # what log_image and log_table tag last, and may be killed before
    "mlflow.loggedImages": "True",
    "mlflow.loggedArtifacts": json.dumps([{"path": TABLE, "type": "table"}]),
}
DIFFUSERS, KOHYA = "lora/pytorch_lora_weights.safetensors", "lora/kohya.safetensors"  # of a checkpoint


class Mirror:
    def __init__(self, storage: Storage, uri: str, experiment: str) -> None:
        self.storage, self.uri, self.experiment = storage, uri, experiment
        self._local = Path(uri.removeprefix("sqlite:///")).parent if uri.startswith("sqlite:///") else None
        if self._local:
            self._local.mkdir(parents=True, exist_ok=True)
        self.client = mlflow.MlflowClient(uri)
        self.run_id = self.experiment_id = ""  # MLflow's; empty before connect
        self._logged: set[int] = set()  # steps whose metrics are there
        self._pictures: set[str] = set()  # how the names of those begin that are there

    def connect(self) -> str:
        """The MLflow run of this run, found by its tag or made; its parameters, tags and parent; and what is there of
        it. To be called again after a failure, when what was sent last may be there or not. Returns its id."""
        records = Records.open(self.storage)
        about, config = records.about, saved_config(records)
        if experiment := self.client.get_experiment_by_name(self.experiment):
            self.experiment_id = experiment.experiment_id
        else:  # without a place of its own, a local store would put artifacts into the current directory
            artifacts = (self._local / "mlartifacts").as_uri() if self._local else None
            self.experiment_id = self.client.create_experiment(self.experiment, artifacts, KIND)
        runs = self.client.search_runs([self.experiment_id], f"tags.`tributary.run_id` = '{about['run_id']}'")
        if runs:
            self.run_id = runs[0].info.run_id
            self.client.update_run(self.run_id, status="RUNNING")
        else:
            tags = {"tributary.run_id": about["run_id"], "mlflow.source.name": "learner.run"}
            created = int(about["created"] * 1000)
            self.run_id = self.client.create_run(self.experiment_id, created, tags, about["name"]).info.run_id
        environment = {key: str(value) for key, value in about.get("environment", {}).items() if value}
        tags = {f"tributary.{key}": value for key, value in environment.items()}
        tags |= {"tributary.config_sha256": about["config_digest"], "tributary.run_directory": str(self.storage)}
        tags |= {"mlflow.source.git.commit": environment["git_commit"]} if "git_commit" in environment else {}
        self._set_tags(tags | (SHOWN if records.evaluated() else {}))
        params = [Param(key, without_passwords(str(value))) for key, value in config.binding().items()]
        self.client.log_batch(self.run_id, params=params)
        self._join_group(config)
        self._logged = self._steps(SENTINEL)
        images = (file.path.split("/")[-1] for file in self.client.list_artifacts(self.run_id, "images"))
        self._pictures = {name.split("+timestamp")[0] for name in images if name.endswith(".webp")}  # written last
        return self.run_id

    def sync(self) -> None:
        """Send what the server lacks of the closed epochs: metrics and pictures."""
        records = Records.open(self.storage)
        newest = self._newest(records)
        done = newest["next_epoch"] if newest else BEFORE
        for line in records.lines:
            if line["epoch"] < done and line["epoch"] + 1 not in self._logged:
                self._send_line(line)
                self._logged.add(line["epoch"] + 1)
        for epoch in records.evaluated():
            if epoch < done:
                self._send_picture("evaluation/samples", records.sheet(epoch), epoch + 1, _time(records, epoch + 1))

    def finish(self, status: str) -> None:
        """Send all of the run but its model, and close the MLflow run with FINISHED, FAILED or KILLED.

        Raises:
            StorageError: the run is finished, but not all of its epochs could be read.
        """
        self.sync()
        records = Records.open(self.storage)
        config = saved_config(records)
        if status == "FINISHED" and any(line["epoch"] + 1 not in self._logged for line in records.lines):
            raise StorageError(f"not every epoch of {self.storage} could be read")
        if epochs := [epoch for epoch in records.evaluated() if epoch + 1 in self._logged]:
            self.client.log_dict(self.run_id, {"columns": [], "data": []}, TABLE)  # log_table adds to what is there
            self.client.log_table(self.run_id, self._table(epochs), TABLE)
        self._send_judgements(records)
        settings = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=10**6)
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / CONFIG).write_text(without_passwords(settings), encoding="utf-8")
            if self.storage.exists(html.FILE) and settings == without_passwords(settings):  # the report has them, too
                (Path(folder) / html.FILE).write_bytes(self.storage.read(html.FILE))
            self.client.log_artifacts(self.run_id, folder)
        self._join_group(config)  # again: an older parent may have turned up
        ended = int(records.lines[-1]["time"] * 1000) if records.lines else None
        self.client.set_terminated(self.run_id, status, ended)

    def send_model(self, registered_model: str | None) -> str | None:
        """The newest checkpoint's LoRA as a logged model and, given a name, as a version of that registered model.
        Returns why there is none, if so.

        Raises:
            StorageError: the LoRA cannot be read, or is not as written.
        """
        records = Records.open(self.storage)
        manifest = self._newest(records)
        if manifest is None or DIFFUSERS not in manifest["files"]:
            return "no checkpoint is whole" if manifest is None else "diffusers loads no LoRA for a model without text"
        name = f"lora-step-{manifest['step']:06d}"
        logged = self.client.search_logged_models([self.experiment_id], f"source_run_id = '{self.run_id}'")
        model = next((model for model in logged if model.name == name), None) or self.client.create_logged_model(
            self.experiment_id, name, self.run_id, {"tributary.run_id": records.run_id}, model_type="lora"
        )
        previous = os.environ.get("MLFLOW_TRACKING_URI")
        mlflow.set_tracking_uri(self.uri)  # log_model and register_model take no client
        try:
            if model.status != LoggedModelStatus.READY:  # not all of it is there
                self._log_model(records, manifest, model.model_id)
            source = f"models:/{model.model_id}"
            versions = self.client.search_model_versions(f"run_id = '{self.run_id}'")
            if registered_model and (registered_model, source) not in {(each.name, each.source) for each in versions}:
                mlflow.register_model(source, registered_model)
        finally:
            mlflow.set_tracking_uri(previous)  # type: ignore[arg-type]  # None: none
        return None

    def _log_model(self, records: Records, manifest: dict[str, Any], model_id: str) -> None:
        config, step, epochs = saved_config(records), manifest["step"], manifest["next_epoch"]
        evaluated = next((line for line in records.lines if line["epoch"] + 1 == epochs), {})
        metrics = [
            Metric(key, value, _time(records, epochs), epochs, model_id=model_id, run_id=self.run_id)
            for key, value in evaluated.items()
            if key.startswith("eval_") and isinstance(value, float)
        ]
        self.client.log_batch(self.run_id, metrics)
        outputs = self.client.get_run(self.run_id).outputs
        if model_id not in {output.model_id for output in (outputs.model_outputs if outputs else ())}:
            self.client.log_outputs(self.run_id, [LoggedModelOutput(model_id, epochs)])
        params = ParamSchema([  # the flavour's own asks for 512 x 512 pixels of every model
            ParamSpec("num_inference_steps", DataType.integer, config.sampler.steps),
            ParamSpec("guidance_scale", DataType.double, float(config.sampler.guidance)),
        ])  # fmt: skip
        prompt, image = Schema([ColSpec(DataType.string, "prompt")]), Schema([ColSpec(DataType.binary, "image")])
        base_model = resolve(config.model.path)
        with tempfile.TemporaryDirectory() as folder:
            for file in {DIFFUSERS, KOHYA} & set(manifest["files"]):
                content = self.storage.read(f"{checkpoint.FOLDER}/step-{step:06d}/{file}")
                if hashlib.sha256(content).hexdigest() != manifest["files"][file]:
                    raise StorageError(f"{self.storage}: {file} of step {step} is not what was written")
                (Path(folder) / Path(file).name).write_bytes(content)
            mlflow.diffusers.log_model(
                folder,
                str(base_model.absolute()) if base_model.is_dir() else config.model.path,
                signature=ModelSignature(prompt, image, params),
                model_id=model_id,
            )

    def _newest(self, records: Records) -> dict[str, Any] | None:
        """Manifest of the newest whole checkpoint; a torn one, or one just being pruned, has none."""
        for step in reversed(checkpoint.steps(self.storage)):
            with contextlib.suppress(CheckpointError):
                return checkpoint.manifest(self.storage, step, records.run_id)
        return None

    def _steps(self, metric: str) -> set[int]:
        return {entry.step for entry in self.client.get_metric_history(self.run_id, metric)}

    def _set_tags(self, tags: Mapping[str, str]) -> None:
        self.client.log_batch(self.run_id, tags=[RunTag(key, without_passwords(value)) for key, value in tags.items()])

    def _join_group(self, config: Config) -> None:
        """Make the run a child of its group's parent: the oldest run tagged as such.

        MLflow has no lock, so two runs may each make a parent: whoever makes one looks again, takes the oldest, and
        removes its own if that is not it. Clocks differ, so whoever looked too early looks again at its end.
        """
        group = config.mlflow.group
        if group is None:
            return
        parents = self._parents(group)
        if not parents:
            tags = {GROUP_PARENT: group, "mlflow.source.name": "learner.run"}
            own = self.client.create_run(self.experiment_id, tags=tags, run_name=group).info.run_id
            self.client.set_terminated(own)  # there is nothing that it does itself
            parents = self._parents(group)
            if parents[0] != own:
                self.client.delete_run(own)
        self._set_tags({PARENT: parents[0], GROUP: group})

    def _parents(self, group: str) -> list[str]:
        """Oldest first."""
        runs = self.client.search_runs([self.experiment_id], f"tags.`{GROUP_PARENT}` = '{group}'")
        return [run.info.run_id for run in sorted(runs, key=lambda run: (run.info.start_time, run.info.run_id))]

    def _send_line(self, line: dict[str, Any]) -> None:
        """An epoch's metrics, with the record's own times, so that sending the same again changes nothing."""
        time, step = int(line["time"] * 1000), line["epoch"] + 1
        metrics = [
            Metric(f"update/{key}", value, time, number)
            for number, update in enumerate(line["updates"], line["step"] - len(line["updates"]) + 1)
            for key, value in update.items()
            if value is not None
        ]
        metrics += [
            Metric(key, float(value), time, step)
            for key, value in line.items()
            if isinstance(value, int | float) and key not in ("epoch", "time", "step", "policy_version")
        ]
        self.client.log_batch(self.run_id, [*metrics, Metric(SENTINEL, step, time, step)])

    def _send_picture(self, key: str, png: bytes, step: int, time: int) -> None:
        begin = f"{key.replace('/', '~')}+step+{step}"  # of log_image's file name
        if begin not in self._pictures:
            picture = Image.open(io.BytesIO(png), formats=["PNG"])
            self.client.log_image(self.run_id, picture, key=key, step=step, timestamp=time, synchronous=True)
            self._pictures.add(begin)

    def _table(self, epochs: Sequence[int]) -> dict[str, list[Any]]:
        """The fixed images after each epoch; in the column of a part or held-out reward, its own raw reward."""
        table: dict[str, list[Any]] = defaultdict(list)
        for epoch in epochs:
            name = "epoch-before" if epoch == BEFORE else f"epoch-{epoch:06d}"
            scores = json.loads(self.storage.read(f"{EVALUATION}/{name}.json"))
            table["prompt"] += scores["prompt"]
            table["reward"] += scores["reward"]  # second: what MLflow's page compares runs by, prompt by prompt
            for label, values in scores.get("reward_parts", {}).items():
                table[label] += values
            for label, values in scores.get("held_out", {}).items():
                table[f"held out: {label}"] += values
            table["image"] += range(len(scores["prompt"]))
            table["epoch"] += [epoch + 1] * len(scores["prompt"])
        return table

    def _send_judgements(self, records: Records) -> None:
        """Figures and pictures that commands/evaluate.py left. MLflow takes no metric back: those of an epoch's first
        judgement stay."""
        judged = self._steps(f"judged/{SENTINEL}")
        entries = self.storage.entries(EVALUATION)
        for name in (entry.removesuffix(".json") for entry in entries if re.fullmatch(r"step-\d+\.json", entry)):
            try:
                figures = json.loads(self.storage.read(f"{EVALUATION}/{name}.json"))
                step, values = int(figures["epochs_done"]), judged_metrics(figures)
            except (ValueError, KeyError, TypeError, AttributeError):  # not of a run's epoch, or not ours
                continue
            time = _time(records, step)
            if f"{name}.png" in entries:
                picture = self.storage.read(f"{EVALUATION}/{name}.png")
                self._send_picture("judged/base_and_tuned", picture, step, time)
            if step not in judged:
                values[f"judged/{SENTINEL}"] = step
                self.client.log_batch(self.run_id, [Metric(key, value, time, step) for key, value in values.items()])


def judged_metrics(figures: dict[str, Any]) -> dict[str, float]:
    """judged/NAME the value, judged/NAME_base and judged/NAME_floor beside it; MLflow takes few characters in names."""
    held_out = {f"held_out/{label}": figure for label, figure in (figures.get("held_out") or {}).items()}
    return {
        re.sub(r"[^\w\-. :/]", "_", f"judged/{name}{suffix}"): float(figure[key])
        for name, figure in {**figures, **held_out}.items()
        if isinstance(figure, dict) and "value" in figure
        for key, suffix in (("value", ""), ("base", "_base"), ("floor", "_floor"))
        if figure.get(key) is not None
    }


def _time(records: Records, step: int) -> int:
    """Milliseconds when the epoch was done; the run's begin, if that is not known."""
    seconds = (line["time"] for line in records.lines if line["epoch"] + 1 == step)
    return int(next(seconds, records.about["created"]) * 1000)
