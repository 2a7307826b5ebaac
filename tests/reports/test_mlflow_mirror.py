"""What MLflow has of a run: all of it, once, whatever was cut short; a LoRA that loads; nothing that is a secret."""

import contextlib
import io
import json
import shutil
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import mlflow.diffusers
import pytest
from mlflow.exceptions import MlflowException
from PIL import Image
from test_open_run import Killed

from commands import upload
from learner.config import config_yaml
from records import checkpoint
from records.run_folder import Records
from records.storage import Storage, StorageError
from reports.mlflow_mirror import GROUP, PARENT, TABLE, Mirror

RANK, ALPHA = 2, 3.0  # of the finished run
LATEST = "checkpoints/latest/lora"
WEIGHTS = "pytorch_lora_weights.safetensors"
FIGURE = {"value": 0.81, "low": 0.8, "high": 0.82, "base": 0.7, "floor": 0.005, "floor_high": 0.01}
JUDGED = "evaluation/step-000002-4-images-ab12cd34.png"
PASSWORD = "open-sesame"


def judgement(epochs: int | None, **changed) -> bytes:
    about = {"name": "run", "epochs_done": epochs, "settings": {"images": 4}, "held_out": {"my judge#2": FIGURE}}
    return json.dumps({**about, "reward": FIGURE, "fid": FIGURE, "kid": None, **changed}).encode()


def picture(kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (600, 300), "red").save(file, kind)
    return file.getvalue()


@pytest.fixture
def run(finished_run, tables, tmp_path):
    """A copy of a finished run of two epochs, judged after the second, with an empty MLflow beside it."""
    shutil.copy(tables, tmp_path)
    folder = shutil.copytree(finished_run, tmp_path / "run", symlinks=True)
    (folder / JUDGED).with_suffix(".json").write_bytes(judgement(2))
    (folder / JUDGED).write_bytes(picture())
    return folder


@pytest.fixture
def sent(run):
    """The mirror of a run that was sent twice, as a model with a name."""
    for _ in range(2):
        assert upload.main([str(run), "--registered-model", "shapes"]) == 0
    return mirror_of(run)


def mirror_of(run, experiment: str = "tributary") -> Mirror:
    mirror = Mirror(Storage(str(run)), f"sqlite:///{run.parent}/mlflow.db", experiment)
    mirror.connect()
    return mirror


def history(mirror, metric: str) -> list[tuple[int, float]]:
    return [(entry.step, entry.value) for entry in mirror.client.get_metric_history(mirror.run_id, metric)]


def models(mirror):
    return mirror.client.search_logged_models([mirror.experiment_id])


def assert_whole(mirror, name: str | None = "shapes") -> None:
    """Everything of the run is there, once, and its model has a version under that name."""
    client, records = mirror.client, Records.open(mirror.storage)
    run, evaluated, steps = client.get_run(mirror.run_id), records.evaluated(), records.lines[-1]["step"]
    (model,) = models(mirror)
    for key in run.data.metrics:
        own = [entry for entry in client.get_metric_history(mirror.run_id, key) if entry.model_id is None]
        assert max(Counter(entry.step for entry in own).values()) == 1, key
    assert dict(history(mirror, "loss")) == {line["epoch"] + 1: line["loss"] for line in records.lines[1:]}
    assert {step for step, _ in history(mirror, "update/loss")} == set(range(1, steps + 1))
    pictures = {f"evaluation~samples+step+{epoch + 1}" for epoch in evaluated}
    if mirror.storage.exists(JUDGED):
        pictures.add("judged~base_and_tuned+step+2")
    top = {file.path for file in client.list_artifacts(mirror.run_id)}
    assert top == {"images", "config.yaml", TABLE, "report.html"} and run.data.params["lora.rank"] == f"{RANK}"
    names = [Path(file.path).name for file in client.list_artifacts(mirror.run_id, "images")]
    assert Counter(name.split("+timestamp")[0] for name in names if name.endswith("webp")) == Counter(pictures)
    assert {name.split("+timestamp")[0] for name in names if name.endswith("png")} == pictures
    assert run.data.tags["mlflow.loggedImages"].lower() == "true" and TABLE in run.data.tags["mlflow.loggedArtifacts"]
    table = json.loads(Path(client.download_artifacts(mirror.run_id, TABLE)).read_text())
    assert table["columns"] == ["prompt", "reward", "image", "epoch"]
    rewards = [reward for epoch in evaluated for reward in records.evaluation(epoch)["reward"]]
    assert [row[1] for row in table["data"]] == pytest.approx(rewards, abs=1e-9)
    assert [row[2:] for row in table["data"]] == [[image, epoch + 1] for epoch in evaluated for image in range(4)]
    assert model.status == "READY" and model.name == f"lora-step-{steps:06d}"
    shown = model.model_id, records.lines[-1]["epoch"] + 1  # its step there: the epoch, as of its evaluation's figures
    assert shown in [(output.model_id, output.step) for output in run.outputs.model_outputs]
    versions = [(int(version.version), version.source) for version in client.search_model_versions("name='shapes'")]
    assert versions == ([(1, f"models:/{model.model_id}")] if name else [])


