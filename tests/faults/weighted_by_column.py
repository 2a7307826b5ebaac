"""A reward that needs a column of the prompt file. Here Ray's workers find it."""

import torch


class Redder:
    columns = ("weight",)

    def __call__(self, images, prompts, metadata):
        weights = torch.tensor([float(row["weight"]) for row in metadata], device=images.device)
        return weights * images[:, 0].mean((1, 2))
