"""What MLflow has of a run: all of it, once, whatever was cut short; a LoRA that loads; nothing that is a secret."""

import io
import json
import shutil
from collections import Counter
from pathlib import Path

import mlflow.diffusers
import mlflow.pyfunc
import pytest
from mlflow.entities import ViewType
from mlflow.exceptions import MlflowException
from PIL import Image

from commands import upload
from learner.config import config_yaml
from learner.run import main
from records.run_folder import Records
from records.storage import Storage, StorageError
from reports.mlflow_mirror import GROUP, GROUP_PARENT, PARENT, TABLE, Mirror

RANK, ALPHA = 2, 6.0
LATEST = "checkpoints/latest/lora"
WEIGHTS = "pytorch_lora_weights.safetensors"
FIGURE = {"value": 0.81, "low": 0.8, "high": 0.82, "base": 0.7, "floor": 0.01}
PASSWORD = "open-sesame"


def judgement(epochs: int | None, **changed) -> bytes:
    """As commands/evaluate.py writes it."""
    about = {"name": "run", "epochs_done": epochs, "settings": {"images": 4}, "held_out": {"my judge#2": FIGURE}}
    return json.dumps({**about, "reward": FIGURE, "fid": FIGURE, "kid": None, **changed}).encode()


def picture(kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (600, 300), "red").save(file, kind)
    return file.getvalue()


@pytest.fixture(scope="module")
def finished(small_settings, tmp_path_factory):
    """Folder of a finished run of two epochs, judged after the second; nothing of it is in MLflow."""
    folder = tmp_path_factory.mktemp("mirror") / "run"
    settings = ["run.runner=inprocess", "evaluation.every=1", "train.updates_per_epoch=2", f"lora.alpha={ALPHA}"]
    assert main([*small_settings, *settings, f"run.dir={folder}"]) == 0
    storage = Storage(str(folder))
    storage.write("evaluation/step-000004.json", judgement(2))
    storage.write("evaluation/step-000004.png", picture())
    return folder


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """A database with MLflow's tables, which take it seconds to make."""
    file = tmp_path_factory.mktemp("empty") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture
def run(finished, tables, tmp_path):
    """A copy of the run, with an empty MLflow beside it."""
    shutil.copy(tables, tmp_path)
    return shutil.copytree(finished, tmp_path / "run", symlinks=True)


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


def assert_whole(mirror) -> None:
    """Everything of the run is there, once."""
    client, records = mirror.client, Records.open(mirror.storage)
    run = client.get_run(mirror.run_id)
    for key in run.data.metrics:
        assert max(Counter(step for step, _ in history(mirror, key)).values()) == 1, key
    assert history(mirror, "loss") == [(line["epoch"] + 1, line["loss"]) for line in records.lines[1:]]
    assert [step for step, _ in history(mirror, "update/loss")] == [1, 2, 3, 4]
    pictures = {*(f"evaluation~samples+step+{step}" for step in range(3)), "judged~base_and_tuned+step+2"}
    names = [Path(file.path).name for file in client.list_artifacts(mirror.run_id, "images")]
    assert Counter(name.split("+timestamp")[0] for name in names if name.endswith("webp")) == Counter(pictures)
    assert {name.split("+timestamp")[0] for name in names if name.endswith("png")} == pictures
    assert run.data.tags["mlflow.loggedImages"].lower() == "true" and TABLE in run.data.tags["mlflow.loggedArtifacts"]
    table = json.loads(Path(client.download_artifacts(mirror.run_id, TABLE)).read_text())
    assert table["columns"] == ["prompt", "reward", "image", "epoch"]
    rewards = [reward for epoch in records.evaluated() for reward in records.evaluation_rewards(epoch)]
    assert [row[1] for row in table["data"]] == pytest.approx(rewards, abs=1e-9)
    assert [row[2:] for row in table["data"]] == [[image, epoch] for epoch in range(3) for image in range(4)]
    (model,) = models(mirror)
    assert model.status == "READY" and model.name == "lora-step-000004"
    assert [(output.model_id, output.step) for output in run.outputs.model_outputs] == [(model.model_id, 2)]
    (version,) = client.search_model_versions("name='shapes'")
    assert (version.version, version.source) == (1, f"models:/{model.model_id}")


