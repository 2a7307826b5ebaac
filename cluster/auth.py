"""The token of a Ray cluster: the file it lies in, and whether a cluster answers to it and to no other."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import subprocess
import sys
from pathlib import Path

from diffusion.failures import RunFailure

CONNECT_SECONDS = 20.0
DEFAULT_FILE = Path("~/.ray/auth_token")  # Ray's
OPEN = "anyone who reaches it can run code there and read the run"


class ClusterUnreachable(RunFailure, ConnectionError):
    """A Ray cluster that does not answer, or refuses us."""


def require_answer(address: str) -> None:
    """Checks that the cluster answers within CONNECT_SECONDS and takes our token, else raises ClusterUnreachable.
    `ray.init` would wait for minutes, without a deadline."""
    try:
        failure = _probe(address, {})
    except subprocess.TimeoutExpired:
        raise ClusterUnreachable(
            f"RAY_ADDRESS: no Ray cluster answers at {address} within {CONNECT_SECONDS:g} s; start one, or unset it to "
            "use this machine"
        ) from None
    if failure:
        raise ClusterUnreachable(f"RAY_ADDRESS: the Ray cluster at {address} refuses us: {failure}")


def takes_any_token(address: str) -> str | None:
    """Checks that the cluster refuses a token made up on the spot: what is wrong if it does not."""
    stranger = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_AUTH_TOKEN_PATH": ""}
    with contextlib.suppress(subprocess.TimeoutExpired):
        if "://" not in address and not _probe(address, stranger):
            return (
                f"the Ray cluster at {address} takes any token: {OPEN}; start it with RAY_AUTH_MODE=token on every "
                "node (docs/operations.md)"
            )
    return None


def _probe(address: str, changed: dict[str, str]) -> str | None:
    """Ray's own health check: None if the cluster answers and takes the token, else the reason. Raises TimeoutExpired
    if there is no answer within CONNECT_SECONDS."""
    if "://" in address:
        return None
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check"]
    command += [] if address == "auto" else ["--address", address]
    environment = os.environ | changed
    done = subprocess.run(command, capture_output=True, text=True, timeout=CONNECT_SECONDS, env=environment)
    return (done.stderr.strip().splitlines() or ["it is not healthy"])[-1] if done.returncode else None


def faults_here() -> list[str]:
    """What is wrong with our own settings: authentication switched off, a token file that others can read."""
    mode = os.environ["RAY_AUTH_MODE"]
    if mode.lower() != "token":
        return [f"RAY_AUTH_MODE={mode}: a Ray started here takes no token, and {OPEN}; unset it, or say token"]
    file = _token_file()
    try:
        open_to_others = stat.S_IMODE(file.stat().st_mode) & 0o077 if file else 0
    except OSError:  # Ray will say so
        return []
    return [f"{file}: others can read the token in it; chmod 600 {file}"] if open_to_others else []


def ensure_token() -> None:
    """Makes a token for this process and those it starts, if the user has none: a Ray that demands one cannot start
    without."""
    file = _token_file()
    if os.environ["RAY_AUTH_MODE"].lower() == "token" and file == DEFAULT_FILE.expanduser() and not file.exists():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _token_file() -> Path | None:
    """Where Ray looks for the token; None where a variable holds the token itself."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return None
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or DEFAULT_FILE).expanduser()