def test_a_run_is_there_once_however_often_it_is_sent(sent, monkeypatch):
    assert_whole(sent)
    (model,) = models(sent)
    figures = {metric.key: metric.value for metric in model.metrics}
    assert (2, figures["eval_reward_mean"]) == history(sent, "eval_reward_mean")[-1]
    sent.finish("FINISHED")
    records, info = Records.open(sent.storage), sent.client.get_run(sent.run_id).info
    assert info.start_time == int(records.about["created"] * 1000)
    assert info.end_time == int(records.lines[-1]["time"] * 1000)
    assert sent.client.get_experiment(sent.experiment_id).tags["mlflow.experimentKind"] == "custom_model_development"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", sent.uri)  # load_table goes by it alone
    table = sent.client.load_table(sent.experiment_id, TABLE, [sent.run_id])
    assert len(table) == 4 * len(records.evaluated()) and table["prompt"].str.len().min() > 0


CALLS = ("log_batch", "log_model_artifacts")
MORE_CALLS = (
    "create_run", "log_artifact", "set_tag", "set_terminated", "create_logged_model", "log_outputs",
    "finalize_logged_model", "create_registered_model", "_create_model_version",
)  # fmt: skip


@pytest.mark.parametrize("call", [*CALLS, *(pytest.param(name, marks=pytest.mark.long) for name in MORE_CALLS)])
@pytest.mark.parametrize("done", [True, False])
def test_an_upload_killed_anywhere_is_completed_by_the_next(call, done, run, monkeypatch):
    real, left = getattr(mlflow.MlflowClient, call), 0

    def killed(self, *arguments, **named):
        nonlocal left
        left -= 1
        if left:
            return real(self, *arguments, **named)
        if done:
            real(self, *arguments, **named)
        raise Killed

    for number in range(1, 100):
        left = number
        with monkeypatch.context() as patched, contextlib.suppress(Killed):
            patched.setattr(mlflow.MlflowClient, call, killed)
            assert upload.main([str(run), "--registered-model", "shapes"]) == 0
            break  # there are no more calls
    assert number > 1
    assert_whole(mirror_of(run))


def test_a_table_has_parts_and_judges(run):
    scores = {"prompt": ["a", "b"], "reward": [1.0, None], "reward_parts": {"x": [2, 3]}, "held_out": {"j": [4, None]}}
    (run / "evaluation/epoch-000001.json").write_text(json.dumps(scores))
    mirror = mirror_of(run)
    table = json.loads(mirror._table(Records.open(mirror.storage), [1]).to_json(orient="split", index=False))
    assert table["columns"] == ["prompt", "reward", "x", "held out: j", "image", "epoch"]
    assert table["data"] == [["a", 1, 2, 4, 0, 2], ["b", None, 3, None, 1, 2]]