def test_a_run_is_there_once_however_often_it_is_sent(sent):
    assert_whole(sent)
    (model,) = models(sent)
    figures = {metric.key: metric.value for metric in model.metrics}
    assert (2, figures["eval_reward_mean"]) == history(sent, "eval_reward_mean")[-1]
    sent.finish("FINISHED")
    records, info = Records.open(sent.storage), sent.client.get_run(sent.run_id).info
    assert info.start_time == int(records.about["created"] * 1000)
    assert info.end_time == int(records.lines[-1]["time"] * 1000)
    assert sent.client.get_experiment(sent.experiment_id).tags["mlflow.experimentKind"] == "custom_model_development"


class Killed(BaseException):
    pass


CALLS = ("log_batch", "log_model_artifacts")
MORE_CALLS = (
    "create_run", "log_artifact", "log_artifacts", "set_tag", "set_terminated", "create_logged_model", "log_outputs",
    "finalize_logged_model", "create_registered_model", "_create_model_version",
)  # fmt: skip


@pytest.mark.parametrize("call", [*CALLS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_CALLS)])
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
        with monkeypatch.context() as patched:
            patched.setattr(mlflow.MlflowClient, call, killed)
            try:
                assert upload.main([str(run), "--registered-model", "shapes"]) == 0
                break  # there are no more calls
            except Killed:
                pass
    assert number > 1
    assert_whole(mirror_of(run))


