"""A Ray head as a user would start it, in processes and a folder of its own."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest


def free_port() -> int:
    """Outside the range that Ray gives its workers."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        if not 10002 <= port <= 19999:
            return port


@dataclass(frozen=True)
class Head:
    """A Ray head of the test's own."""

    dashboard: str  # http://...
    address: str  # for RAY_ADDRESS
    environment: dict[str, str]  # that knows its token
    folder: Path


@pytest.fixture(params=["token"])
def head(request, tmp_path):
    """With token authentication, or as the test's parameter says: disabled."""
    folder = Path(tempfile.mkdtemp(prefix="tr-", dir="/tmp"))
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_") and name != "PYTHONPATH"}
    environment = kept | {
        "RAY_AUTH_MODE": request.param, "RAY_AUTH_TOKEN_PATH": str(token), "HOME": str(tmp_path / "home"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    dashboard, port = free_port(), free_port()
    log = (tmp_path / "head.log").open("w")
    process = subprocess.Popen(
        ["ray", "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}",
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
    yield Head(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{port}", environment, folder)
    process.send_signal(signal.SIGTERM)
    process.wait(30)
    shutil.rmtree(folder, ignore_errors=True)
