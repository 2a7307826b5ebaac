"""The package backend with workers that are not the packages: what goes wrong, deadlines, deaths."""

import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

from rewards import package, package_environment, package_worker, registry
from rewards.package import PackageFailed, PackageReward
from rewards.package_environment import EnvironmentMissing

IMAGES = torch.tensor([0.0, 0.5, 1.0])[:, None, None, None].expand(3, 3, 4, 6)
PROMPTS = ["one", "two", "three"]
BUILD = r"rewards\.package build hpsv2"

# What the real worker does, with models of ours; `prompts` say what is to happen.
FAKE = """
import importlib.util, os, sys, time
spec = importlib.util.spec_from_file_location("package_worker", sys.argv[1])
worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)
sys.argv = sys.argv[1:]

def make(files, device, threads):
    content = open(files["weights"]).read()
    if content == "slow":
        time.sleep(60)
    if content == "broken":
        raise KeyError("blip.mlp")
    def score(pictures, prompts):
        print("garbage" * 100)
        os.write(1, b"more garbage")
        if "sleep" in prompts:
            time.sleep(60)
        if "raise" in prompts:
            raise ValueError("no such prompt")
        if "die" in prompts:
            print("about to go", file=sys.stderr)
            os._exit(3)
        if "killed" in prompts:
            os.kill(os.getpid(), 9)
        if "pid" in prompts:
            return [float(os.getpid()), float(threads), float(pictures.shape[2])]
        scores = [float(picture.mean()) for picture in pictures]
        return scores[:-1] if "few" in prompts else [float("nan")] + scores[1:] if "nan" in prompts else scores
    return score

worker.MODELS["hpsv2"] = make
worker.main()
"""


@pytest.fixture
def make(tmp_path, monkeypatch):
    """make(script=FAKE, weights="", **options) -> a PackageReward whose environment's interpreter runs the script."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    rewards = []

    def maker(script: str = FAKE, weights: str = "", **options):
        (tmp_path / "fake.py").write_text(script)
        (tmp_path / "weights.pt").write_text(weights)
        for name in ("hpsv2", "imagereward"):
            python = package_environment.place(name) / "bin" / "python"
            python.parent.mkdir(parents=True, exist_ok=True)
            # -I and the worker's file are what a real interpreter would be given; -I is kept from the fake.
            python.write_text(f'#!/bin/sh\nshift\nexec {sys.executable} {tmp_path}/fake.py "$@"\n')
            python.chmod(0o755)
            shutil.copy(package_environment.lock(name), python.parents[1] / package_environment.MARKER)
        rewards.append(PackageReward("hpsv2", str(tmp_path / "weights.pt"), **options))
        return rewards[-1]

    yield maker
    for reward in rewards:
        reward.close()


def gone(pid: int, seconds: float = 10) -> bool:
    """Within that time; a zombie is."""
    end = time.monotonic() + seconds
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() >= end:
            return False
        time.sleep(0.02)
    return True


def test_scores_come_back_in_order_whatever_the_package_prints_and_its_process_ends_with_it(make):
    reward = make()
    assert reward.name == "hpsv2" and not reward.differentiable
    scores = reward(IMAGES, PROMPTS)
    assert scores.tolist() == [0, 128, 255] and scores.dtype == torch.float32
    many = torch.rand(40, 3, 64, 64)  # more than a socket holds
    torch.testing.assert_close(reward(many, ["x"] * 40), (many * 255).round().mean((1, 2, 3)))
    first, threads, width = reward(IMAGES, ["pid", "", ""]).tolist()
    assert reward(IMAGES, ["pid", "", ""])[0] == first  # one process, one load
    assert threads == torch.get_num_threads() and width == 6
    assert reward(IMAGES, ["nan", "", ""]).isnan().tolist() == [True, False, False]  # the scorer names its prompt
    reward.close()
    reward.close()
    assert gone(int(first), 0)
    forgotten = PackageReward("hpsv2", reward.assets[0].source)
    pid = int(forgotten(IMAGES, ["pid", "", ""])[0])
    assert not gone(pid, 0)
    del forgotten
    assert gone(pid, 0)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("raise", rf"raised ValueError: no such prompt; .*python -m {BUILD}.*last words: .*Traceback"),
        ("die", r"ended with status 3 .*about to go"),
        ("killed", r"ended with status -9 \(-9: out of memory\?\)"),
        ("sleep", r"did not answer within 1 s; .*reward\.options\.seconds"),
        ("few", r"2 scores for 3 images"),
        ("stopped", r"did not answer within 1 s"),
    ],
)
def test_what_goes_wrong_is_said_in_one_line_and_leaves_no_process(make, prompt, said):
    reward = make()
    pid = int(reward(IMAGES, ["pid", "", ""])[0])
    images, reward.seconds = IMAGES, 1 if "within" in said else 20
    if prompt == "stopped":  # so that not even the request can be written
        os.kill(pid, signal.SIGSTOP)
        images = torch.zeros(3, 3, 512, 512)
    with pytest.raises(PackageFailed, match=said) as caught:
        reward(images, ["", prompt, ""])
    assert len(str(caught.value).splitlines()) == 1
    assert gone(pid, 0)
    reward.seconds = 20
    assert reward(IMAGES, PROMPTS).tolist() == [0, 128, 255]  # another process


# Begins with an end of the socket.
OTHER = """
import socket, sys, time
connection = socket.socket(fileno=int(sys.argv[2]))
send = connection.sendall
{}
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (["print('hello')"], "ended with status 0 .*last words: hello"),
        (["import nothing_of_that_name"], "ended with status 1 .*nothing_of_that_name"),
        ([OTHER.format("connection.close()")], "sent no answer"),
        ([OTHER.format("send(b'garbage\\n')")], "sent no answer"),
        ([OTHER.format("send(b'{')")], "did not answer within"),
        ([FAKE, "slow"], r"within 0\.5 s; .*reward\.options\.seconds"),
        ([FAKE, "broken"], r"raised KeyError: 'blip\.mlp'"),
    ],
)
def test_a_worker_that_is_another_or_whose_model_does_not_load_is_said(make, monkeypatch, script, said):
    monkeypatch.setattr(package, "SECONDS_TO_END", 0.3)
    with pytest.raises(PackageFailed, match=said):
        make(*script, seconds=0.5 if "within" in said else 20)(IMAGES, PROMPTS)


