"""The model that MLflow serves draws plain diffusers' pixels, from safetensors and code of ours alone."""

import base64
import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import mlflow.pyfunc
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline
from mlflow.exceptions import MlflowException
from PIL import Image

from diffusion import lora
from diffusion.base_model import BaseModel
from learner.config import load_config
from reports import mlflow_registry

BASE = "models/shapes"
RANK, ALPHA = 4, 12.0
STEPS, GUIDANCE, ETA = 6, 2.5, 0.7
PROMPTS = ("a red circle on a white background", "a small blue star on a black background")
DEADLINE = 300


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    """The folder of a LoRA with alpha != rank that changes pictures."""
    folder = tmp_path_factory.mktemp("adapter")
    model = BaseModel(BASE)
    model.attach_lora(RANK, ALPHA, seed=0)
    flat = lora.snapshot(model.unet, 0).flat
    noise = np.random.default_rng(0).standard_normal(flat.shape)
    lora.load(model.unet, (flat + 0.05 * noise).astype(np.float32))
    lora.save_files(model.unet, folder)
    return folder


def save(adapter: Path, place: Path, *overrides: str) -> Path:
    """A model's folder, as it is sent to MLflow."""
    config = load_config(overrides=[f"sampler.steps={STEPS}", f"sampler.guidance={GUIDANCE}", *overrides])
    logged = SimpleNamespace(artifact_location="nowhere", model_id="m-0")
    content = (adapter / lora.DIFFUSERS_FILE).read_bytes()
    mlflow_registry._save(place, content, mlflow_registry.serving_settings(config), logged, "0")  # type: ignore[arg-type]
    return place


@pytest.fixture(scope="module")
def folder(adapter, tmp_path_factory) -> Path:
    return save(adapter, tmp_path_factory.mktemp("model") / "model", f"sampler.eta={ETA}")


@pytest.fixture(scope="module")
def served(folder):
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
        return mlflow.pyfunc.load_model(str(folder))


def pixels(answer: dict) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["image"], validate=True))))


def plain(pipeline, prompt: str, seed: int, steps=STEPS, guidance=GUIDANCE, eta=ETA) -> np.ndarray:
    noise = torch.Generator("cpu").manual_seed(seed)
    drawn = pipeline(prompt, num_inference_steps=steps, guidance_scale=guidance, eta=eta, generator=noise)
    return np.asarray(drawn.images[0])


@pytest.fixture(scope="module")
def pipelines(adapter):
    """Plain diffusers, with the LoRA and without."""
    found = []
    for with_lora in (True, False):
        pipeline = StableDiffusionPipeline.from_pretrained(BASE)
        assert isinstance(pipeline.scheduler, DDIMScheduler)
        if with_lora:
            pipeline.load_lora_weights(adapter, weight_name=lora.DIFFUSERS_FILE)
        found.append(pipeline)
    return found


def test_pictures_are_those_of_plain_diffusers(served, pipelines):
    answers = served.predict([{"prompt": prompt, "seed": 7 + i} for i, prompt in enumerate(PROMPTS)])
    assert [answer["seed"] for answer in answers] == [7, 8]
    for answer, prompt in zip(answers, PROMPTS, strict=True):
        expected, base = (plain(pipeline, prompt, answer["seed"]) for pipeline in pipelines)
        assert np.array_equal(pixels(answer), expected)
        moved = np.abs(expected.astype(float) - base).mean()
        print(f"{prompt}: the LoRA moves pixels by {moved:.1f} of 255 on average")
        assert moved > 2


def test_params_replace_the_runs_own(served, pipelines):
    (answer,) = served.predict([{"prompt": PROMPTS[0]}], {"steps": 4, "guidance": 1.0, "eta": 0.0, "seed": 3})
    assert np.array_equal(pixels(answer), plain(pipelines[0], PROMPTS[0], 3, 4, 1.0, 0.0))


def test_a_picture_depends_on_its_own_row_alone(served):
    together = served.predict([{"prompt": prompt} for prompt in PROMPTS], {"seed": 5})
    assert [answer["seed"] for answer in together] == [5, 6]
    (alone,) = served.predict([{"prompt": PROMPTS[1], "seed": 6}])
    assert alone == together[1] and alone != together[0]


