"""Scores by the reward packages' own code, which runs in an environment of its own (docs/adr/0014).

`python -m rewards.package build imagereward|hpsv2` makes that environment.
"""

from __future__ import annotations

import argparse
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewards import package_environment, package_worker
from rewards.package_process import PackageFailed, PackageProcess

SCORE_SECONDS, START_SECONDS = 300.0, 300.0


@dataclass(frozen=True)
class Asset:
    """A file that a package reads: the setting that names it, and its hub id and name there."""

    key: str
    repository: str
    file: str
    folder: bool = False  # the package is handed the folder that holds it


IMAGE_REWARD = {
    "weights": Asset("reward.weights", "THUDM/ImageReward", "ImageReward.pt"),
    "med_config": Asset("reward.options.med_config", "THUDM/ImageReward", "med_config.json"),
    "tokenizer": Asset("reward.options.tokenizer", "bert-base-uncased", "vocab.txt", folder=True),
}
HPS = {
    "v2.0": {"weights": Asset("reward.weights", "xswu/HPSv2", "HPS_v2_compressed.pt")},
    "v2.1": {"weights": Asset("reward.weights", "xswu/HPSv2", "HPS_v2.1_compressed.pt")},
}
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
        if name == "hpsv2" and (version or "v2.1") not in HPS:
            raise ValueError(f"reward.options.version: unknown {version!r}; there are {', '.join(HPS)}")
        self.name, self.device = name, device
        self._deadlines = {"start": start_seconds, "score": seconds}
        self._python = package_environment.find(name, python)
        assets = HPS[version or "v2.1"] if name == "hpsv2" else IMAGE_REWARD
        sources = {"weights": weights, "med_config": med_config, "tokenizer": tokenizer}
        self._assets = {role: (asset, sources[role] or asset.repository) for role, asset in assets.items()}
        for asset, source in self._assets.values():
            _local(asset, source)  # a wrong path is said before anything starts
        self._process: PackageProcess | None = None

    def start(self) -> None:
        """Start the process and have it read the weights, if it does not run.

        Raises:
            PackageFailed: it could not, or not in time.
            ValueError: a file that is neither here nor at the hub.
        """
        if self._process is not None:
            return
        files = {role: str(_find(asset, source)) for role, (asset, source) in self._assets.items()}
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


def _local(asset: Asset, source: str) -> Path | None:
    """Where a source that is a path leads; None if it reads like a hub id."""
    path = Path(source).expanduser()
    if path.is_dir():
        path = path / asset.file
    if path.is_file():
        return path.parent if asset.folder else path
    written_as_path = source.startswith((".", "~", "/")) or source.count("/") > 1
    if written_as_path or (path.parent.is_dir() and path.suffix in (".pt", ".pth", ".json", ".txt")):
        raise ValueError(f"{asset.key}: no such file: {path}")
    return None


def _find(asset: Asset, source: str) -> Path:
    """As a local path, downloaded where need be.

    Raises:
        ValueError: it is not to be had; says how to get it.
    """
    if (path := _local(asset, source)) is not None:
        return path.absolute()
    from huggingface_hub import hf_hub_download

    repository, _, file = source.partition(":")
    file = file or asset.file
    try:
        path = Path(hf_hub_download(repository, file))
    except Exception as error:  # of the hub's client, or its http library
        reason = f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0]}"
        raise ValueError(
            f"{asset.key}: {file} of https://huggingface.co/{repository} is not in the hub's cache, and the hub did "
            f"not give it ({reason}); where there is a network: `hf download {repository} {file} --local-dir FOLDER`, "
            f"then set {asset.key}=FOLDER"
        ) from error
    return path.parent if asset.folder else path


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
