"""`ray job submit --working-dir . -- python -m learner.run` on a head with token authentication, and nothing else."""

import contextlib
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml
from ray_processes import wait_for

from learner.config import DEFAULT_CONFIG, ROOT
from records.run_folder import Records
from records.storage import Storage

pytestmark = [pytest.mark.ray, pytest.mark.long]

# The demo, small enough for a test. The job runs it without arguments.
SMALLER = {
    "train": {"epochs": 1, "trajectories": 32, "updates_per_epoch": 1},
    "sampler": {"actors": 1},
    "learner": {"ranks": 1},
    "evaluation": {"images": 16},
    "mlflow": {"enabled": False},
}


@pytest.fixture
def working_dir(tmp_path) -> Path:
    """A checkout as a user would have it, its default preset made smaller."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    subprocess.run(f"git ls-files -z | xargs -0 cp --parents -t {folder}", shell=True, cwd=ROOT, check=True)
    preset = folder / DEFAULT_CONFIG.relative_to(ROOT)
    tree = yaml.safe_load(preset.read_text())
    for section, settings in SMALLER.items():
        tree.setdefault(section, {}).update(settings)
    preset.write_text(yaml.safe_dump(tree))
    return folder


@pytest.fixture
def job(head, working_dir):
    """`ray job VERB ...`: what it says."""

    def call(verb: str, *arguments: str) -> str:
        command = ["ray", "job", verb, "--address", head.dashboard, *arguments]
        done = subprocess.run(
            command, cwd=working_dir, env=head.environment, capture_output=True, text=True, timeout=300
        )
        return done.stdout + done.stderr

    return call


RUN = ("--working-dir", ".", "--", "python", "-m", "learner.run")


def test_a_bare_submission_runs_and_its_results_are_where_the_log_says(job, tmp_path):
    said = job("submit", *RUN)
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
    for setting, complaint in (("train.epoch=3", "did you mean train.epochs"), ("learner.gpus=1", "the cluster has 0")):
        said = job("submit", *RUN, setting)
        assert "failed" in said and complaint in said and "Traceback" not in said


LEFT = """
import ray
from ray.util import placement_group_table
from ray.util.state import list_actors
ray.init(log_to_driver=False)
actors = [actor.class_name for actor in list_actors(filters=[("state", "!=", "DEAD")], timeout=20)]
groups = [group for group in placement_group_table().values() if group["state"] != "REMOVED"]
print("LEFT", len(groups), sorted(actors))
"""


def ours(head) -> list[str]:
    """Command lines of the job's own processes: driver, actors, MLflow's mirror."""
    lines = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, KeyError):
            line, home = " ".join(process.cmdline()), process.environ().get("HOME")
            if re.search(r"learner\.|ray::\w+Actor", line) and home == head.environment["HOME"]:
                lines.append(line)
    return lines


def left(head) -> str:
    """Placement groups and actors of the cluster."""
    done = subprocess.run(
        [sys.executable, "-c", LEFT], env=head.environment | {"RAY_ADDRESS": head.address}, capture_output=True,
        text=True, timeout=60,
    )  # fmt: skip
    return next((line for line in done.stdout.splitlines() if line.startswith("LEFT")), done.stderr[-2000:])


@pytest.mark.slow
def test_a_stopped_job_leaves_nothing_on_the_cluster(head, job, tmp_path):
    """`ray job stop` sends SIGTERM to the driver and all its children, and kills them 3 s later."""
    run = tmp_path / "run"
    settings = ("train.epochs=50", "mlflow.enabled=true", f"run.dir={run}")
    job("submit", "--no-wait", "--submission-id", "ours", *RUN, *settings)
    wait_for((run / "checkpoints/step-000001/state.json").exists, 240, lambda: job("logs", "ours")[-3000:])
    assert len(ours(head)) >= 5 and "SamplerActor" in left(head)
    said = job("stop", "ours")
    wait_for(lambda: not ours(head), 10, lambda: str(ours(head)))
    assert "stopped" in said.lower(), said
    assert left(head) == "LEFT 0 []"
    log = job("logs", "ours")
    assert f"interrupted; the same command goes on from what is done in {run}" in log and "Traceback" not in log
