"""Scores by the reward packages' own code, which runs in an environment of its own (docs/adr/0014).

`python -m rewards.package build imagereward|hpsv2` makes that environment.
"""

from __future__ import annotations

import argparse
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewards import package_environment, package_worker
from rewards import weights as sources
from rewards.package_process import PackageFailed, PackageProcess
from rewards.weights import Asset

SCORE_SECONDS, START_SECONDS = 300.0, 300.0


HPS_FILES = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}
NAMES = package_environment.NAMES


class PackageReward:
    """`imagereward` or `hpsv2` as its package computes it; scores without gradients.

    The process that does so starts at the first call, reads the weights once and ends with this object. Pictures
    reach it in 8 bits, as the packages read them from files.
    """

    differentiable = False

    def __init__(
        self, name: str, weights: str | None = None, device: str = "cpu", *, python: str | None = None,
        version: str | None = None, med_config: str | None = None, tokenizer: str | None = None,
        start_seconds: float = START_SECONDS, seconds: float = SCORE_SECONDS,
    ) -> None:  # fmt: skip
        """`python` is the interpreter of the package's environment, default that of `build`. `weights`, `med_config`
        and `tokenizer` are files, folders or hub ids (`owner/repository`, also with `:file`); `version` is hpsv2's.
        `start_seconds` and `seconds` are the deadlines for loading and for one call.

        Raises:
            EnvironmentMissing: (a ValueError) no environment.
            ValueError: an unknown name or version, an option of the other package, or a path that is not there.
        """
        if name not in NAMES:
            raise ValueError(f"reward.backend: {name} has no package; there are {', '.join(NAMES)}")
        if name == "hpsv2" and (med_config or tokenizer):
            raise ValueError("reward.options: med_config and tokenizer are imagereward's, hpsv2 has none")
        if name == "imagereward" and version:
            raise ValueError("reward.options.version: is hpsv2's, imagereward has one version")
        if name == "hpsv2" and (version or "v2.1") not in HPS_FILES:
            raise ValueError(f"reward.options.version: unknown {version!r}; there are {', '.join(HPS_FILES)}")
        self.name, self.device = name, device
        self._deadlines = {"start": start_seconds, "score": seconds}
        self._python = package_environment.find(name, python)
        self.assets = _assets(name, weights, version or "v2.1", med_config, tokenizer)
        sources.check_paths(list(self.assets.values()))  # a wrong path is said before anything starts
        self._process: PackageProcess | None = None

    def start(self) -> None:
        """Start the process and have it read the weights, if it does not run.

        Raises:
            PackageFailed: it could not, or not in time.
            WeightsNotFound: (a ValueError) a file that is neither here nor at the hub.
        """
        if self._process is not None:
            return
        found = sources.find(list(self.assets.values()))
        files = {role: str(path.absolute()) for role, path in zip(self.assets, found, strict=True)}
        # -I: neither PYTHONPATH nor this folder, whose modules have names that the packages' own may have.
        process = PackageProcess([str(self._python), "-I", package_worker.__file__], self._label)
        header = {
            "package": self.name, "files": files, "device": self.device, "threads": torch.get_num_threads(),
        }  # fmt: skip
        process.ask(header, b"", self._deadlines["start"], self._remedy("start_seconds"))
        self._process = process

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """[B] float32 on the CPU. What is not finite is passed on: the scorer names its prompt.

        Raises:
            PackageFailed: the process failed, or did not answer in time. It is gone; another call starts another.
            ValueError: as `start`.
        """
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images, {len(prompts)} prompts")
        if not len(images):
            return torch.empty(0)
        self.start()
        assert self._process is not None
        pixels = images.detach().float().clamp(0, 1).mul(255).round().to(torch.uint8)
        array = pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()
        header = {"shape": array.shape, "dtype": "uint8", "prompts": list(prompts)}
        try:
            _, body = self._process.ask(header, array.tobytes(), self._deadlines["score"], self._remedy("seconds"))
        except BaseException:
            self._process = None
            raise
        if len(body) != 4 * len(images):
            self.close()
            raise PackageFailed(f"{self._label}: {len(body) / 4:g} scores for {len(images)} images")
        return torch.tensor(struct.unpack(f"<{len(images)}f", body), dtype=torch.float32)

    def close(self) -> None:
        """End the process. Another call would start it again."""
        process, self._process = self._process, None
        if process is not None:
            process.close()

    @property
    def _label(self) -> str:
        return f"{self.name} (package, {self._python})"

    def _remedy(self, deadline: str) -> str:
        return (
            f"if its environment is at fault, `python -m rewards.package build {self.name}` makes a sound one; if it "
            f"is slow, raise reward.options.{deadline}"
        )


def _assets(
    name: str, weights: str | None, version: str, med_config: str | None, tokenizer: str | None
) -> dict[str, Asset]:
    """What the package reads, by the name that its worker knows it under."""
    if name == "hpsv2":
        return {"weights": Asset("reward.weights", weights or "xswu/HPSv2", (HPS_FILES[version],))}
    repository = "THUDM/ImageReward"
    return {
        "weights": Asset("reward.weights", weights or repository, ("ImageReward.pt",)),
        "med_config": Asset("reward.options.med_config", med_config or repository, ("med_config.json",)),
        "tokenizer": Asset("reward.options.tokenizer", tokenizer or "bert-base-uncased", ("vocab.txt",), folder=True),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0: there is a whole environment; 1: it could not be built."""
    parser = argparse.ArgumentParser(prog="python -m rewards.package", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command: Any = commands.add_parser("build", help="make the environment that a package runs in")
    command.add_argument("name", choices=NAMES)
    command.add_argument("--dir", type=Path, help="where; default ~/.cache/tributary/packages/NAME")
    given = parser.parse_args(arguments)
    try:
        python = package_environment.build(given.name, given.dir, lambda line: print(line, file=sys.stderr))
    except package_environment.BuildFailed as error:
        print(f"{given.name}: {error}", file=sys.stderr)
        return 1
    print(f"reward.name={given.name}\nreward.backend=package")
    if given.dir is not None:
        print(f"reward.options.python={python}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
