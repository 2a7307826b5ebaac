"""Scores by the reward packages' own code, which runs in an environment of its own (docs/adr/0014):
`python -m rewards.package build imagereward|hpsv2` makes it."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import IO, Any

import torch
from torch import Tensor

from rewards import package_environment, package_worker
from rewards.weights import Asset, find

LINES_SHOWN = 8
SECONDS_TO_END = 5.0


class PackageFailed(RuntimeError):
    """The worker raised, ended, sent no answer or none in time; the message has its last words and the remedy."""


class PackageReward:
    """`imagereward` or `hpsv2` as its package computes it; scores without gradients.

    A process that runs package_worker.py does so. It starts at the first call, reads the weights once and ends with
    this object, or after an error. A request is a line of JSON and raw 8-bit pixels, an answer a line of JSON. What it
    prints goes to a file, so that it never waits for a reader; its last lines are in every error."""

    differentiable = False

    def __init__(
        self, name: str, weights: str | None = None, device: str = "cpu", *, seconds: float = 300.0, **options: Any
    ) -> None:
        """`seconds`: the deadline for loading, and for one call. `options`: those of the native model's `assets`, with
        its errors. Raises ValueError for an unknown name, EnvironmentMissing."""
        from rewards.hpsv2 import HPSv2
        from rewards.imagereward import ImageReward

        models: dict[str, Any] = {"hpsv2": HPSv2, "imagereward": ImageReward}
        if name not in models:
            raise ValueError(f"reward.backend: {name} has no package; there are {', '.join(models)}")
        self.name, self.device, self.seconds = name, device, seconds
        self.assets: list[Asset] = models[name].assets(weights, **options)
        if name == "hpsv2":
            self.assets = self.assets[:1]  # the package brings its tokenizer
        self.python = package_environment.find(name)
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """[B] float32 on the CPU. Raises PackageFailed, after which another call starts another process."""
        if self._process is None:
            self._start(torch.get_num_threads())
        pixels = images.detach().float().clamp(0, 1).mul(255).round().to(torch.uint8)
        array = pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()
        scores = self._ask({"shape": array.shape, "prompts": list(prompts)}, array.tobytes())
        return torch.tensor(scores, dtype=torch.float32)

    def close(self) -> None:
        """End the process. Another call would start it again."""
        if self._process is not None:
            self._end()
        self._process = None

    def _start(self, threads: int) -> None:
        roles = [asset.key.rpartition(".")[2] for asset in self.assets]  # weights, med_config, tokenizer
        files = {role: str(path.absolute()) for role, path in zip(roles, find(self.assets), strict=True)}
        self._socket, theirs = socket.socketpair()
        self._output = tempfile.TemporaryFile()  # noqa: SIM115
        # -I: neither PYTHONPATH nor this folder, whose modules have names that the packages' own may have. Nothing of
        # ours may be looked up on a hub in there: it is handed local files.
        command = [str(self.python), "-I", package_worker.__file__, str(theirs.fileno()), str(os.getpid())]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": self._output, "stderr": self._output}
        with theirs:
            self._process = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()], **streams)
        # Also when this object is forgotten, or the interpreter ends.
        self._end = weakref.finalize(self, _end, self._process, self._socket, self._output)
        self._ask({"package": self.name, "files": files, "device": self.device, "threads": threads})

    def _ask(self, request: dict[str, Any], pixels: bytes = b"") -> list[float]:
        try:
            self._socket.settimeout(self.seconds)
            self._socket.sendall(json.dumps(request).encode() + b"\n" + pixels)
            with self._socket.makefile("rb") as stream:
                answer = json.loads(stream.readline())
            if "error" not in answer:
                return answer["scores"]
            fault = f"raised {answer['error']}"
        except TimeoutError:
            fault = f"did not answer within {self.seconds:g} s"
        except (ConnectionError, ValueError):  # the other end is closed
            fault = self._how_it_ended()
        except BaseException:
            self.close()  # an answer may be under way: the next question would get it
            raise
        message = (
            f"{self.name} (package, {self.python}): its process {fault}; if its environment is at fault, `python -m "
            f"rewards.package build {self.name}` makes a sound one; if it is slow, raise reward.options.seconds"
            f"{self._last_words()}"
        )
        self.close()
        raise PackageFailed(message)

    def _how_it_ended(self) -> str:
        assert self._process is not None
        with suppress(subprocess.TimeoutExpired):
            return f"ended with status {self._process.wait(SECONDS_TO_END)} (-9: out of memory?)"
        return "sent no answer"

    def _last_words(self) -> str:
        file = self._output.fileno()
        text = os.pread(file, 10_000, max(0, os.fstat(file).st_size - 10_000)).decode(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return "; its last words: " + " | ".join(lines[-LINES_SHOWN:]) if lines else ""


def _end(process: subprocess.Popen[bytes], connection: socket.socket, output: IO[bytes]) -> None:
    connection.close()
    output.close()
    process.kill()  # it keeps nothing; in a fork, whose child it is not, this does nothing
    with suppress(subprocess.TimeoutExpired):  # not even SIGKILL ends one that waits for a disk
        process.wait(SECONDS_TO_END)


if __name__ == "__main__":
    from commands.build_package import main

    sys.exit(main())