@pytest.mark.parametrize(
    "row, params",
    [
        ({"prompt": "x"}, {"steps": 0}),
        ({"prompt": "x"}, {"steps": 1001}),
        ({"prompt": "x"}, {"guidance": -1.0}),
        ({"prompt": "x"}, {"eta": -0.1}),
        ({"prompt": "x", "seed": -1}, None),
        ({"prompt": 5}, None),
        ({"text": "x"}, None),
        ({"prompt": "x"}, {"steps": "many"}),
    ],
)
def test_a_bad_request_is_said_to_be_one(served, row, params):
    with pytest.raises(MlflowException) as caught:
        served.predict([row], params)
    assert caught.value.error_code == "INVALID_PARAMETER_VALUE"


def test_a_solver_that_the_run_sampled_with_is_the_servers(adapter, tmp_path, pipelines):
    served = mlflow.pyfunc.load_model(str(save(adapter, tmp_path / "model", "sampler.grid=dpm_solver")))
    (answer,) = served.predict([{"prompt": PROMPTS[0], "seed": 2}])
    pipeline = StableDiffusionPipeline(**pipelines[0].components, requires_safety_checker=False)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler.config, algorithm_type="sde-dpmsolver++", solver_order=1, final_sigmas_type="sigma_min"
    )
    assert np.array_equal(pixels(answer), plain(pipeline, PROMPTS[0], 2))


def test_the_base_model_may_be_elsewhere(adapter, tmp_path, monkeypatch):
    place = save(adapter, tmp_path / "model")
    about = place / "MLmodel"
    about.write_text(about.read_text().replace(str(Path(BASE).absolute()), "/nowhere"))
    with pytest.raises(MlflowException, match="MLFLOW_PYFUNC_INFERENCE_CONFIG"):
        mlflow.pyfunc.load_model(str(place))
    assert mlflow.pyfunc.load_model(str(place), model_config={"base_model": BASE})
    monkeypatch.setenv("MLFLOW_PYFUNC_INFERENCE_CONFIG", json.dumps({"base_model": BASE}))
    served = mlflow.pyfunc.load_model(str(place))
    assert pixels(served.predict([{"prompt": "x"}])[0]).shape == (64, 64, 3)


def test_there_is_no_pickle_and_no_code_but_ours(adapter, tmp_path):
    folder = save(adapter, tmp_path / "model")  # one that was never loaded: Python leaves its bytecode in those
    files = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert files == {
        "MLmodel", "artifacts/adapter_weights/pytorch_lora_weights.safetensors", "conda.yaml", "python_env.yaml",
        "requirements.txt", "serving.py",
    }  # fmt: skip
    assert (folder / "serving.py").read_bytes() == Path("reports/mlflow_serving.py").read_bytes()
    code = "import sys, runpy; sys.path[:] = [p for p in sys.path if p]; runpy.run_path(sys.argv[1]); "
    code += "print([m for m in sys.modules if m.split('.')[0] in ('learner', 'diffusion', 'rewards', 'models')])"
    alone = [sys.executable, "-P", "-c", code, str(folder / "serving.py")]
    done = subprocess.run(alone, capture_output=True, text=True, timeout=DEADLINE, cwd="/", check=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.slow
def test_a_real_request(folder, served, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # as in an active environment: MLflow calls uvicorn
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", "local", "-m", str(folder)]
    with (tmp_path / "server.log").open("w") as log:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"],
            stdout=log, stderr=log, start_new_session=True,
            env={**os.environ, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false", "PATH": path},
        )  # fmt: skip
    try:
        wait_for(port, server, tmp_path / "server.log")
        rows = [{"prompt": prompt, "seed": 7 + i} for i, prompt in enumerate(PROMPTS)]
        status, answer = post(port, {"dataframe_records": rows, "params": {"steps": 4}})
        assert status == 200
        assert answer["predictions"] == served.predict(rows, {"steps": 4})
        assert pixels(answer["predictions"][0]).shape == (64, 64, 3)
        status, answer = post(port, {"dataframe_records": rows, "params": {"steps": 0}})
        assert status == 400 and "steps must be in 1..1000" in answer["message"]
    finally:
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself, which the test has said
            os.killpg(server.pid, signal.SIGKILL)
        server.wait(30)


def wait_for(port: int, server: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + DEADLINE
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5).close()
            return
        except OSError:
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.5)


def post(port: int, body: dict) -> tuple[int, dict]:
    """Status and answer."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=DEADLINE) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())
