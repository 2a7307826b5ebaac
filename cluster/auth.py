"""The token of a Ray cluster: the file it lies in, and whether a cluster answers to it and to no other."""

import contextlib
import os
import secrets
import subprocess
import sys
from pathlib import Path

from diffusion.failures import RunFailure

CONNECT_SECONDS = 20.0
DEFAULT_FILE = Path("~/.ray/auth_token")  # Ray's
OPEN = "anyone who reaches it can run code there and read the run"
REMEDY = "start it with RAY_AUTH_MODE=token on every node (docs/operations.md)"


class ClusterUnreachable(RunFailure, ConnectionError):
    """A Ray cluster that does not answer, or refuses us."""


def require_answer(address: str, **changed: str) -> None:
    """Checks by Ray's own health check that the cluster answers within CONNECT_SECONDS and takes our token, else raises
    ClusterUnreachable. `ray.init` would wait for minutes, without a deadline. `changed`: in the environment."""
    if "://" in address:
        return
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check"]
    command += [] if address == "auto" else ["--address", address]
    env = os.environ | changed
    try:
        check = subprocess.run(command, capture_output=True, text=True, timeout=CONNECT_SECONDS, env=env)
    except subprocess.TimeoutExpired:
        raise ClusterUnreachable(
            f"RAY_ADDRESS: no Ray cluster answers at {address} within {CONNECT_SECONDS:g} s; start one, or unset it to "
            "use this machine"
        ) from None
    if check.returncode:
        reason = (check.stderr.strip().splitlines() or ["it is not healthy"])[-1]
        raise ClusterUnreachable(f"RAY_ADDRESS: the Ray cluster at {address} refuses us: {reason}")


def takes_any_token(address: str) -> str | None:
    """Checks that the cluster refuses a token made up on the spot: what is wrong if it does not."""
    if "://" in address:
        return None
    with contextlib.suppress(ClusterUnreachable):
        require_answer(address, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32), RAY_AUTH_TOKEN_PATH="")
        return f"the Ray cluster at {address} takes any token: {OPEN}; {REMEDY}"
    return None


def faults_here() -> list[str]:
    """What is wrong with our own settings: authentication switched off, a token file that others can read."""
    mode = os.environ["RAY_AUTH_MODE"]
    if mode.lower() != "token":
        return [f"RAY_AUTH_MODE={mode}: a Ray started here takes no token, and {OPEN}; unset it, or say token"]
    file = _token_file()
    if file and os.path.exists(file) and file.stat().st_mode & 0o077:
        return [f"{file}: others can read the token in it; chmod 600 {file}"]
    return []


def ensure_token() -> None:
    """Makes a token for this process and those it starts, if the user has none: Ray cannot start without."""
    file = _token_file()
    unset = file == Path(os.path.expanduser(DEFAULT_FILE))
    # os.path.exists: a home that cannot be looked into is none.
    if os.environ["RAY_AUTH_MODE"].lower() == "token" and file and unset and not os.path.exists(file):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _token_file() -> Path | None:
    """Where Ray looks for the token; None where a variable holds the token itself."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return None
    return Path(os.path.expanduser(os.environ.get("RAY_AUTH_TOKEN_PATH") or DEFAULT_FILE))
