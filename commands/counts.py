"""What `--plan` counts: the cost of one sample through each network, and an epoch's work."""

from __future__ import annotations

from dataclasses import dataclass

from commands import memory


@dataclass(frozen=True)
class Costs:
    """One sample through each network, in FLOPs, and sizes."""

    unet: float  # forward
    unet_train: float  # forward and backward into the LoRA, with what gradient checkpointing computes again
    decode: float
    tiny: float | None  # decoding by the tiny decoder; None: unknown
    reward: float | None  # of one image; None: unknown
    flow: float  # forward
    flow_train: float  # forward and backward
    latent: int  # D, numbers
    parameters: int  # of the denoising network
    lora: int  # parameters
    lora_b: int  # of them those of the second matrices, which natural steps train
    flow_parameters: int
    held: memory.Memory


@dataclass(frozen=True)
class Work:
    """What an epoch holds."""

    rollout: float  # FLOPs
    decoding: float
    scoring: float
    training: float  # with what the objective prepares
    evaluation: float  # FLOPs of one evaluation
    transitions: int  # trained on
    states_scored: int
    trajectories: int  # bytes of them, of clean predictions and of scores
    checkpoint: int  # bytes, once as many epochs are kept as may be trained on again
    thumbnails: int  # bytes, at most

    version: int  # bytes of the adapter

    @property
    def object_store(self) -> int:
        """Bytes put in an epoch: a version of the adapter by rank 0, and again by the driver, which outlives it; the
        ranks' files of a checkpoint, which the driver writes."""
        return self.trajectories + 2 * self.version + self.checkpoint

    @property
    def flops(self) -> float:
        return self.rollout + self.decoding + self.scoring + self.training