def test_tables_can_be_read_back(sent, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", sent.uri)  # load_table goes by it alone
    table = sent.client.load_table(sent.experiment_id, TABLE, [sent.run_id])
    assert len(table) == 12 and set(table["epoch"]) == {0, 1, 2} and table["prompt"].str.len().min() > 0


def test_a_table_has_parts_and_judges(run):
    scores = {"prompt": ["a", "b"], "reward": [1.0, None], "reward_parts": {"x": [2, 3]}, "held_out": {"j": [4, None]}}
    (run / "evaluation/epoch-000001.json").write_text(json.dumps(scores))
    assert mirror_of(run)._table([1]) == {
        "prompt": ["a", "b"], "reward": [1.0, None], "x": [2, 3], "held out: j": [4, None], "image": [0, 1],
        "epoch": [2, 2],
    }  # fmt: skip


def test_judgements_are_metrics_of_their_epoch_and_the_first_stays(sent):
    for name, content in {
        "step-000004.json": judgement(2, reward={**FIGURE, "value": 0.9}),
        "step-000006.json": b'{"epochs_done": 1',
        "step-000008.json": judgement(None),
        "step-000010.json": b"[1]",
    }.items():
        sent.storage.write(f"evaluation/{name}", content)
    sent.finish("FINISHED")
    assert history(sent, "judged/reward") == [(2, 0.81)] and history(sent, "judged/fid_floor") == [(2, 0.01)]
    names = {key for key in sent.client.get_run(sent.run_id).data.metrics if key.startswith("judged/")}
    judged = ("reward", "fid", "held_out/my judge_2")
    assert names == {f"judged/{name}{suffix}" for name in judged for suffix in ("", "_base", "_floor")} | {
        "judged/epochs_done"
    }


def test_mlflow_loads_the_adapter_with_its_alpha_and_without_code(sent, run, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", sent.uri)
    adapter = mlflow.diffusers.load_model("models:/shapes/1", str(tmp_path))
    files = {file.name: file.read_bytes() for file in Path(adapter.adapter_path).iterdir()}
    assert files == {name: (run / LATEST / name).read_bytes() for name in (WEIGHTS, "kohya.safetensors")}
    layers = [module for module in adapter.load_pipeline().unet.modules() if hasattr(module, "lora_A")]
    assert layers and all(set(layer.scaling.values()) == {ALPHA / RANK} for layer in layers)
    served = mlflow.pyfunc.load_model("models:/shapes/1")
    assert served.metadata.flavors["diffusers"]["code"] is None
    assert served.metadata.flavors["python_function"]["loader_module"] == "mlflow.diffusers"
    (png,) = served.predict([{"prompt": "a red circle"}], {"num_inference_steps": 2})
    assert Image.open(io.BytesIO(png)).size == (64, 64)


def test_without_a_name_there_is_a_model_and_no_version(run):
    assert upload.main([str(run)]) == 0
    assert len(models(mirror_of(run))) == 1 and mirror_of(run).client.search_registered_models() == []


def test_a_model_that_failed_is_completed_under_its_id(run, monkeypatch, capsys):
    def fails(*_):
        raise MlflowException("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(mlflow.MlflowClient, "log_model_artifacts", fails)
        assert upload.main([str(run)]) == 1
    assert "the disk is full" in capsys.readouterr().err
    (half,) = models(mirror_of(run))
    assert half.status == "FAILED" and upload.main([str(run)]) == 0
    (whole,) = models(mirror_of(run))
    assert whole.model_id == half.model_id and whole.status == "READY"


def test_a_changed_adapter_is_no_model(run, capsys):
    content = (run / LATEST / WEIGHTS).read_bytes()
    (run / LATEST / WEIGHTS).write_bytes(content[:-4] + b"\0\0\0\0")
    assert upload.main([str(run)]) == 1
    assert "not what was written" in capsys.readouterr().err
    assert [model.status for model in models(mirror_of(run))] == ["PENDING"]


def test_a_model_without_text_is_refused_in_words(run, monkeypatch):
    mirror = mirror_of(run)
    monkeypatch.setattr(mirror, "_newest", lambda _: {"step": 2, "files": {"lora/adapter_model.safetensors": ""}})
    assert "without text" in mirror.send_model("shapes") and models(mirror) == []


@pytest.mark.parametrize("name", ["a/b", "a:b", "it's", "", "models."])
def test_names_that_mlflow_refuses_are_refused_at_once(name, small_config):
    with pytest.raises(ValueError, match=r"mlflow\.registered_model"):
        small_config(f"mlflow.registered_model={name!r}")


def test_no_password_is_sent_nor_said(run, tmp_path, monkeypatch, capsys):
    for name in ("HF_TOKEN", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, PASSWORD)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("uri: null", f"uri: http://me:{PASSWORD}@127.0.0.1:9/x"))
    (run / "report.html").write_text(f"all settings, coded or not: {PASSWORD}")
    about = json.loads((run / "run.json").read_text())
    about["environment"]["working_dir"] = f"https://me:{PASSWORD}@somewhere/code.zip"
    (run / "run.json").write_text(json.dumps(about))
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
    assert upload.main([str(run)]) == 1
    assert "leads out of" in capsys.readouterr().err
    sheet.unlink()
    sheet.write_bytes(picture("EPS"))  # which Pillow would give to Ghostscript
    assert upload.main([str(run)]) == 1
    assert "cannot identify image" in capsys.readouterr().err
    mirror = mirror_of(run)
    assert not [name for name in mirror._pictures if name.endswith("step+2")]
    with pytest.raises(StorageError):
        mirror.storage.read("../secret.png")


@pytest.fixture
def member(tables, small_config, tmp_path):
    """Factory of mirrors of runs of a group, on one server."""
    shutil.copy(tables, tmp_path)

    def make(name: str, group: str = "sweep") -> Mirror:
        storage = Storage(str(tmp_path / name))
        config = small_config(f"mlflow.group={group}")
        Records.create(storage, name, config_yaml(config), {"config_digest": config.digest(), "prompts_sha256": ""})
        return Mirror(storage, f"sqlite:///{tmp_path}/mlflow.db", "tributary")

    return make


def parent_of(mirror) -> str:
    return mirror.client.get_run(mirror.run_id).data.tags[PARENT]


def test_a_group_has_one_parent(member):
    first, second, other = member("first"), member("second"), member("other", "other")
    for mirror in (first, second, other, first):
        mirror.connect()
    assert parent_of(first) == parent_of(second) != parent_of(other)
    parent = first.client.get_run(parent_of(first))
    assert (parent.info.run_name, parent.info.status, parent.data.tags[GROUP_PARENT]) == ("sweep", "FINISHED", "sweep")
    assert len(first.client.search_runs([first.experiment_id])) == 5
    assert first.client.get_run(first.run_id).data.tags[GROUP] == "sweep"


def test_of_two_parents_made_at_once_the_older_stays(member, monkeypatch):
    first, second = member("first"), member("second")
    first.connect()
    real, looks = second._parents, []

    def looked_before_the_first_had_made_one(group):
        looks.append(group)
        return real(group) if len(looks) > 1 else []

    monkeypatch.setattr(second, "_parents", looked_before_the_first_had_made_one)
    second.connect()
    assert parent_of(second) == parent_of(first)
    assert real("sweep") == [parent_of(first)]  # its own is gone
    gone = first.client.search_runs([first.experiment_id], run_view_type=ViewType.DELETED_ONLY)
    assert [run.info.run_name for run in gone] == ["sweep"]


def test_an_older_parent_that_turns_up_is_taken_at_the_end(member):
    mirror = member("first")
    mirror.connect()
    before = parent_of(mirror)
    older = mirror.client.create_run(mirror.experiment_id, start_time=1, tags={GROUP_PARENT: "sweep"}).info.run_id
    mirror.finish("KILLED")
    assert parent_of(mirror) == older != before