PARENTS = """
import os, sys, time, torch, types
from rewards.package import PackageReward
from rewards.weights import Asset
model = types.SimpleNamespace(assets=lambda weights: [Asset("reward.weights", weights, ())])
for module in ("rewards.hpsv2", "rewards.imagereward"):  # which import transformers
    sys.modules[module] = types.SimpleNamespace(HPSv2=model, ImageReward=model)
images = torch.zeros(3, 3, 4, 4)
for case in ("idle", "busy", "forked"):
    if os.fork() == 0:
        reward = PackageReward("hpsv2", sys.argv[1])
        worker = int(reward(images, ["pid", "", ""])[0])
        if case == "forked" and os.fork() == 0:  # it holds the other end of the socket
            reward.close()  # and has no say
            time.sleep(20)
            os._exit(0)
        os.write(1, f"{os.getpid()} {worker}\\n".encode())
        if case == "busy":
            reward(images, ["sleep", "", ""])
        time.sleep(60)
for _ in range(3):
    os.wait()
"""


def test_the_worker_ends_when_its_parent_is_killed(make):
    command = [sys.executable, "-c", PARENTS, make().assets[0].source]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as launcher:
        pairs = [[int(pid) for pid in launcher.stdout.readline().split()] for _ in range(3)]
        time.sleep(0.2)
        assert not any(gone(worker, 0) for _, worker in pairs)
        for parent, _ in pairs:
            os.kill(parent, signal.SIGKILL)
        assert all(gone(worker) for _, worker in pairs)
        launcher.kill()


def test_wrong_settings_are_refused_before_anything_starts(make, tmp_path, monkeypatch):
    make()
    for name, weights, options, said in [
        ("aesthetic", None, {}, r"reward\.backend: aesthetic has no package; there are hpsv2, imagereward"),
        ("hpsv2", None, {"version": "v3"}, r"reward\.options\.version: 'v3', expected v2\.0 or v2\.1"),
        ("imagereward", None, {"version": "v2.1"}, r"reward\.options: imagereward: .*'version'"),
        ("hpsv2", "/no/such.pt", {}, r"reward\.weights: no such file or folder: /no/such\.pt"),
        ("imagereward", None, {"med_config": "./no.json"}, r"reward\.options\.med_config: no such file"),
        ("hpsv2", None, {"colour": 3}, r"reward\.options: hpsv2: .*'colour'"),
    ]:
        with pytest.raises(ValueError, match=said):
            registry.check(name, weights, options, PROMPTS, backend="package")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(EnvironmentMissing, match=f"no environment for hpsv2 in .*cache.*{BUILD}"):
        PackageReward("hpsv2")
    with pytest.raises(ValueError, match="seconds"):  # an option of the package backend alone
        registry.check("hpsv2", None, {"seconds": 3}, PROMPTS)


def test_the_backend_is_a_setting_and_files_come_from_a_folder_or_the_hub(make, tmp_path, monkeypatch):
    make()
    (tmp_path / "HPS_v2_compressed.pt").write_text("")
    cached = {("someone/copy", "other.pt"): str(tmp_path / "weights.pt")}
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *place: cached.get(place))
    for weights, version in ((str(tmp_path), {"version": "v2.0"}), ("someone/copy:other.pt", {})):
        registry.check("hpsv2", weights, version, PROMPTS, backend="package")
        reward = registry.load("hpsv2", weights, backend="package", **version)
        assert isinstance(reward, PackageReward) and reward(IMAGES, PROMPTS).tolist() == [0, 128, 255]
        reward.close()
    with pytest.raises(ValueError, match=r"hf download xswu/HPSv2 HPS_v2\.1_compressed\.pt.*set reward\.weights="):
        PackageReward("hpsv2")(IMAGES, PROMPTS)
    with pytest.raises(ValueError, match=r"residual_nabla_db learns from the gradient .* not differentiable"):
        registry.check("hpsv2", weights, {}, PROMPTS, "residual_nabla_db", "package")


def test_the_worker_imports_nothing_of_ours_and_no_package_by_itself():
    code = f"import runpy, sys; runpy.run_path({package_worker.__file__!r}); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-I", "-c", code], check=True, capture_output=True, text=True, timeout=60)
    assert not {"torch", "numpy", "rewards"} & set(done.stdout.split())
