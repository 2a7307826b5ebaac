"""One run in MLflow: what the server lacks of its durable records is found by asking it, and sent (docs/mlflow.md says
what is where). The records may be somebody else's: they are read as data, by names within their folder."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import mlflow.diffusers
import pandas as pd  # type: ignore[import-untyped]
from mlflow.entities import LifecycleStage, LoggedModelStatus, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from PIL import Image

from learner.config import given_config, resolve, saved_config
from records import checkpoint
from records.facts import Warn
from records.passwords import without_passwords
from records.run_folder import BEFORE, CONFIG, Records
from records.storage import Storage, StorageError
from reports import html, mlflow_database, summary, targets
from reports.mlflow_database import MlflowError

WEB = ("http", "https")
SENTINEL = "epochs_done"  # the last metric of an epoch's batch: where it is, the others are
KIND = {"mlflow.experimentKind": "custom_model_development"}  # MLflow's page opens as "Model training", not as "GenAI"
PARENT, GROUP = "mlflow.parentRunId", "tributary.group"
TABLE = "evaluation.json"
SHOWN = {  # what MLflow's page goes by; log_image tags it last, and may be killed before
    "mlflow.loggedImages": "True",
    "mlflow.loggedArtifacts": json.dumps([{"path": TABLE, "type": "table"}]),
}
DIFFUSERS, KOHYA = "lora/pytorch_lora_weights.safetensors", "lora/kohya.safetensors"  # of a checkpoint


class StrangePlace(ValueError):
    """Artifacts are to go where their server has no business; the message says where, and the remedy."""


def require_own_place(server: str, place: str) -> None:
    """Raises StrangePlace if `place`, where the server at the URI `server` says that artifacts go, is outside of a
    SQLite file's folder, a file on this machine and the server on another, or a host that would get the server's
    password: a database may have come with the run, and anyone may name places in a server without a password."""
    uri, to = urlsplit(server), urlsplit(place)
    in_files = to.scheme in ("", "file")
    if uri.scheme == "sqlite":
        folder = Path(server.removeprefix("sqlite:///")).absolute().parent.resolve()
        own = in_files and Path(unquote(to.path)).resolve().is_relative_to(folder)
    elif in_files:
        own = uri.scheme not in WEB or uri.hostname in ("localhost", "127.0.0.1", "::1")
    else:
        same_host = not to.netloc or (to.hostname, to.port) == (uri.hostname, uri.port)
        own = same_host or to.scheme not in (*WEB, "mlflow-artifacts")
    if not own:
        raise StrangePlace(f"name another --experiment: its artifacts would go to {place}, which is not its own")


class Mirror:
    def __init__(self, storage: Storage, uri: str, experiment: str, warn: Warn = lambda text: None) -> None:
        """`warn` hears of damaged files, which are recovered or left out."""
        self.storage, self.uri, self.experiment, self._warn = storage, uri, experiment, warn
        self._local = Path(uri.removeprefix("sqlite:///")).parent if uri.startswith("sqlite:///") else None
        if self._local:
            self._local.mkdir(parents=True, exist_ok=True)
        with mlflow_database.opened(uri):
            self.client = mlflow.MlflowClient(uri)
        self.run_id = self.experiment_id = ""  # MLflow's; empty before connect
        self._logged: set[int] = set()  # steps whose metrics are there
        self._pictures: set[str] = set()  # how the names of those begin that are there

    def connect(self) -> str:
        """The MLflow run of this run, found by its tag or made; its parameters, tags and parent; and what is there of
        it. To be called again after a failure, when what was sent last may be there or not. Returns its id."""
        records = Records.open(self.storage, self._warn)
        about, config = records.about, given_config(records)  # parameters never change
        try:
            with mlflow_database.opened(self.uri):
                self._find_or_make(about)
        except MlflowException as error:
            if error.error_code != "ENDPOINT_NOT_FOUND":
                raise
            other = "name another by mlflow.uri, of learner.upload by --uri"
            raise MlflowError(
                f"it is no MLflow of version 3 or newer (404 for a request): update it, or {other}"
            ) from error
        environment = {key: str(value) for key, value in about.get("environment", {}).items() if value}
        environment |= {"config_sha256": about["config_digest"], "run_directory": str(self.storage)}
        tags = {f"tributary.{key}": value for key, value in environment.items()}
        tags |= {"mlflow.source.git.commit": environment["git_commit"]} if "git_commit" in environment else {}
        self._set_tags(tags | (SHOWN if records.evaluated() else {}))
        params = [Param(key, without_passwords(str(value))) for key, value in config.binding().items()]
        self.client.log_batch(self.run_id, params=params)
        self._join_group(config.mlflow.group)
        self._logged = {entry.step for entry in self.client.get_metric_history(self.run_id, SENTINEL)}
        images = (file.path.split("/")[-1] for file in self.client.list_artifacts(self.run_id, "images"))
        self._pictures = {name.split("+timestamp")[0] for name in images if name.endswith(".webp")}  # written last
        return self.run_id

    def _find_or_make(self, about: Mapping[str, Any]) -> None:
        """The experiment and the run. Raises an MlflowError if the experiment is deleted."""
        self.client.search_logged_models(["0"], max_results=1)  # MLflow's clients need it later, and 2 does not have it
        experiment = self.client.get_experiment_by_name(self.experiment)
        if (
            experiment is None
        ):  # without a place of its own, a local store would put artifacts into the current directory
            artifacts = (self._local / "mlartifacts").as_uri() if self._local else None
            try:
                self.client.create_experiment(self.experiment, artifacts, KIND)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another run was first
                    raise
            experiment = self.client.get_experiment_by_name(self.experiment)
            assert experiment is not None
        self.experiment_id = experiment.experiment_id
        if experiment.lifecycle_stage == LifecycleStage.DELETED:
            raise MlflowError(
                f"its experiment {self.experiment} is deleted: give `mlflow experiments restore --experiment-id "
                f"{self.experiment_id}` with that server as MLFLOW_TRACKING_URI, or another name by mlflow.experiment, "
                "of learner.upload by --experiment"
            )
        runs = self.client.search_runs([self.experiment_id], f"tags.`tributary.run_id` = '{about['run_id']}'")
        if runs:
            self.run_id = runs[0].info.run_id
            require_own_place(self.uri, runs[0].info.artifact_uri)
            self.client.update_run(self.run_id, status="RUNNING")
        else:
            tags = {"tributary.run_id": about["run_id"], "mlflow.source.name": "learner.run"}
            created = int(about["created"] * 1000)
            info = self.client.create_run(self.experiment_id, created, tags, about["name"]).info
            require_own_place(self.uri, info.artifact_uri)
            self.run_id = info.run_id

    def sync(self) -> None:
        """Send what the server lacks of the closed epochs: metrics and pictures."""
        records = Records.open(self.storage, self._warn)
        newest = checkpoint.newest(self.storage, records.run_id)
        done = newest["next_epoch"] if newest else BEFORE
        for line in records.lines:
            if line["epoch"] < done and line["epoch"] + 1 not in self._logged:
                self._send_line(line)
                self._logged.add(line["epoch"] + 1)
        for epoch in records.evaluated():
            if epoch < done:
                with _left_out(records):
                    sheet = records.sheet(epoch)
                    self._send_picture("evaluation/samples", sheet, epoch + 1, _time(records, epoch + 1))

    def finish(self, status: str) -> None:
        """Send all of the run but its model, and close the MLflow run with FINISHED, FAILED or KILLED. Raises a
        StorageError if the run is finished, but not all of its epochs could be read."""
        self.sync()
        records = Records.open(self.storage, self._warn)
        config = saved_config(records)
        if status == "FINISHED" and any(line["epoch"] + 1 not in self._logged for line in records.lines):
            raise StorageError(f"checkpoints in {self.storage} are missing or damaged: put them back from a copy")
        if epochs := [epoch for epoch in records.evaluated() if epoch + 1 in self._logged]:
            table = self._table(records, epochs).to_json(orient="split", index=False)  # as log_table, which only adds
            self.client.log_text(self.run_id, table, TABLE)
        self._send_judgements(records)
        self._send_targets(records)
        self.client.log_text(self.run_id, summary.Facts(records, config).settings(), CONFIG)
        if self.storage.exists(html.FILE):
            self.client.log_text(self.run_id, self.storage.read(html.FILE).decode(errors="replace"), html.FILE)
        self._join_group(config.mlflow.group)  # again: an older run may have turned up
        ended = int(records.lines[-1]["time"] * 1000) if records.lines else None
        self.client.set_terminated(self.run_id, status, ended)

    def send_model(self, registered_model: str | None) -> str | None:
        """The newest checkpoint's LoRA as a logged model and, given a name, as a version of that registered model.
        Returns why there is none, if so. Raises a CheckpointError if the LoRA cannot be read, or is not as written."""
        records = Records.open(self.storage, self._warn)
        manifest = checkpoint.newest(self.storage, records.run_id)
        if manifest is None or DIFFUSERS not in manifest["files"]:
            return "no checkpoint is whole" if manifest is None else "diffusers loads no LoRA for a model without text"
        files = checkpoint.load(self.storage, manifest["step"], records.run_id).files
        name, path = f"lora-step-{manifest['step']:06d}", saved_config(records).model.path
        base_model = str(resolve(path).absolute()) if resolve(path).is_dir() else path
        logged = self.client.search_logged_models([self.experiment_id], f"source_run_id = '{self.run_id}'")
        alike = [model for model in logged if model.name == name]
        whole = [model.model_id for model in alike if model.status == LoggedModelStatus.READY]
        previous = os.environ.get("MLFLOW_TRACKING_URI")
        mlflow.set_tracking_uri(self.uri)  # log_model and register_model take no client
        try:
            if not whole:
                for half in alike:  # of an upload that was cut short
                    self.client.delete_logged_model(half.model_id)
                tags = {"tributary.run_id": records.run_id}
                model = self.client.create_logged_model(self.experiment_id, name, self.run_id, tags, model_type="lora")
                require_own_place(self.uri, model.artifact_location)
                whole, place = [model.model_id], {"model_id": model.model_id, "run_id": self.run_id}
                with tempfile.TemporaryDirectory() as folder:
                    for file in (DIFFUSERS, KOHYA):
                        (Path(folder) / Path(file).name).write_bytes(files[file])
                    mlflow.diffusers.log_model(folder, base_model, step=manifest["next_epoch"], **place)
            source = f"models:/{whole[0]}"
            versions = self.client.search_model_versions(f"run_id = '{self.run_id}'")
            if registered_model and (registered_model, source) not in {(each.name, each.source) for each in versions}:
                mlflow.register_model(source, registered_model)
        finally:
            mlflow.set_tracking_uri(previous)  # type: ignore[arg-type]  # None: none
        return None

    def _set_tags(self, tags: Mapping[str, str]) -> None:
        self.client.log_batch(self.run_id, tags=[RunTag(key, without_passwords(value)) for key, value in tags.items()])

    def _join_group(self, group: str | None) -> None:
        """Nest the run under the oldest of its group. Whoever looked before that one was there looks again at its end.
        A run's parent is always older than it, so there are no circles."""
        if group is not None:
            self._set_tags({GROUP: group})
            name = f"tags.`{GROUP}` = '{group}'"
            (oldest,) = self.client.search_runs([self.experiment_id], name, order_by=["start_time ASC"], max_results=1)
            if oldest.info.run_id != self.run_id:
                self._set_tags({PARENT: oldest.info.run_id})

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

    def _table(self, records: Records, epochs: Sequence[int]) -> pd.DataFrame:
        """The fixed images after each epoch; in the column of a part or held-out reward, its own raw reward."""
        tables = []
        for epoch in epochs:
            with _left_out(records):
                table = records.evaluation(epoch)
                columns = {key: table[key] for key in ("prompt", "reward")}  # second: MLflow's page compares by it
                columns |= table.get("reward_parts", {})
                columns |= {f"held out: {label}": values for label, values in table.get("held_out", {}).items()}
                tables.append(pd.DataFrame({**columns, "image": range(len(table["prompt"])), "epoch": epoch + 1}))
        return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()

    def _send_judgements(self, records: Records) -> None:
        """Figures and pictures that commands/evaluate.py left: judged/NAME the value, judged/NAME_base and
        judged/NAME_floor, its upper end, beside it, and judged/images, of how many. MLflow takes no metric back: those
        of an epoch's first judgement stay."""
        judged = {entry.step for entry in self.client.get_metric_history(self.run_id, f"judged/{SENTINEL}")}
        for place in summary.judgements(self.storage).values():
            tree = summary.judgement_in(records, place)
            if tree is None or (step := tree.get("epochs_done")) is None:  # not of a run's epoch
                continue
            time = _time(records, step)
            metrics = [
                _metric(f"judged/{row['key']}{end}", row[key], time, step)
                for row in summary.rows(tree)
                for key, end in (("value", ""), ("base", "_base"), ("floor_high", "_floor"))
                if row[key] is not None
            ]
            metrics.append(Metric("judged/images", float((tree.get("settings") or {}).get("images", 0)), time, step))
            with _left_out(records):
                both = records.picture(place.replace(".json", ".png"))
                self._send_picture("judged/base_and_tuned", both, step, time)
            if step not in judged:
                self.client.log_batch(self.run_id, [*metrics, Metric(f"judged/{SENTINEL}", step, time, step)])

    def _send_targets(self, records: Records) -> None:
        """The same of commands/targets.py: target/reward and target/reward_target, target/tv_ATTRIBUTE with _base and
        _floor, target/ess."""
        judged = {entry.step for entry in self.client.get_metric_history(self.run_id, f"target/{SENTINEL}")}
        for place in targets.judgements(self.storage).values():
            found = targets.judgement_in(records, place)
            if found is None or (step := found[0].get("epochs_done")) is None:
                continue
            time = _time(records, step)
            self._send_picture("target/laws", found[1], step, time)
            values = {"ess": found[0]["ess"], "reward": found[0]["reward"].get("value")}
            values["reward_target"] = found[0]["reward"].get("target")
            for row in targets.rows(found[0]):
                ends = (("", "value"), ("_base", "base"), ("_floor", "floor_high"))
                values |= {f"tv_{row['name']}{end}": row["tv"].get(key) for end, key in ends}
            metrics = [
                _metric(f"target/{name}", value, time, step) for name, value in values.items() if value is not None
            ]
            if step not in judged:
                self.client.log_batch(self.run_id, [*metrics, Metric(f"target/{SENTINEL}", step, time, step)])


@contextlib.contextmanager
def _left_out(records: Records) -> Iterator[None]:
    """What is damaged is warned of."""
    try:
        yield
    except StorageError as error:
        records.warn(f"{error}; it is left out")


def _metric(name: str, value: float, time: int, step: int) -> Metric:
    """Names may have few characters."""
    return Metric(re.sub(r"[^\w\-. :/]", "_", name), float(value), time, step)


def _time(records: Records, step: int) -> int:
    """Milliseconds when the epoch was done; the run's begin, if that is not known."""
    seconds = (line["time"] for line in records.lines if line["epoch"] + 1 == step)
    return int(next(seconds, records.about["created"]) * 1000)
