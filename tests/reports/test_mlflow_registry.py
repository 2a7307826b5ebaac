"""A run's LoRA in MLflow's registry: once, under the right aliases, loadable, and never in the run's way."""

import json
import shutil
from pathlib import Path

import mlflow.diffusers
import pytest
import yaml
from mlflow.exceptions import MlflowException
from safetensors.torch import load_file

from commands import upload
from diffusion.lora import DIFFUSERS_FILE
from learner.run import main
from records.run_folder import Records
from records.storage import Storage
from reports.mlflow_mirror import Mirror
from reports.mlflow_registry import NoModel, Registry, serving_settings

RANK, ALPHA = 2, 6.0
LATEST = "checkpoints/latest/lora"


@pytest.fixture(scope="module")
def runs(small_settings, tmp_path_factory):
    """Two finished runs of two epochs, both evaluated; nothing of them is in MLflow."""
    folder = tmp_path_factory.mktemp("registry")
    for seed in (0, 1):
        settings = [*small_settings, "run.runner=inprocess", "evaluation.every=1", f"lora.alpha={ALPHA}"]
        assert main([*settings, f"run.seed={seed}", f"run.dir={folder / str(seed)}"]) == 0
    return folder


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    """A database with MLflow's tables, which take it seconds to make."""
    file = tmp_path_factory.mktemp("empty") / "mlflow.db"
    client(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture
def uri(tmp_path, empty):
    shutil.copy(empty, tmp_path)
    return f"sqlite:///{tmp_path}/mlflow.db"


@pytest.fixture
def send(runs, uri):
    """Upload a run by its seed: exit status."""
    return lambda seed, *arguments: upload.main([str(runs / str(seed)), "--uri", uri, *arguments])


def client(uri):
    return mlflow.MlflowClient(uri)


def models(uri):
    return client(uri).search_logged_models([client(uri).get_experiment_by_name("tributary").experiment_id])


def aliases(uri, name="shapes") -> dict[str, int]:
    return {alias: int(version) for alias, version in client(uri).get_registered_model(name).aliases.items()}


def versions(uri) -> dict[int, str]:
    """Step of each version."""
    return {
        int(each.version): each.tags["tributary.step"] for each in client(uri).search_model_versions("name='shapes'")
    }


def test_a_run_is_one_model_and_one_version_however_often_it_is_sent(send, uri, runs, monkeypatch):
    for name in ("HF_TOKEN", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "a-secret")
    for _ in range(2):
        assert send(0, "--registered-model", "shapes") == 0
    (model,) = models(uri)
    assert model.status == "READY" and model.params["alpha"] == str(ALPHA) and model.tags["tributary.step"] == "2"
    run = client(uri).get_run(model.source_run_id)
    assert [(each.model_id, each.step) for each in run.outputs.model_outputs] == [(model.model_id, 2)]
    figures = {metric.key: metric.value for metric in model.metrics}
    assert figures["eval_reward_mean"] == run.data.metrics["eval_reward_mean"]
    assert len(client(uri).get_metric_history(model.source_run_id, "eval_reward_mean")) == 3
    assert versions(uri) == {1: "2"} and aliases(uri) == {"candidate": 1}
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": "shapes", "version": 1}]
    (version,) = client(uri).search_model_versions("name='shapes'")
    assert "a-secret" not in str([run.data.tags, run.data.params, model.tags, model.params, version.tags])


def test_without_a_name_there_is_a_model_and_no_version(send, uri):
    assert send(0) == 0
    assert len(models(uri)) == 1 and client(uri).search_registered_models() == []


def test_candidate_is_the_newest_and_champion_moves_by_command_alone(send, uri, capsys):
    name = ("--registered-model", "shapes")
    assert send(0, *name, "--promote") == 0
    assert "models:/shapes@champion" in capsys.readouterr().out
    assert aliases(uri) == {"candidate": 1, "champion": 1}
    assert send(1, *name) == 0
    assert aliases(uri) == {"candidate": 2, "champion": 1}
    assert send(0, *name) == 0  # an older one, sent again
    assert aliases(uri) == {"candidate": 2, "champion": 1}
    assert send(1, *name, "--promote") == 0
    assert aliases(uri) == {"candidate": 2, "champion": 2}


def test_promotion_needs_a_name(send, uri, capsys):
    assert send(0, "--promote") == 2
    assert (
        "mlflow.registered_model" in capsys.readouterr().err and client(uri).get_experiment_by_name("tributary") is None
    )


def test_a_checkpoint_that_was_not_evaluated_is_no_candidate(send, uri, runs, tmp_path):
    storage = Storage(str(runs / "0"))
    kept = {name: storage.read(f"evaluation/{name}") for name in storage.entries("evaluation") if "000001" in name}
    try:
        for name in kept:
            storage.remove(f"evaluation/{name}")
        assert send(0, "--registered-model", "shapes", "--promote") == 0
    finally:
        for name, content in kept.items():
            storage.write(f"evaluation/{name}", content)
    assert sorted(model.tags["tributary.step"] for model in models(uri)) == ["1", "2"]
    steps = versions(uri)
    assert sorted(steps.values()) == ["1", "2"]
    assert {alias: steps[version] for alias, version in aliases(uri).items()} == {"candidate": "1", "champion": "1"}


def test_a_model_half_sent_is_completed(send, uri, monkeypatch, capsys):
    with monkeypatch.context() as patched:

        def fails(*_):
            raise MlflowException("the disk is full")

        patched.setattr(mlflow.MlflowClient, "log_model_artifacts", fails)
        assert send(0, "--registered-model", "shapes") == 1
    assert "the disk is full" in capsys.readouterr().err
    (half,) = models(uri)
    assert half.status == "PENDING"
    assert send(0, "--registered-model", "shapes") == 0
    (whole,) = models(uri)
    assert whole.model_id == half.model_id and whole.status == "READY" and versions(uri) == {1: "2"}


def test_a_changed_adapter_is_no_model(send, uri, runs, capsys):
    file = runs / "0" / LATEST / DIFFUSERS_FILE
    content = file.read_bytes()
    try:
        file.write_bytes(content[:-4] + b"\0\0\0\0")
        assert send(0) == 1
    finally:
        file.write_bytes(content)
    assert "not what was written" in capsys.readouterr().err
    assert [model.status for model in models(uri)] == ["PENDING"]


def test_mlflow_loads_the_adapter_with_its_alpha_and_without_code(send, uri, runs, tmp_path, monkeypatch):
    assert send(0, "--registered-model", "shapes") == 0
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    loaded = mlflow.diffusers.load_model("models:/shapes@candidate", str(tmp_path))
    sent, trained = (load_file(Path(place) / DIFFUSERS_FILE) for place in (loaded.adapter_path, runs / "0" / LATEST))
    assert sent.keys() == trained.keys() and all((sent[key] == trained[key]).all() for key in sent)
    pipeline = loaded.load_pipeline()
    layer = next(module for module in pipeline.unet.modules() if hasattr(module, "lora_A"))
    assert set(layer.scaling.values()) == {ALPHA / RANK}
    about = yaml.safe_load((Path(loaded.adapter_path).parents[1] / "MLmodel").read_text())
    assert about["flavors"]["diffusers"]["code"] is None
    own = about["flavors"]["python_function"]
    assert (own["model_code_path"], own["loader_module"]) == ("serving.py", "mlflow.pyfunc.loaders.code_model")
    assert own["artifacts"]["adapter_weights"]["uri"] == "artifacts/adapter_weights"


def test_the_end_of_a_run_registers_and_its_failure_only_warns(runs, uri, small_config, monkeypatch):
    mirror = Mirror(Storage(str(runs / "0")), uri, "tributary")
    mirror.connect()
    said, asked = [], []
    monkeypatch.setattr(upload, "tell", said.append)
    monkeypatch.setattr(upload, "send_models", lambda _, name: asked.append(name))
    upload.follow_models(mirror)
    assert asked == [None] and not said

    def fails(*_):
        raise ConnectionError("gone\n<html>")

    monkeypatch.setattr(upload, "send_models", fails)
    upload.follow_models(mirror)
    assert said == [
        "say warning: MLflow did not take the run's model (ConnectionError: gone); send it: "
        f"python -m learner.upload {mirror.storage}"
    ]


def test_a_model_without_text_is_refused_in_words(runs):
    registry = Registry(None, "", "", Records.open(Storage(str(runs / "0"))))  # type: ignore[arg-type]
    with pytest.raises(NoModel, match="without text"):
        registry.log({"step": 2, "files": {"lora/adapter_model.safetensors": ""}})


def test_a_run_is_served_by_the_scheduler_that_it_sampled_with(small_config):
    settings = serving_settings(small_config("sampler.eta=0.5", "sampler.guidance=2", "model.dtype=bfloat16"))
    assert (settings["scheduler"], settings["steps"], settings["eta"]) == ("DDIMScheduler", 4, 0.5)
    assert (settings["guidance"], settings["dtype"], settings["revision"]) == (2, "bfloat16", None)
    assert Path(settings["base_model"]).is_absolute()
    assert serving_settings(small_config("sampler.grid=dpm_solver"))["scheduler"] == "DPMSolverMultistepScheduler"
    with pytest.raises(NoModel, match=r"eta 0\.5"):
        serving_settings(small_config("sampler.grid=dpm_solver", "sampler.eta=0.5"))


def test_of_a_base_model_of_the_hub_the_commit_that_is_here_is_named(small_config, tmp_path, monkeypatch):
    place = tmp_path / "snapshots" / "abc123" / "model_index.json"
    monkeypatch.setattr("reports.mlflow_registry.try_to_load_from_cache", lambda *_: str(place))
    settings = serving_settings(small_config("model.path=someone/model"))
    assert (settings["base_model"], settings["revision"]) == ("someone/model", "abc123")


@pytest.mark.parametrize("name", ["a/b", "a:b", "it's", "", "models."])
def test_names_that_mlflow_refuses_are_refused_at_once(name, small_config):
    with pytest.raises(ValueError, match=r"mlflow\.registered_model"):
        small_config(f"mlflow.registered_model={name!r}")
