"""A pixel-space DDPM, made on the spot."""

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel


@pytest.fixture(scope="session")
def ddpm(tmp_path_factory) -> str:
    """A DDPM of google/ddpm-cifar10-32's classes, with random weights."""
    folder = tmp_path_factory.mktemp("ddpm")
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=16, layers_per_block=1, block_out_channels=(16, 16), norm_num_groups=8, attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=1000)).save_pretrained(folder)
    return str(folder)
