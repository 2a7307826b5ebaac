"""Starting or joining a Ray cluster, and leaving it as it was found."""

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import ray

from cluster import auth, signals, temp_folders
from cluster.auth import ClusterUnreachable
from cluster.nodes import Node, alive_nodes

CLOSE_SECONDS = 3.0
LOOPBACK, INTERFACES = "127.0.0.1", ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def nodes_at_hand(cpu_threads: int, warn: Callable[[str], None], local: bool = False) -> list[Node]:
    """Nodes that a run would have: of the cluster named by RAY_ADDRESS, which this asks (raises ClusterUnreachable),
    else, or with `local`, of this machine, without starting anything. Raises NoTemporaryFolder where a Ray of our own
    could not start. `warn` hears of a cluster that anyone may use."""
    if not local:
        for fault in auth.faults_here():
            warn(fault)
    address = os.environ.get("RAY_ADDRESS") or "local"
    if local or address == "local":
        if not local:
            temp_folders.require_room_for_sockets()
        import torch  # seconds, which a cluster's driver need not wait for

        cpus, gpus = float(len(os.sched_getaffinity(0))), float(torch.cuda.device_count())
        return [Node("this machine", cpus, gpus, free_cpus=cpus, free_gpus=gpus)]
    with contextlib.closing(Session(cpu_threads)):
        if open_to_all := auth.takes_any_token(address):
            warn(open_to_all)
        return alive_nodes()


class Session:
    """A connection to Ray: the cluster named by RAY_ADDRESS (set in a submitted job), else one of our own (`own`), in a
    temporary folder of our own, on 127.0.0.1 alone. Token authentication is always on. Raises ClusterUnreachable if the
    cluster does not answer, or know the token that RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token gives."""

    def __init__(self, cpu_threads: int) -> None:
        os.environ.setdefault("OMP_NUM_THREADS", str(cpu_threads))
        # Actors without a share of a GPU must not see any. Failures survived are said by the run, without a traceback.
        for name in ("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "RAY_IGNORE_UNHANDLED_ERRORS"):
            os.environ.setdefault(name, "1")
        address = os.environ.get("RAY_ADDRESS") or "local"
        self._connected = not ray.is_initialized()
        self._folder = None
        if self._connected and address == "local":
            temp_folders.require_room_for_sockets()
            self._folder = temp_folders.TemporaryFolder()
        self.own = self._folder is not None
        try:
            if self._folder:
                auth.ensure_token()
                with self._folder.marking(), _on_loopback():
                    # Ray opens its folder to everybody; ours around it stays closed.
                    _init(address, include_dashboard=False, _temp_dir=str(self._folder.path / "r"))
            elif self._connected:
                auth.require_answer(address)
                _init(address)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Leave; a local cluster ends with us, and nothing of it is left. Safe to call twice."""
        if self._connected:
            self._connected = False
            leaving = threading.Thread(target=ray.shutdown, daemon=True)  # it takes no deadline
            leaving.start()
            leaving.join(CLOSE_SECONDS)
            if leaving.is_alive() and self._folder:
                temp_folders.end_processes(self._folder.path, grace=0)  # a raylet that drains, its head gone, takes 8 s
                leaving.join(CLOSE_SECONDS)
        if self._folder:
            self._folder.remove()


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """What is started meanwhile listens on 127.0.0.1 alone. Ray does where that is the node's address: it does not take
    it as an argument, and asks this function. The learner ranks' gloo and NCCL go by an interface's name."""
    real, before = ray.util.get_node_ip_address, {name: os.environ.get(name) for name in INTERFACES}
    ray.util.get_node_ip_address = lambda: LOOPBACK
    os.environ.update(dict.fromkeys(INTERFACES, "lo"))
    try:
        yield
    finally:
        ray.util.get_node_ip_address = real
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _init(address: str, **options: Any) -> None:
    # Workers have our environment by inheritance, or with the submitted job. By a runtime environment Ray's logs would
    # have it too, HF_TOKEN included.
    common = {"namespace": "tributary", "log_to_driver": False, "logging_level": logging.WARNING}
    try:
        with signals.handlers_kept():
            ray.init(address=address, **common, **options)
    except Exception as error:  # of a start that takes too long it raises just that
        where = "Ray cannot be started here" if address == "local" else f"RAY_ADDRESS {address}"
        raise ClusterUnreachable(f"{where}: {(str(error).strip() or repr(error)).splitlines()[0]}") from error
