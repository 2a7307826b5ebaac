"""`ray job submit --working-dir . -- python -m learner.run` on a head with token authentication, and nothing else."""

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml

from learner.config import DEFAULT_CONFIG, ROOT
from learner.records import Records
from learner.storage import Storage

# The demo, small enough for a test. The job runs it without arguments.
SMALLER = {
    "train": {"epochs": 1, "trajectories": 32, "updates_per_epoch": 1},
    "sampler": {"actors": 1},
    "learner": {"ranks": 1},
    "evaluation": {"images": 16},
    "mlflow": {"enabled": False},
}


def free_port() -> int:
    """Outside the range that Ray gives its workers."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        if not 10002 <= port <= 19999:
            return port


@pytest.fixture
def head(tmp_path):
    """A head of our own: (dashboard address, environment that knows the token)."""
    folder = Path(tempfile.mkdtemp(prefix="tr-", dir="/tmp"))
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_") and name != "PYTHONPATH"}
    environment = kept | {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "HOME": str(tmp_path / "home"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    dashboard = free_port()
    log = (tmp_path / "head.log").open("w")
    process = subprocess.Popen(
        ["ray", "start", "--head", "--block", f"--port={free_port()}", f"--dashboard-port={dashboard}",
         f"--ray-client-server-port={free_port()}", f"--temp-dir={folder}", "--num-cpus=2", "--disable-usage-stats"],
        env=environment, stdout=log, stderr=log, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 90
    while True:
        try:
            socket.create_connection(("127.0.0.1", dashboard), 1).close()
            break
        except OSError:
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "head.log").read_text()[-2000:]
            time.sleep(0.3)
    yield f"http://127.0.0.1:{dashboard}", environment
    process.send_signal(signal.SIGTERM)
    process.wait(30)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def working_dir(tmp_path) -> Path:
    """A checkout as a user would have it, its default preset made smaller."""
    folder = tmp_path / "checkout"
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode()
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    preset = folder / DEFAULT_CONFIG.relative_to(ROOT)
    tree = yaml.safe_load(preset.read_text())
    for section, settings in SMALLER.items():
        tree.setdefault(section, {}).update(settings)
    preset.write_text(yaml.safe_dump(tree))
    return folder


def submit(head, working_dir, *command) -> str:
    address, environment = head
    done = subprocess.run(
        ["ray", "job", "submit", "--address", address, "--working-dir", ".", "--", *command],
        cwd=working_dir, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    return done.stdout + done.stderr


def test_a_bare_submission_runs_and_its_results_are_where_the_log_says(head, working_dir, tmp_path):
    said = submit(head, working_dir, "python", "-m", "learner.run")
    assert "succeeded" in said, said[-3000:]
    place = Path(re.search(r"run directory: (\S+)", said)[1])
    assert place.is_relative_to(tmp_path / "home/tributary/runs")  # the working directory goes with the job
    records = Records.open(Storage(str(place)))
    assert [line["epoch"] for line in records.lines] == [-1, 0] and records.about["finished"]
    assert records.about["environment"]["working_dir"].startswith("gcs://_ray_pkg_")
    for name in ("before.png", "after.png", "report.html", "trajectories/epoch-000000.parquet"):
        assert (place / name).stat().st_size > 0
    lora = Path(re.search(r"LoRA: (\S+)", said)[1])
    assert sorted(file.name for file in lora.iterdir()) == ["kohya.safetensors", "pytorch_lora_weights.safetensors"]
    # A bad setting is one message in the log, and the job fails.
    said = submit(head, working_dir, "python", "-m", "learner.run", "train.epoch=3", "learner.gpus=1")
    assert "failed" in said and "did you mean train.epochs" in said and "the cluster has 0" in said
    assert "Traceback" not in said
