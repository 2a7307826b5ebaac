"""slurm.sh and the commands of skypilot.yaml for real: two raylets on this machine, fakes of srun and scontrol."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import ray_processes
import yaml

from learner.config import ROOT

DEPLOY = ROOT / "cluster" / "deploy"

SRUN = """#!/usr/bin/env bash
# The command once a task, on this machine; a signal goes on to all of them.
echo "$*" >> "$FAKES/srun.log"
tasks=1
while [[ $1 == --* ]]; do
  case $1 in --ntasks=*) tasks=${1#*=} ;; esac
  shift
done
export SLURM_CPUS_ON_NODE=1
pids=()
for ((i = 0; i < tasks; i++)); do "$@" & pids+=($!); done
trap 'kill -TERM "${pids[@]}"' TERM
wait "${pids[@]}"; status=$?
while kill -0 "${pids[@]}" 2> /dev/null; do wait "${pids[@]}"; done
exit $status
"""
SCONTROL = """#!/usr/bin/env bash
echo "$*" >> "$FAKES/scontrol.log"
[[ $1 != show ]] || printf 'alpha\\nbeta\\n'
"""
# What the job sees; then a raylet that stops answering, as one that is cut off.
JOB = """
import json, os, subprocess, sys, time
import psutil, ray

ray.init(log_to_driver=False)
seen = {"roles": sorted(node["Labels"]["tributary.role"] for node in ray.nodes() if node["Alive"])}
probe = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", os.environ["RAY_ADDRESS"]]
stranger = os.environ | {"RAY_AUTH_TOKEN_PATH": os.environ["STRANGER"]}
stranger.pop("RAY_AUTH_TOKEN", None)
seen["ours"] = subprocess.run(probe, capture_output=True).returncode
seen["strangers"] = subprocess.run(probe, capture_output=True, env=stranger).returncode
[raylet] = [p for p in psutil.process_iter() if p.name() == "raylet" and os.environ["FOLDER"] in str(p.cmdline())
            and '"sampler"' in str(p.cmdline())]
raylet.suspend()
start = time.monotonic()
while sum(node["Alive"] for node in ray.nodes()) > 1 and time.monotonic() < start + 60:
    time.sleep(0.1)
seen["noticed"] = time.monotonic() - start
raylet.kill()
json.dump(seen, open(os.environ["SEEN"], "w"))
sys.exit(7)
"""


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    """Fakes on PATH, and a home."""
    for name, script in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "job.py").write_text(JOB)
    (tmp_path / "stranger").write_text("0" * 64)
    home = tmp_path / "home"
    home.mkdir()
    (home / "venv").symlink_to(sys.prefix)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "SLURM_"))}
    return kept | {
        "HOME": str(home), "FAKES": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "STRANGER": str(tmp_path / "stranger"), "SEEN": str(tmp_path / "seen.json"), "PYTHONPATH": str(ROOT),
    }  # fmt: skip


@pytest.fixture
def slurm(environment, tmp_path):
    """The batch script as SLURM runs it: begin(nodes, *arguments) -> (process, Ray's folder)."""
    begun = []

    def begin(nodes: int, *arguments: str, **changed: str):
        job = str(random.randrange(100, 1000) + os.getpid() * 1000)
        slurm = {
            "SLURM_JOB_ID": job, "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": str(nodes),
            "SLURM_SUBMIT_DIR": str(ROOT), "TRIBUTARY_VENV": sys.prefix, "TRIBUTARY_HEAD_IP": "127.0.0.1",
            "TRIBUTARY_READY_SECONDS": "90", "FOLDER": f"/tmp/ray-{job}",
        }  # fmt: skip
        log = (tmp_path / "job.log").open("a")
        process = subprocess.Popen(
            [DEPLOY / "slurm.sh", *arguments], env=environment | slurm | changed, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
        begun.append((process, slurm["FOLDER"]))
        return process, slurm["FOLDER"]

    yield begin
    for process, rays in begun:  # what a script that failed its test has left
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        for left in ray_processes.processes(rays):
            left.kill()
        shutil.rmtree(rays, ignore_errors=True)


@pytest.fixture
def token(tmp_path) -> Path:
    """The user's own."""
    file = tmp_path / "home/.ray/auth_token"
    file.parent.mkdir()
    file.touch(0o600)
    file.write_text("1" * 64)
    return file


def said(folder: Path) -> str:
    return (folder / "job.log").read_text()


def seen_by_the_job(folder: Path) -> dict:
    seen = json.loads((folder / "seen.json").read_text())
    assert seen["roles"] == ["learner", "sampler"] and seen["ours"] == 0 and seen["strangers"] != 0
    return seen


@pytest.mark.ray
@pytest.mark.slow
def test_a_slurm_job_has_its_nodes_its_token_and_a_clean_end(slurm, tmp_path):
    process, rays = slurm(2, "--", sys.executable, str(tmp_path / "job.py"))
    assert process.wait(200) == 7, said(tmp_path)[-3000:]  # the command's own
    seen = seen_by_the_job(tmp_path)
    assert seen["noticed"] < 15  # 5.4 s when idle; without the health-check settings over 60
    token = tmp_path / "home/.ray/auth_token"
    assert token.stat().st_mode & 0o777 == 0o600 and len(token.read_text()) == 64
    assert [file.name for file in token.parent.iterdir()] == ["auth_token"]
    assert token.read_text() not in said(tmp_path)
    steps = (tmp_path / "srun.log").read_text()
    assert "--nodelist=alpha" in steps and "--exclude=alpha" in steps and token.read_text() not in steps
    assert ray_processes.all_gone(rays) and not Path(rays).exists()


@pytest.mark.ray
@pytest.mark.slow
def test_a_slurm_job_near_its_time_limit_is_queued_again(slurm, tmp_path, token):
    process, rays = slurm(1, "--", "bash", "-c", "touch $FAKES/running; exec sleep 300")
    ray_processes.wait_for((tmp_path / "running").exists, 120, lambda: said(tmp_path)[-3000:])
    process.send_signal(signal.SIGUSR1)
    process.wait(60)
    asked = (tmp_path / "scontrol.log").read_text().splitlines()
    assert asked[-1] == f"requeue {rays.removeprefix('/tmp/ray-')}"
    assert token.read_text() == "1" * 64
    assert ray_processes.all_gone(rays) and not Path(rays).exists()


def test_a_slurm_job_refuses_a_token_that_others_can_read(slurm, tmp_path, token):
    token.chmod(0o640)
    process, _ = slurm(1, "--", "true")
    assert process.wait(30) == 1
    assert f"others can read the token: chmod 600 {token}" in said(tmp_path) and "1" * 64 not in said(tmp_path)
    assert not (tmp_path / "srun.log").exists()


def test_a_slurm_head_that_others_cannot_reach_is_refused(slurm, tmp_path):
    (tmp_path / "hostname").write_text("#!/bin/sh\necho 127.0.1.1 ::1\n")
    (tmp_path / "hostname").chmod(0o755)
    process, _ = slurm(2, "--", "true", TRIBUTARY_HEAD_IP="")
    assert process.wait(30) == 1
    assert "the name alpha is no address that other nodes reach: set TRIBUTARY_HEAD_IP" in said(tmp_path)


@pytest.mark.ray
@pytest.mark.slow
def test_nodes_that_do_not_come_end_the_job_within_the_deadline(slurm, tmp_path):
    missing = SRUN.replace("export SLURM", "[[ $* != *sampler* ]] || exec sleep 300\nexport SLURM")
    (tmp_path / "srun").write_text(missing)
    process, rays = slurm(2, "--", "true", TRIBUTARY_READY_SECONDS="25")
    assert process.wait(120) == 1
    assert "1 of 2 nodes joined" in said(tmp_path)
    assert ray_processes.all_gone(rays) and not Path(rays).exists()


@pytest.mark.ray
@pytest.mark.slow
def test_skypilots_nodes_find_each_other_and_end_with_the_head(environment, tmp_path):
    script = yaml.safe_load((DEPLOY / "skypilot.yaml").read_text())["run"]
    rays, port = tempfile.mkdtemp(prefix="tr-", dir="/tmp"), str(random.randrange(20000, 30000))
    command = next(line for line in script.splitlines() if line.startswith("python -m learner.run"))
    script = script.replace("6379", port).replace("/tmp/tributary", rays).replace("python -m learner.run", "true")
    script = script.replace(command.replace("python -m learner.run", "true"), f"python {tmp_path}/job.py")
    sky = {"SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.1", "SKYPILOT_NUM_NODES": "2"}
    sky |= {"RAY_AUTH_TOKEN": "2" * 64, "FOLDER": rays}
    with (tmp_path / "job.log").open("w") as log:
        head, other = (
            subprocess.Popen(
                ["bash", "-c", script], cwd=ROOT, env=environment | sky | {"SKYPILOT_NODE_RANK": rank},
                stdout=log, stderr=log, start_new_session=True,
            )
            for rank in "01"
        )  # fmt: skip
        try:
            assert head.wait(200) == 7, said(tmp_path)[-3000:]
            assert other.wait(120) == 0
        finally:
            for process in (head, other):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
    seen_by_the_job(tmp_path)
    assert "2" * 64 not in said(tmp_path)
    assert ray_processes.all_gone(rays)
    shutil.rmtree(rays, ignore_errors=True)
