"""How far an image is from its clean prediction, V_t = E|x_0 - xhat(x_t)|^2 / D: what of the image's own variance given
x_t the posterior's variance leaves out (flow_kernels.py). It is t^2 times the flow-matching loss at t.

Images are drawn without noise in many steps, then noised: on a path of few steps the image varies too little, and with
it whatever is measured there (of normal data with 10 steps by half)."""

import numpy as np
import torch

from diffusion import gpu_memory, noise
from diffusion.base_model import BaseModel
from diffusion.settings import RolloutSettings
from diffusion.trajectory import Chunk

STEPS = 50  # of an image, at least


@torch.no_grad()
def spread(model: BaseModel, settings: RolloutSettings, chunk: Chunk) -> np.ndarray:
    """[B, N] float32: |x_0 - xhat(x_t)|^2 / D at each timestep of the settings' grid, guided as they are, of one image
    x_0 and one x_t of it for each prompt of the chunk."""

    def draw(step: int) -> torch.Tensor:
        drawn = noise.normal(chunk.seed, noise.EVALUATION, chunk.epoch, chunk.trajectory_ids, step, model.latent_shape)
        return gpu_memory.to_device(drawn, model.device)

    def output(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return model.predict(x, t, embeddings, settings.guidance)[0]

    embeddings, image, errors = model.embed(chunk.prompts), draw(noise.INITIAL_STATE), []
    fine = model.kernel(max(STEPS, settings.num_steps))
    for label in fine.timesteps.tolist():
        t = torch.full((len(image),), label, device=model.device)
        image = fine.without_noise(output(image, t), t, image)
    kernel = model.kernel(settings.num_steps)  # from here on `predict` goes by its labels again
    for step, label in enumerate(kernel.timesteps.tolist(), 1):
        t = torch.full((len(image),), label, device=model.device)
        signal, deviation = (part.sqrt().reshape(-1, 1, 1, 1) for part in (kernel.abar(t), kernel.noise(t)))
        x = signal * image + deviation * draw(step)
        errors.append((image - kernel.clean(output(x, t), t, x)).square().flatten(1).mean(1))
    return torch.stack(errors, 1).cpu().numpy()
