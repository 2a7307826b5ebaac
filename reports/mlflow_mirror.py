"""One run, as an MLflow server sees it: what it lacks of the run's durable records is found by asking, and sent.

MLflow's steps count epochs (0: before training); those of update/... count policy updates. A slash in the name of a
metric or picture puts its chart into a section of MLflow's page.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import Metric, Param, RunTag

from learner.config import saved_config
from records import checkpoint
from records.checkpoint import CheckpointError
from records.run_folder import BEFORE, CONFIG, Records
from records.storage import Storage, StorageError
from reports import html
from reports.evaluation_views import EvaluationViews, send_files

SENTINEL = "epochs_done"  # the last metric of an epoch's batch: where it is, the others are
BATCH, PARAMS = 900, 100  # metrics and parameters a request; the server takes 1000 and 100
KIND = ("mlflow.experimentKind", "custom_model_development")  # MLflow's page opens as "Model training", not as "GenAI"
PARENT, GROUP, GROUP_PARENT = "mlflow.parentRunId", "tributary.group", "tributary.group_parent"


class Mirror:
    def __init__(self, storage: Storage, uri: str, experiment: str) -> None:
        self.storage, self.uri, self.experiment = storage, uri, experiment
        if uri.startswith("sqlite:///"):
            Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        self.client = mlflow.MlflowClient(uri)
        self.run_id = self.experiment_id = ""  # MLflow's; empty before connect
        self._logged: set[int] = set()  # steps whose metrics are there

    def connect(self) -> str:
        """The MLflow run of this run, found by its tag or made; its parameters, tags and parent. Returns its id."""
        records = Records.open(self.storage)
        about = records.about
        found = self.client.get_experiment_by_name(self.experiment)
        self.experiment_id = found.experiment_id if found else self._create_experiment()
        if found and KIND[0] not in found.tags:
            self.client.set_experiment_tag(self.experiment_id, *KIND)
        own = f"tags.`tributary.run_id` = '{about['run_id']}'"
        runs = self.client.search_runs([self.experiment_id], own, max_results=1)
        if runs:
            self.run_id = runs[0].info.run_id
            self.client.update_run(self.run_id, status="RUNNING")
        else:
            tags = {"tributary.run_id": about["run_id"], "mlflow.source.name": "learner.run"}
            self.run_id = self.client.create_run(
                self.experiment_id, _milliseconds(about["created"]), tags, about["name"]
            ).info.run_id
        environment = about.get("environment", {})
        tags = {
            "tributary.config_sha256": about["config_digest"],
            "tributary.run_directory": str(self.storage),
            **{f"tributary.{key}": str(value) for key, value in environment.items() if value},
            **({"mlflow.source.git.commit": environment["git_commit"]} if environment.get("git_commit") else {}),
        }
        self._set_tags(tags)
        params = [Param(key, str(value)) for key, value in saved_config(records).binding().items()]
        for start in range(0, len(params), PARAMS):
            self.client.log_batch(self.run_id, params=params[start : start + PARAMS])
        self._join_group(records)
        history = self.client.get_metric_history(self.run_id, SENTINEL)
        self._logged = {metric.step for metric in history}
        self._views = EvaluationViews(self.client, self.run_id)
        return self.run_id

    def sync(self) -> list[int]:
        """Send what the server lacks of the closed epochs: metrics, evaluations, adapters. Returns those evaluated."""
        records = Records.open(self.storage)
        manifests = self.manifests(records.run_id)
        done = manifests[-1]["next_epoch"] if manifests else BEFORE
        for line in records.lines:
            if line["epoch"] < done and line["epoch"] + 1 not in self._logged:
                self._send_line(line)
                self._logged.add(line["epoch"] + 1)
        evaluated = [epoch for epoch in records.evaluated() if epoch < done]
        self._views.send(records, evaluated)
        for manifest in manifests:  # of those that stay: of evaluated epochs, or the newest when nothing is evaluated
            if manifest["next_epoch"] - 1 in evaluated or (not evaluated and manifest is manifests[-1]):
                self._send_adapter(manifest)
        return evaluated

    def finish(self, status: str) -> None:
        """Sync, send report and config, and close the MLflow run with FINISHED, FAILED or KILLED.

        Raises:
            StorageError: the run is finished, but not all of its epochs could be read.
        """
        evaluated = self.sync()
        records = Records.open(self.storage)
        if status == "FINISHED" and any(line["epoch"] + 1 not in self._logged for line in records.lines):
            raise StorageError(f"not every epoch of {self.storage} could be read")
        files = {name: self.storage.read(name) for name in (CONFIG, html.FILE) if self.storage.exists(name)}
        send_files(self.client, self.run_id, "", files)
        self._views.describe(records, evaluated)
        self._join_group(records)  # again: an older parent may have turned up
        ended = _milliseconds(records.lines[-1]["time"]) if records.lines else None
        self.client.set_terminated(self.run_id, status, ended)

    def manifests(self, run_id: str) -> list[dict[str, Any]]:
        """Of the whole checkpoints, oldest first; a torn one, or one just being pruned, has none."""
        found = []
        for step in checkpoint.steps(self.storage):
            with contextlib.suppress(CheckpointError):
                found.append(checkpoint.manifest(self.storage, step, run_id))
        return found

    def _create_experiment(self) -> str:
        # Without a place of its own, a local store would put artifacts into the current directory.
        local = self.uri.startswith("sqlite:///")
        folder = Path(self.uri.removeprefix("sqlite:///")).parent / "mlartifacts"
        return self.client.create_experiment(self.experiment, folder.as_uri() if local else None, dict([KIND]))

    def _set_tags(self, tags: Mapping[str, str]) -> None:
        self.client.log_batch(self.run_id, tags=[RunTag(key, value) for key, value in tags.items()])

    def _join_group(self, records: Records) -> None:
        """Make the run a child of its group's parent: the oldest run tagged as such.

        MLflow has no lock, so two runs may each make a parent: whoever makes one looks again, takes the oldest, and
        removes its own if that is not it. Clocks differ, so whoever looked too early looks again at its end.
        """
        group = saved_config(records).mlflow.group
        if group is None:
            return
        parents = self._parents(group)
        if not parents:
            tags = {GROUP_PARENT: group, "mlflow.source.name": "learner.run"}
            mine = self.client.create_run(self.experiment_id, tags=tags, run_name=group).info.run_id
            self.client.set_terminated(mine)  # there is nothing that it does itself
            parents = self._parents(group)
            if parents[0] != mine:
                self.client.delete_run(mine)
        self._set_tags({PARENT: parents[0], GROUP: group})

    def _parents(self, group: str) -> list[str]:
        """Oldest first."""
        found = self.client.search_runs([self.experiment_id], f"tags.`{GROUP_PARENT}` = '{group}'")
        return [run.info.run_id for run in sorted(found, key=lambda run: (run.info.start_time, run.info.run_id))]

    def _send_line(self, line: dict[str, Any]) -> None:
        """An epoch in one request (if it fits), the sentinel last; the record's own times, so that sending the same
        again changes nothing."""
        time, step = _milliseconds(line["time"]), line["epoch"] + 1
        skipped = ("epoch", "time", "step", "policy_version")
        metrics = []
        updates = line["updates"]
        for i, update in enumerate(updates):
            number = line["step"] - len(updates) + i + 1
            metrics += [
                Metric(f"update/{key}", value, time, number) for key, value in update.items() if value is not None
            ]
        numbers = ((key, value) for key, value in line.items() if isinstance(value, int | float) and key not in skipped)
        metrics += [Metric(key, float(value), time, step) for key, value in numbers]
        metrics.append(Metric(SENTINEL, step, time, step))
        for start in range(0, len(metrics), BATCH):
            self.client.log_batch(self.run_id, metrics=metrics[start : start + BATCH])

    def _send_adapter(self, manifest: dict[str, Any]) -> None:
        """The LoRA of a checkpoint."""
        name = f"{checkpoint.FOLDER}/step-{manifest['step']:06d}"
        files = [file for file in manifest["files"] if file.startswith("lora/")]
        there = {file.path for file in self.client.list_artifacts(self.run_id, f"{name}/lora")}
        missing = {Path(file).name: f"{name}/{file}" for file in files if f"{name}/{file}" not in there}
        contents = {file: self.storage.read(place) for file, place in missing.items()}
        send_files(self.client, self.run_id, f"{name}/lora", contents)


def _milliseconds(seconds: float) -> int:
    return int(seconds * 1000)
