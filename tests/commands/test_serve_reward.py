"""`python -m rewards.serve` as a user starts it: what it refuses, how it ends, packages in their own environments."""

import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from served import ask, command, raw, soon, until

from commands import serve
from rewards import package_environment, package_worker, tokens

PICTURES, PROMPTS = np.random.default_rng(0).integers(0, 256, (4, 20, 28, 3), np.uint8), ["one", "two", "three", "four"]


@pytest.mark.long
def test_a_signal_in_mid_request_ends_it_after_the_answer(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import time\ndef judge(images, prompts):\n    open('begun', 'w').close()\n    time.sleep(2)\n"
        "    return images.mean((1, 2, 3))\n"
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        with command("mine:judge", "--port", "0", cwd=tmp_path) as server:
            url = until(server, "http://").split()[2].rstrip(",")
            until(server, "ready")
            answers = []
            asking = threading.Thread(target=lambda: answers.append(ask(url, raw(PICTURES, PROMPTS))))  # noqa: B023
            asking.start()
            soon((tmp_path / "begun").exists)
            server.send_signal(number)
            asking.join(60)
            assert server.wait(60) == 128 + number
            assert "judge: ends; 1 requests answered\n" in server.stderr.read()
            assert answers[0][0] == 200 and len(answers[0][1]["scores"]) == 4
            (tmp_path / "begun").unlink()


def test_bad_arguments_are_one_line_and_nothing_is_served(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(tokens.VARIABLE, raising=False)
    (tmp_path / "empty").write_text(" \n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for arguments, said in [
            (["brigthness"], "unknown reward"),
            (["my_reward.py"], "which function in it?"),
            (["no_module:judge"], "cannot import"),
            (["aesthetic", "--weights", "/no/such.pt"], "no such file"),
            (["jpeg_compressibility", "--weights", "x"], "takes none"),
            (["jpeg_compressibility", "--option", "quality"], "expected key=value"),
            (["jpeg_compressibility", "--option", "colour=3"], "colour"),
            (["jpeg_compressibility", "--batch", "0"], "--batch: 0"),
            (["jpeg_compressibility", "--port", port], f"cannot listen on 127.0.0.1, port {port}: "),
            (["jpeg_compressibility", "--port", "99999"], "port 99999"),
            (["jpeg_compressibility", "--host", "no.such.host.invalid"], "cannot listen on no.such"),
            (["jpeg_compressibility", "--host", "0.0.0.0", "--port", "0"], "others reach 0.0.0.0: give a token"),
            (["jpeg_compressibility", "--token-file", str(tmp_path / "none")], "--token-file: "),
            (["jpeg_compressibility", "--token-file", str(tmp_path / "empty")], "holds no token"),
            (["jpeg_compressibility", "--package"], "--package: jpeg_compressibility has none"),
            (["hpsv2", "--package"], "python -m rewards.package build hpsv2"),
        ]:
            assert serve.main(["--port", "0", *arguments]) == 2, arguments
            lines = capsys.readouterr().err.splitlines()
            assert len(lines) == 1 and lines[0].startswith("rewards.serve: ") and said in lines[0], lines
    monkeypatch.setenv(tokens.VARIABLE, "two words")
    assert serve.main(["jpeg_compressibility"]) == 2 and "holds no token" in capsys.readouterr().err


def test_a_token_lets_others_in_and_this_machine_needs_none():
    with pytest.raises(ValueError, match=r"others reach 0\.0\.0\.0: give a token"):
        serve.listen("0.0.0.0", 0, None)
    with serve.listen("0.0.0.0", 0, "of-file") as listener:
        assert listener.getsockname()[1]
    with serve.listen("::1", 0, None) as listener:
        assert listener.family == socket.AF_INET6


# What the real worker does, with a model of ours. Run with -I, as in a package's environment: nothing of the project
# can be imported.
FAKE = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("package_worker", sys.argv[1])
worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)
sys.argv = sys.argv[1:]

def make(files, device):
    weights = open(files["weights"]).read()
    if weights == "broken":
        raise KeyError("blip.mlp")
    import torch
    def score(pictures, prompts):
        assert "learner" not in sys.modules and "commands" not in sys.modules
        if "raise" in prompts:
            raise IndexError("index out of range in self")
        if "memory" in prompts:
            raise torch.OutOfMemoryError("no more")
        return [float(picture.mean()) for picture in pictures][: -1 if "few" in prompts else None]
    return score

worker.MODELS["hpsv2"] = make
worker.main()
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """package(weights) -> the server of a made-up hpsv2, in an environment whose interpreter is this one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    python = package_environment.place("hpsv2") / "bin" / "python"
    python.parent.mkdir(parents=True)
    (tmp_path / "fake.py").write_text(FAKE)
    python.write_text(f'#!/bin/sh\ntest "$1" = -I && shift && exec {sys.executable} -I {tmp_path}/fake.py "$@"\n')
    python.chmod(0o755)
    (python.parents[1] / package_environment.MARKER).write_bytes(package_environment.lock("hpsv2").read_bytes())

    def maker(weights: str) -> subprocess.Popen:
        (tmp_path / "weights.pt").write_text(weights)
        line = ["hpsv2", "--package", "--weights", str(tmp_path / "weights.pt"), "--port", "0", "--batch", "2"]
        return command(*line, cwd=tmp_path, TRIBUTARY_REWARD_TOKEN="secret")

    return maker


@pytest.mark.long
def test_a_package_is_served_in_its_own_environment_by_the_same_protocol(package):
    with package("") as server:
        url = until(server, "http://").split()[2].rstrip(",")
        until(server, "ready")
        said = {"reward": "hpsv2", "range": None, "batch": 2, "metadata": False, "protocol": 1}
        assert ask(url, None, "secret", "health") == (200, said) and ask(url, None, "other", "health")[0] == 401
        means = [float(picture.mean()) for picture in PICTURES]
        assert ask(url, raw(PICTURES, PROMPTS), "secret") == (200, {"scores": means})
        for prompt, status, error in [
            ("raise", 422, "IndexError: index out of range in self"),
            ("few", 422, "0 scores for 1 pictures"),
            ("memory", 500, "OutOfMemoryError: no more"),
        ]:
            assert ask(url, raw(PICTURES[:1], [prompt]), "secret") == (status, {"error": error})
        assert Path(f"/proc/{server.pid}/cmdline").read_bytes().count(b"secret") == 0
        server.terminate()
        assert server.wait(60) == 128 + signal.SIGTERM
        assert "hpsv2: ends; 6 requests answered\n" in server.stderr.read()


@pytest.mark.long
def test_a_package_whose_model_does_not_load_is_one_line(package):
    with package("broken") as server:
        said = server.communicate(timeout=60)[1].splitlines()
        assert server.returncode == 2 and said[-1] == "rewards.serve: hpsv2: KeyError: 'blip.mlp'", said


def test_the_worker_imports_nothing_of_ours_and_no_package_by_itself():
    code = f"import runpy, sys; runpy.run_path({package_worker.__file__!r}); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-I", "-c", code], check=True, capture_output=True, text=True, timeout=60)
    assert not {"torch", "numpy", "rewards"} & set(done.stdout.split())
