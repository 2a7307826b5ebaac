"""Scores by the reward packages' own code, which runs in an environment of its own (docs/adr/0014).

`python -m rewards.package build imagereward|hpsv2` makes that environment.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from rewards import package_environment, package_worker
from rewards.weights import HPS_FILES, Asset, check, find

if TYPE_CHECKING:
    from torch import Tensor

ANSWER_LIMIT = 1 << 20  # bytes
LINES_SHOWN = 8
SECONDS_TO_END = 5.0


class PackageFailed(RuntimeError):
    """The worker raised, ended, answered nonsense or nothing in time; the message has its last words and the remedy."""


class PackageReward:
    """`imagereward` or `hpsv2` as its package computes it; scores without gradients.

    The process that does so starts at the first call, reads the weights once and ends with this object. Pictures
    reach it in 8 bits, as the packages read them from files.
    """

    differentiable = False

    def __init__(
        self, name: str, weights: str | None = None, device: str = "cpu", *, python: str | None = None,
        version: str | None = None, med_config: str | None = None, tokenizer: str | None = None,
        start_seconds: float = 300.0, seconds: float = 300.0,
    ) -> None:  # fmt: skip
        """`python` is the interpreter of the package's environment, default that of `build`. `weights`, `med_config`
        and `tokenizer` are files, folders or hub ids (`owner/repository`, also with `:file`); `version` is hpsv2's.
        `start_seconds` and `seconds` are the deadlines for loading and for one call.

        Raises:
            EnvironmentMissing: (a ValueError) no environment.
            ValueError: an unknown name or version, an option of the other package, or a path that is not there.
        """
        if name not in package_environment.NAMES:
            known = ", ".join(package_environment.NAMES)
            raise ValueError(f"reward.backend: {name} has no package; there are {known}")
        if name == "hpsv2" and (med_config or tokenizer):
            raise ValueError("reward.options: med_config and tokenizer are imagereward's, hpsv2 has none")
        if name == "imagereward" and version:
            raise ValueError("reward.options.version: is hpsv2's, imagereward has one version")
        if (version or "v2.1") not in HPS_FILES:
            raise ValueError(f"reward.options.version: unknown {version!r}; there are {', '.join(HPS_FILES)}")
        self.name, self.device, self.start_seconds, self.seconds = name, device, start_seconds, seconds
        self.python = package_environment.find(name, python)
        source = weights or {"hpsv2": "xswu/HPSv2", "imagereward": "THUDM/ImageReward"}[name]
        file = HPS_FILES[version or "v2.1"] if name == "hpsv2" else "ImageReward.pt"
        self.assets = {"weights": Asset("reward.weights", source, (file,))}  # by the worker's names of them
        if name == "imagereward":
            med, words = med_config or "THUDM/ImageReward", tokenizer or "bert-base-uncased"
            self.assets["med_config"] = Asset("reward.options.med_config", med, ("med_config.json",))
            self.assets["tokenizer"] = Asset("reward.options.tokenizer", words, ("vocab.txt",), folder=True)
        check(list(self.assets.values()), hub=False)  # a wrong path is said before anything starts
        self._worker: _Worker | None = None

    def start(self) -> None:
        """Start the process and have it read the weights, if it does not run.

        Raises:
            PackageFailed: it could not, or not in time.
            WeightsNotFound: (a ValueError) a file that is neither here nor at the hub.
        """
        if self._worker is not None:
            return
        import torch

        paths = find(list(self.assets.values()))
        files = {role: str(path.absolute()) for role, path in zip(self.assets, paths, strict=True)}
        request = {"package": self.name, "files": files, "device": self.device, "threads": torch.get_num_threads()}
        worker = _Worker(self.name, self.python, self.seconds)
        worker.ask(request, b"", 0, self.start_seconds, "start_seconds")
        self._worker = worker

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """[B] float32 on the CPU. What is not finite is passed on: the scorer names its prompt.

        Raises:
            PackageFailed: the process failed, or did not answer in time. It is gone; another call starts another.
            ValueError: as `start`.
        """
        import torch

        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images, {len(prompts)} prompts")
        if not len(images):
            return torch.empty(0)
        self.start()
        worker, self._worker = self._worker, None
        assert worker is not None
        pixels = images.detach().float().clamp(0, 1).mul(255).round().to(torch.uint8)
        array = pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()
        request = {"shape": array.shape, "prompts": list(prompts)}
        scores = worker.ask(request, array.tobytes(), len(images), self.seconds, "seconds")
        self._worker = worker  # it is sound
        return torch.tensor(scores, dtype=torch.float32)

    def close(self) -> None:
        """End the process. Another call would start it again."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.close()


