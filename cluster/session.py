"""Starting or joining a Ray cluster, and leaving it as it was found."""

from __future__ import annotations

import logging
import os
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

import ray
import torch

from cluster.nodes import Node, alive_nodes

# OMP_NUM_THREADS must be set before torch loads in the worker, so it travels in the runtime environment.
CONNECT_SECONDS = 20.0
WORKER_ENV = ("OMP_NUM_THREADS", "HF_HUB_OFFLINE", "HF_HOME", "HF_TOKEN")


def nodes_at_hand(cpu_threads: int, local: bool = False) -> list[Node]:
    """Nodes that a run would have: of the cluster named by RAY_ADDRESS, which this asks, else (or with
    `local`) of this machine, without starting anything.

    Raises:
        ConnectionError: the cluster does not answer, or refuses our token.
    """
    if local or _address() == "local":
        cpus, gpus = float(len(os.sched_getaffinity(0))), float(torch.cuda.device_count())
        return [Node("this machine", cpus, gpus, free_cpus=cpus, free_gpus=gpus)]
    session = Session(cpu_threads)
    try:
        return alive_nodes()
    finally:
        session.close()


class Session:
    """A connection to Ray: the cluster named by RAY_ADDRESS (set in a submitted job), else one of our own.

    Token authentication is always on. A local cluster makes the user's token file if there is none; a remote
    cluster must know the token that RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token gives.

    Raises:
        ConnectionError: the cluster does not answer, or refuses our token.
    """

    def __init__(self, cpu_threads: int) -> None:
        # Actors without a share of a GPU must not see any.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
        os.environ.setdefault("OMP_NUM_THREADS", str(cpu_threads))
        address = _address()
        if address == "local":
            _ensure_token()
        elif not ray.is_initialized():
            _require_answer(address)
        self.started = not ray.is_initialized()
        if self.started:
            try:
                ray.init(
                    address=address,
                    namespace="tributary",
                    log_to_driver=False,
                    logging_level=logging.WARNING,
                    **(_local_options() if address == "local" else {}),
                )
            except (RuntimeError, ray.exceptions.RayError) as error:  # another version of Ray or Python, a port, ...
                raise ConnectionError(f"RAY_ADDRESS {address}: {str(error).strip().splitlines()[0]}") from error

    def close(self) -> None:
        """Leave; a local cluster ends with us. Safe to call twice."""
        if self.started and ray.is_initialized():
            ray.shutdown()


def _address() -> str:
    return os.environ.get("RAY_ADDRESS") or "local"


def _require_answer(address: str) -> None:
    """`ray.init` waits for minutes on a cluster that is gone, and takes no deadline: ask with Ray's own probe first.

    Raises:
        ConnectionError: no answer within CONNECT_SECONDS, or our token is refused.
    """
    if address == "auto" or "://" in address:
        return
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CONNECT_SECONDS)
    except subprocess.TimeoutExpired:
        raise ConnectionError(
            f"RAY_ADDRESS: no Ray cluster answers at {address} within {CONNECT_SECONDS:g} s; start one, or unset it to "
            "use this machine"
        ) from None
    if done.returncode:
        words = (done.stderr.strip().splitlines() or ["it is not healthy"])[-1]
        raise ConnectionError(f"RAY_ADDRESS: the Ray cluster at {address} refuses us: {words}")


def _local_options() -> dict[str, Any]:
    """No dashboard, and our environment in the workers. (A submitted job's environment comes with the job, and Ray
    refuses to be told a variable twice.)"""
    variables = {name: os.environ[name] for name in WORKER_ENV if name in os.environ}
    return {"include_dashboard": False, "runtime_env": {"env_vars": variables}}


def _ensure_token() -> None:
    """What `ray get-auth-token --generate` does: a cluster that demands a token cannot start without one."""
    if (
        os.environ["RAY_AUTH_MODE"] != "token"
        or os.environ.get("RAY_AUTH_TOKEN")
        or os.environ.get("RAY_AUTH_TOKEN_PATH")
    ):
        return
    file = Path.home() / ".ray" / "auth_token"
    file.parent.mkdir(mode=0o700, exist_ok=True)
    try:
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return
    with os.fdopen(handle, "w") as stream:
        stream.write(secrets.token_hex(32))
