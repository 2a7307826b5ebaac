"""Folders that go with their owner, and never anybody else's."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys

import psutil
import pytest
from ray_processes import wait_for

from cluster import temp_folders
from cluster.temp_folders import (
    BENEATH,
    MARKER,
    PREFIX,
    SOCKET_BYTES,
    VARIABLE,
    NoTemporaryFolder,
    TemporaryFolder,
    sweep,
)
from learner.run import main

OWNER = """
import os, subprocess, sys, time
from cluster.temp_folders import TemporaryFolder
folder = TemporaryFolder()
with folder.marking():
    worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(folder.path, worker.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr(temp_folders, "GRACE_SECONDS", 0.1)
    return tmp_path


@pytest.fixture
def owner():
    """Another process with a folder and a worker: (process, the folder's path, the worker's pid)."""
    process = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True)
    path, worker = process.stdout.readline().split()
    yield process, path, int(worker)
    process.kill()
    process.wait(10)
    if alive(int(worker)):
        os.kill(int(worker), signal.SIGKILL)


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_it_goes_with_all_in_it_and_those_who_work_for_it(base):
    folder = TemporaryFolder()
    (folder.path / "socket").write_text("")
    with folder.marking():
        worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    folder.remove()
    folder.remove()
    assert not alive(worker.pid) and bystander.poll() is None
    assert not os.listdir(base) and VARIABLE not in os.environ
    bystander.kill()
    bystander.wait(10)


def test_one_in_use_is_left_alone_and_that_of_a_killed_owner_swept(base, owner):
    process, path, worker = owner
    sweep()
    assert os.path.isdir(path) and alive(worker)
    process.kill()
    process.wait(10)
    mine = TemporaryFolder()
    wait_for(lambda: not alive(worker), 10)
    assert os.listdir(base) == [mine.path.name]
    mine.remove()


def test_what_only_has_our_name_stays(base):
    (base / "tributary-checkout").mkdir()
    (base / "tributary-notes.txt").write_text("mine")
    elsewhere = base / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / MARKER).write_text("1")
    (base / "tributary-link").symlink_to(elsewhere)
    sweep()
    assert sorted(os.listdir(base)) == ["elsewhere", "tributary-checkout", "tributary-link", "tributary-notes.txt"]
    assert (elsewhere / MARKER).exists()


@pytest.mark.parametrize(
    ("place", "said"),
    [
        (
            "x" * 80,
            "RAY_TMPDIR: .*bytes too long for the sockets that Ray keeps there .at most 22.: name a shorter one",
        ),
        ("nowhere", "/nowhere is no folder: .*set RAY_TMPDIR"),
    ],
)
def test_a_place_where_ray_could_not_make_its_sockets_is_said_by_a_plan_and_a_run(
    place, said, small_settings, tmp_path, monkeypatch, capsys
):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if place != "nowhere":
        (tmp_path / place).mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / place))
    for plan in ([], ["--plan"]):
        assert main([*small_settings, f"run.dir={tmp_path / 'run'}", *plan]) == 2
        line = capsys.readouterr().err.strip()
        assert re.match(f"learner.run: {said}", line.replace(str(tmp_path), "")), line
        assert "\n" not in line and not (tmp_path / "run").exists()
    if place == "nowhere":
        with pytest.raises(NoTemporaryFolder, match="No such file or directory; set RAY_TMPDIR"):
            TemporaryFolder()


def test_rays_longest_socket_fits_where_it_is_said_to():
    """The names as this Ray makes them; the driver's number may have seven digits."""
    session = "session_2026-11-29_00-14-56_123456_1234567"
    path = f"{'x' * (SOCKET_BYTES - BENEATH)}/{PREFIX}12345678/r/{session}/sockets/plasma_store"
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as opened:
        for place, said in ((f"/{path}", "No such file"), (f"//{path}", "AF_UNIX path too long")):
            with pytest.raises(OSError, match=said):
                opened.bind(place[1:])