class _Worker:
    """A process that runs package_worker.py, at the other end of a socket without a name. After an error it is gone.

    A request is a JSON header and raw pixels, an answer is JSON: nothing is pickled. What the worker prints goes to a
    file without a name, so that it never waits for a reader; its last lines are in every error.
    """

    def __init__(self, name: str, python: Path, stall_seconds: float) -> None:
        """`stall_seconds`: how long a message may wait for a worker that neither reads nor writes on.

        Raises:
            PackageFailed: the interpreter cannot be started.
        """
        self.name, self.label = name, f"{name} (package, {python})"
        ours, theirs = socket.socketpair()
        interval = struct.pack("ll", int(stall_seconds), int(stall_seconds % 1 * 1e6) or 1)
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            ours.setsockopt(socket.SOL_SOCKET, option, interval)
        self._connection = Connection(ours.detach())
        self._output = tempfile.TemporaryFile()  # noqa: SIM115
        # -I: neither PYTHONPATH nor this folder, whose modules have names that the packages' own may have. Nothing of
        # ours may be looked up on a hub in there: it is handed local files.
        command = [str(python), "-I", package_worker.__file__, str(theirs.fileno()), str(os.getpid())]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=self._output, stderr=self._output, env=environment,
                pass_fds=[theirs.fileno()],
            )  # fmt: skip
        except OSError as error:
            raise PackageFailed(f"{self.label}: cannot start {python}: {error.strerror}") from error
        finally:
            theirs.close()
        # Also when this object is forgotten, or the interpreter ends.
        self.close = weakref.finalize(self, _end, self._process, self._connection, self._output, os.getpid())

    def ask(self, request: dict[str, Any], pixels: bytes, count: int, seconds: float, option: str) -> list[float]:
        """The `count` scores of the worker's answer. `option` is the reward's that sets the deadline.

        Raises:
            PackageFailed: see there. The process has been ended.
        """
        try:
            self._connection.send_bytes(json.dumps(request).encode())
            self._connection.send_bytes(pixels)
            if not self._connection.poll(seconds):
                raise TimeoutError
            answer = json.loads(self._connection.recv_bytes(ANSWER_LIMIT))
            if "error" in answer:
                fault = f"raised {answer['error']}"
            elif len(answer["scores"]) == count:
                return [float(score) for score in answer["scores"]]
            else:
                fault = f"gave {len(answer['scores'])} scores for {count} images"
        except (TimeoutError, BlockingIOError):
            fault = f"did not answer within {seconds:g} s"
        except (EOFError, ConnectionError):
            fault = self._how_it_ended()
        except (OSError, ValueError, TypeError, KeyError) as error:  # too long, no JSON, or other JSON
            fault = f"sent what is no answer ({type(error).__name__}: {error})"
        except BaseException:
            self.close()  # an answer may be under way: the next question would get it
            raise
        message = (
            f"{self.label}: its process {fault}; if its environment is at fault, `python -m rewards.package build "
            f"{self.name}` makes a sound one; if it is slow, raise reward.options.{option}{self._last_words()}"
        )
        self.close()
        raise PackageFailed(message)

    def _how_it_ended(self) -> str:
        try:
            status = self._process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            return "closed its end of the connection"
        if status == -9:
            return "was killed (signal 9: out of memory?)"
        return f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"

    def _last_words(self) -> str:
        file = self._output.fileno()
        text = os.pread(file, 10_000, max(0, os.fstat(file).st_size - 10_000)).decode(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return "; its last words: " + " | ".join(lines[-LINES_SHOWN:]) if lines else ""


def _end(process: subprocess.Popen[bytes], connection: Connection, output: IO[bytes], owner: int) -> None:
    connection.close()
    output.close()
    if os.getpid() != owner:  # a fork of the owner has no say
        return
    try:
        process.wait(SECONDS_TO_END)  # it ends by itself when the connection does
    except subprocess.TimeoutExpired:
        process.kill()
        with suppress(subprocess.TimeoutExpired):  # not even SIGKILL ends one that waits for a disk
            process.wait(SECONDS_TO_END)


if __name__ == "__main__":
    from commands.build_package import main

    sys.exit(main())
