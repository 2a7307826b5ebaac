"""Who may come in: the token of a Ray cluster, the file it lies in, and whether a stranger is let in without it."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from diffusion.failures import RunFailure

CONNECT_SECONDS = 20.0
OPEN = "anyone who reaches it can run code there and read the run"


class ClusterUnreachable(RunFailure, ConnectionError):
    """A Ray cluster that does not answer, or refuses us."""


def require_answer(address: str) -> None:
    """`ray.init` waits for minutes on a cluster that is gone, and takes no deadline: ask with Ray's own probe first.

    Raises:
        ClusterUnreachable: no answer within CONNECT_SECONDS, or our token is refused.
    """
    if "://" in address:
        return
    try:
        done = subprocess.run(_probe(address), capture_output=True, text=True, timeout=CONNECT_SECONDS)
    except subprocess.TimeoutExpired:
        raise ClusterUnreachable(
            f"RAY_ADDRESS: no Ray cluster answers at {address} within {CONNECT_SECONDS:g} s; start one, or unset it to "
            "use this machine"
        ) from None
    if done.returncode:
        words = (done.stderr.strip().splitlines() or ["it is not healthy"])[-1]
        raise ClusterUnreachable(f"RAY_ADDRESS: the Ray cluster at {address} refuses us: {words}")


@contextlib.contextmanager
def stranger(address: str) -> Iterator[Callable[[], str | None]]:
    """Knocks at the cluster with a token made up on the spot, while the caller goes in with ours. What this gives
    returns, when asked, what is wrong if the stranger was let in."""
    if "://" in address:
        yield lambda: None
        return
    made_up = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_TOKEN_PATH"} | made_up
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(_probe(address), env=environment, stdin=quiet, stdout=quiet, stderr=quiet)

    def fault() -> str | None:
        try:
            let_in = process.wait(CONNECT_SECONDS) == 0
        except subprocess.TimeoutExpired:
            return None
        return (
            f"the Ray cluster at {address} takes any token: {OPEN}; start it with RAY_AUTH_MODE=token on every node "
            "(docs/operations.md)"
            if let_in
            else None
        )

    try:
        yield fault
    finally:
        process.kill()
        process.wait(CONNECT_SECONDS)


def faults_here() -> list[str]:
    """What is wrong with our own settings: authentication switched off, a token file that others can read."""
    if os.environ["RAY_AUTH_MODE"].lower() != "token":
        mode = os.environ["RAY_AUTH_MODE"]
        return [f"RAY_AUTH_MODE={mode}: a Ray started here takes no token, and {OPEN}; unset it, or say token"]
    file = _token_file()
    try:
        open_to_others = stat.S_IMODE(file.stat().st_mode) & 0o077 if file else 0
    except OSError:  # Ray will say so
        return []
    return [f"{file}: others can read the token in it; chmod 600 {file}"] if open_to_others else []


def ensure_token() -> None:
    """What `ray get-auth-token --generate` does, but for our eyes only: a cluster that demands a token cannot start
    without one."""
    default = Path.home() / ".ray" / "auth_token"
    if os.environ["RAY_AUTH_MODE"].lower() != "token" or _token_file() != default:
        return
    if default.exists():
        return
    default.parent.mkdir(mode=0o700, exist_ok=True)
    handle, aside = tempfile.mkstemp(dir=default.parent)  # 0600
    with os.fdopen(handle, "w") as stream:
        stream.write(secrets.token_hex(32))
    with contextlib.suppress(FileExistsError):  # another run was first: its token is the one
        os.link(aside, default)  # whole, or not at all
    os.unlink(aside)


def _token_file() -> Path | None:
    """Where Ray looks for the token; None where a variable holds the token itself."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return None
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token").expanduser()


def _probe(address: str) -> list[str]:
    """Ends with status 0 where a cluster answers and takes the token."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check"]
    return command if address == "auto" else [*command, "--address", address]
