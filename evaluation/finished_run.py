"""What a run has trained so far, for commands that only read it: settings, records, and one checkpoint's LoRA."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from learner.config import Config, saved_config
from records import checkpoint
from records.checkpoint import Checkpoint, CheckpointError
from records.run_folder import RUN, Records
from records.storage import Storage, StorageError

if TYPE_CHECKING:
    from diffusion.lora_files import AdapterFile

LORA = "lora/"


@dataclass(frozen=True)
class Trained:
    """A run as it stood at a checkpoint."""

    records: Records
    config: Config
    checkpoint: Checkpoint

    @property
    def epochs(self) -> int:
        """Epochs that were closed."""
        return int(self.checkpoint.manifest["next_epoch"])

    @property
    def step(self) -> int:
        """Policy updates."""
        return int(self.checkpoint.manifest["step"])

    @property
    def lora_files(self) -> dict[str, bytes]:
        """The adapter's files by name: diffusers' and kohya's, or PEFT's of a model without text."""
        files = self.checkpoint.files.items()
        return {name.removeprefix(LORA): content for name, content in files if name.startswith(LORA)}

    def adapter(self) -> AdapterFile:
        """
        Raises:
            BadAdapter: its file is no LoRA.
            CheckpointError: it is not the adapter that the checkpoint was written of.
        """
        from diffusion import lora_files  # here: it imports torch and diffusers

        source = f"{self.records.storage}/{self.checkpoint.name}/{LORA.rstrip('/')}"
        with tempfile.TemporaryDirectory() as folder:
            for name, content in self.lora_files.items():
                (Path(folder) / name).write_bytes(content)
            adapter = replace(lora_files.read(folder), source=source)
        if adapter.sha256 != self.checkpoint.manifest["adapter_sha256"]:
            raise CheckpointError(f"{source} is not the adapter that the run had: its sha256 differs")
        return adapter


def open_trained(url: str, step: int | None, warn: Callable[[str], None]) -> Trained:
    """The run in directory or URL `url` at its newest whole checkpoint, or at that of `step`. `warn` hears of
    checkpoints that are passed over.

    Raises:
        StorageError: there is no run, or it cannot be read.
        ConfigError: its settings are damaged, or of another version.
        CheckpointError: there is no such checkpoint, or none that is whole.
    """
    storage = Storage(url)
    if not storage.exists(RUN):
        raise StorageError(f"there is no {RUN} in {storage}; give a run's directory")
    records = Records.open(storage)
    config = saved_config(records)
    if step is None:
        newest = checkpoint.load_newest(storage, records.run_id, warn)
        if newest is None:
            raise CheckpointError(f"{storage} has no checkpoint yet; wait for its first")
        return Trained(records, config, newest)
    if step not in (there := checkpoint.steps(storage)):
        steps = ", ".join(map(str, there)) or "none"
        raise CheckpointError(f"{storage} has no checkpoint of step {step}; there are {steps}")
    return Trained(records, config, checkpoint.load(storage, step, records.run_id))