def test_judgements_are_metrics_of_their_epoch_and_the_first_stays(sent):
    later = judgement(2, reward={**FIGURE, "value": 0.9}), b'{"epochs_done": 1', judgement(None), b"[1]"
    for step, content in enumerate(later, 3):
        sent.storage.write(f"evaluation/step-{step:06d}-4-images-ab12cd34.json", content)
    sent.finish("FINISHED")
    assert set(history(sent, "judged/reward")) == {(2, 0.81)} and set(history(sent, "judged/fid_floor")) == {(2, 0.01)}
    names = {key for key in sent.client.get_run(sent.run_id).data.metrics if key.startswith("judged/")}
    judged = (f"{name}{more}" for name in ("reward", "fid", "held_out/my judge_2") for more in ("", "_base", "_floor"))
    assert names == {f"judged/{name}" for name in (*judged, "epochs_done", "images")}


def test_mlflow_loads_the_adapter_with_its_alpha_and_without_code(sent, run, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", sent.uri)
    adapter = mlflow.diffusers.load_model("models:/shapes/1", str(tmp_path))
    files = {file.name: file.read_bytes() for file in Path(adapter.adapter_path).iterdir()}
    assert files == {name: (run / LATEST / name).read_bytes() for name in (WEIGHTS, "kohya.safetensors")}
    layers = [module for module in adapter.load_pipeline().unet.modules() if hasattr(module, "lora_A")]
    assert layers and all(set(layer.scaling.values()) == {ALPHA / RANK} for layer in layers)
    flavors = mlflow.models.get_model_info("models:/shapes/1").flavors
    assert flavors["diffusers"]["code"] is None
    assert flavors["python_function"]["loader_module"] == "mlflow.diffusers"


def test_without_a_name_there_is_a_model_and_no_version_and_of_a_changed_adapter_none(run, capsys):
    assert upload.main([str(run)]) == 0
    assert len(models(mirror_of(run))) == 1 and mirror_of(run).client.search_registered_models() == []
    (run / LATEST / WEIGHTS).write_bytes((run / LATEST / WEIGHTS).read_bytes()[:-4] + b"\0\0\0\0")
    assert upload.main([str(run), "--experiment", "other"]) == 1
    assert "not what was written" in capsys.readouterr().err and models(mirror_of(run, "other")) == []


def test_a_model_without_text_and_names_that_mlflow_refuses_are_refused_in_words(run, small_config, monkeypatch):
    for name in ("a/b", "a:b", "it's", "", "models."):
        with pytest.raises(ValueError, match=r"mlflow\.registered_model"):
            small_config(f"mlflow.registered_model={name!r}")
    mirror = mirror_of(run)
    newest = {"step": 2, "next_epoch": 0, "files": {"lora/adapter_model.safetensors": ""}}
    monkeypatch.setattr(checkpoint, "newest", lambda *_: newest)
    assert "without text" in mirror.send_model("shapes") and models(mirror) == []


def test_no_password_is_sent_nor_said(run, tmp_path, monkeypatch, capsys):
    for name in ("HF_TOKEN", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, PASSWORD)
    config = run / "config.yaml"
    changed, records = config.read_text(), Records.open(Storage(str(run)))
    changed = changed.replace("uri: null", f"uri: http://me:{PASSWORD}@127.0.0.1:9/x")
    environment = records.about["environment"] | {"working_dir": f"https://me:{PASSWORD}@somewhere/code.zip"}
    records.save_settings(changed.encode(), environment=environment)
    assert upload.main([str(run), "--uri", f"sqlite:///{tmp_path}/mlflow.db"]) == 0
    mirror = mirror_of(run)
    assert "http://127.0.0.1:9/x" in Path(mirror.client.download_artifacts(mirror.run_id, "config.yaml")).read_text()
    kept = [file for file in [*(tmp_path / "mlartifacts").rglob("*"), tmp_path / "mlflow.db"] if file.is_file()]
    assert len(kept) > 5 and not [file for file in kept if PASSWORD.encode() in file.read_bytes()]
    assert upload.main([str(run), "--uri", f"http://me:{PASSWORD}@127.0.0.1:9"]) == 1
    said = capsys.readouterr()
    assert "MLflow at http://127.0.0.1:9 fails" in said.err and PASSWORD not in said.out + said.err


def test_nothing_outside_the_folder_is_sent_and_no_other_program_draws(run, tmp_path, capsys):
    sheet, secret = run / "evaluation/epoch-000001.png", tmp_path / "secret.png"
    secret.write_bytes(picture())
    sheet.unlink()
    sheet.symlink_to(secret)
    assert upload.main([str(run)]) == 0
    assert "leads out of" in capsys.readouterr().err
    sheet.unlink()
    sheet.write_bytes(picture("EPS"))  # which Pillow would give to Ghostscript
    assert upload.main([str(run)]) == 0
    assert "cannot identify image" in capsys.readouterr().err
    mirror = mirror_of(run)
    assert "evaluation~samples+step+2" not in mirror._pictures
    with pytest.raises(StorageError):
        mirror.storage.read("../secret.png")


def test_a_group_is_nested_under_its_oldest_run(tables, small_config, tmp_path):
    """Also where that one was there only after another had looked for it."""
    shutil.copy(tables, tmp_path)

    def member(name: str, created: float, group: str = "sweep") -> Mirror:
        storage, config = Storage(str(tmp_path / name)), small_config(f"mlflow.group={group}")
        facts = {"config_digest": config.digest(), "prompts_sha256": ""}
        Records.create(storage, name, config_yaml(config), facts).note(created=created)
        return mirror_of(tmp_path / name)

    def parent(mirror: Mirror) -> str | None:
        return mirror.client.get_run(mirror.run_id).data.tags.get(PARENT)

    second, third, first, other = member("b", 2), member("c", 3), member("a", 1), member("x", 0, "other")
    assert first.client.get_run(first.run_id).data.tags[GROUP] == "sweep"
    assert [parent(first), parent(second), parent(third), parent(other)] == [None, None, second.run_id, None]
    for mirror in (second, third):
        mirror.finish("KILLED")
    assert parent(second) == parent(third) == first.run_id


def test_a_deleted_experiment_is_said_with_two_ways_on(run, capsys):
    mirror = mirror_of(run)
    mirror.client.delete_experiment(mirror.experiment_id)
    assert upload.main([str(run)]) == 1
    said = capsys.readouterr().err
    assert f"is deleted: give `mlflow experiments restore --experiment-id {mirror.experiment_id}`" in said
    assert "--experiment" in said and said.count("\n") == 1
    mirror.client.restore_experiment(mirror.experiment_id)
    assert mirror_of(run).run_id == mirror.run_id


def test_runs_that_start_together_share_the_experiment_that_one_of_them_makes(run, monkeypatch):
    first, real, asked = mirror_of(run), mlflow.MlflowClient.get_experiment_by_name, []

    def not_yet(self, name):
        asked.append(name)
        return None if len(asked) == 1 else real(self, name)

    monkeypatch.setattr(mlflow.MlflowClient, "get_experiment_by_name", not_yet)
    assert mirror_of(run).experiment_id == first.experiment_id and len(asked) == 2


class Page(BaseHTTPRequestHandler):
    """What answers every request with a page, as an older server does those that it does not know."""

    def do_GET(self) -> None:
        page = b"<!doctype html>\n<html lang=en>\n<title>404 Not Found</title>"
        self.send_response(404)
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)

    do_POST = do_GET

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def page():
    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_an_older_server_is_said_and_its_page_is_not(run, page, monkeypatch, capsys):
    def older(self, *_, **__):
        return mlflow.MlflowClient(page)._tracking_client.store.search_logged_models(["0"])

    assert upload.main([str(run), "--uri", page]) == 1
    monkeypatch.setattr(mlflow.MlflowClient, "search_logged_models", older)
    assert upload.main([str(run)]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first.replace(page, "") == second.replace(f"sqlite:///{run.parent}/mlflow.db", "")
    assert "fails (it is no MLflow of version 3 or newer (404 for a request): update it, or name another" in first
    monkeypatch.undo()
    assert not mlflow.MlflowClient(f"sqlite:///{run.parent}/mlflow.db").get_experiment_by_name("tributary")
    page_said = upload.reason(
        MlflowException("failed with error code 502 != 200. Response body: '<!doctype html>\n<p>")
    )
    assert page_said == "MlflowException: failed with error code 502 != 200"
