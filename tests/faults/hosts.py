"""Several hosts on one machine: network namespaces with their own addresses, a raylet in each, a cable that can be cut.

The switch is a bridge in a namespace of its own, so nothing is visible outside, two of these never collide, and
removing the namespaces removes everything.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 120.0
# Read by the head alone: nodes that are cut off are declared dead after 3 to 5 s instead of a minute.
HEALTH_CHECKS = {
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}


def why_not() -> str | None:
    """Why there can be no hosts here, if so: for pytest.skip."""
    if os.geteuid():
        return "only root can make network namespaces"
    if shutil.which("ip") is None:
        return "network namespaces need the ip command (iproute2)"
    name = f"tr{secrets.token_hex(3)}"
    tried = _ip("netns", "add", name, check=False)
    if tried.returncode:
        return f"no network namespaces here: {tried.stderr.strip()}"
    try:
        tried = _ip("-n", name, "link", "add", "switch", "type", "bridge", check=False)
        return f"no bridges here: {tried.stderr.strip()}" if tried.returncode else None
    finally:
        _ip("netns", "del", name)


@dataclass
class Host:
    """One namespace. `port` is the end of its cable in the switch."""

    name: str
    address: str
    port: str


class Hosts:
    """`with Hosts([4, 2, 2]) as hosts:` -- the CPUs that each host's raylet says it has. The first one is the head.

    Each has the label host=hN, N from 0. All processes and namespaces are gone afterwards, whatever happened.
    """

    def __init__(self, cpus: list[int]) -> None:
        self._prefix = f"tr{secrets.token_hex(3)}"
        self._switch = f"{self._prefix}-switch"
        self._folder = Path(tempfile.mkdtemp(prefix="tr-", dir="/tmp"))  # short: sockets' paths are limited
        token = self._folder / "token"
        token.touch(0o600)
        token.write_text(secrets.token_hex(32))
        self.environment = {
            **os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT), **HEALTH_CHECKS,
        }  # fmt: skip
        self.environment.pop("RAY_AUTH_TOKEN", None)
        self._cpus = cpus
        self._hosts: list[Host] = []

    def __enter__(self) -> Hosts:
        try:
            _ip("netns", "add", self._switch)
            _ip("-n", self._switch, "link", "add", "switch", "type", "bridge")
            _ip("-n", self._switch, "link", "set", "switch", "up")
            for cpus in self._cpus:
                self.join(cpus)
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        self._remove()

    def __getitem__(self, index: int) -> Host:
        return self._hosts[index]

    @property
    def ray_address(self) -> str:
        return f"{self._hosts[0].address}:6379"

    def join(self, cpus: int) -> Host:
        """Another host, wired up, its raylet in the cluster."""
        number = len(self._hosts)
        host = Host(f"{self._prefix}-h{number}", f"10.77.0.{number + 1}", f"h{number}")
        _ip("netns", "add", host.name)
        self._hosts.append(host)
        cable = ("link", "add", "eth0", "netns", host.name, "type", "veth", "peer", "name", host.port)
        _ip(*cable, "netns", self._switch)
        _ip("-n", self._switch, "link", "set", host.port, "master", "switch", "up")
        _ip("-n", host.name, "link", "set", "lo", "up")
        _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", "eth0")
        _ip("-n", host.name, "link", "set", "eth0", "up")
        place = [f"--address={self.ray_address}"] if number else ["--head", "--port=6379", "--include-dashboard=false"]
        command = [
            sys.executable, "-m", "ray.scripts.scripts", "start", *place, f"--node-ip-address={host.address}",
            f"--temp-dir={self._folder / host.port}", f"--num-cpus={cpus}", "--num-gpus=0",
            f"--object-store-memory={100 * 2**20}", f"--labels=host={host.port}", "--disable-usage-stats",
        ]  # fmt: skip
        log = self._folder / f"{host.port}.log"
        with log.open("a") as stream:
            done = subprocess.run(
                self.inside(host, command), stdout=stream, stderr=stream, stdin=subprocess.DEVNULL,
                env=self.environment, timeout=START_SECONDS,
            )  # fmt: skip
        assert done.returncode == 0, log.read_text()[-3000:]
        return host

    def inside(self, host: Host, command: list[str]) -> list[str]:
        return ["ip", "netns", "exec", host.name, *command]

    def drive(self, *settings: str, cwd: Path) -> subprocess.Popen[str]:
        """A run whose driver is on the head's host; its output is one text stream."""
        command = [sys.executable, "-u", "-m", "learner.run", *settings]
        return subprocess.Popen(
            self.inside(self._hosts[0], command), cwd=cwd, text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**self.environment, "RAY_ADDRESS": self.ray_address},
        )  # fmt: skip

    def cut(self, host: Host) -> None:
        """Pull its cable out of the switch: whatever is sent is lost, nothing is refused."""
        _ip("-n", self._switch, "link", "set", host.port, "down")
        assert self.is_cut(host)

    def heal(self, host: Host) -> None:
        _ip("-n", self._switch, "link", "set", host.port, "up")

    def is_cut(self, host: Host) -> bool:
        (link,) = json.loads(_ip("-n", self._switch, "-json", "link", "show", host.port).stdout)
        return "UP" not in link["flags"]

    def processes(self, host: Host) -> dict[int, str]:
        """Its processes: id -> command line; Ray's workers are called ray::CLASS.METHOD while they work."""
        found = {}
        for pid in _ip("netns", "pids", host.name, check=False).stdout.split():
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if words:
                found[int(pid)] = words.strip()
        return found

    def does(self, host: Host, words: str) -> bool:
        """Whether one of its processes has these words in its command line."""
        return any(words in line for line in self.processes(host).values())

    def kill_raylet(self, host: Host) -> None:
        """SIGKILL its raylet alone; Ray's workers see that and end."""
        (raylet,) = [pid for pid, line in self.processes(host).items() if line.split()[0].endswith("/raylet/raylet")]
        os.kill(raylet, signal.SIGKILL)

    def kill_all(self, host: Host) -> None:
        """The host's power: SIGKILL everything on it."""
        deadline = time.monotonic() + 10
        while pids := _ip("netns", "pids", host.name, check=False).stdout.split():
            for pid in pids:
                try:
                    os.kill(int(pid), signal.SIGKILL)
                except ProcessLookupError:
                    continue
            assert time.monotonic() < deadline, f"{host.name}: {self.processes(host)} outlive SIGKILL"
            time.sleep(0.05)

    def _remove(self) -> None:
        for host in self._hosts:
            self.kill_all(host)
            _ip("netns", "del", host.name, check=False)
        _ip("netns", "del", self._switch, check=False)
        shutil.rmtree(self._folder, ignore_errors=True)


def _ip(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=10)
    assert not check or done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"
    return done
