"""Sampling: denoising trajectories under a frozen policy snapshot, with everything training needs."""

import contextlib

import numpy as np
import torch
from torch import Tensor

from diffusion import calibration, gpu_memory, lora, noise
from diffusion.base_model import BaseModel
from diffusion.settings import RolloutSettings
from diffusion.trajectory import Chunk, CleanPredictions, Nats, Trajectories


class Sampler:
    """A base model with an adapter that is replaced before each chunk. Plain Python; actors/ wraps it."""

    def __init__(self, model: BaseModel, settings: RolloutSettings) -> None:
        """`model` has its adapter attached already."""
        self.model, self.settings = model, settings
        self.kernel = model.kernel(settings.num_steps, settings.eta, settings.grid, settings.kernel, settings.spread)
        self._loaded: tuple[int, str] | None = None
        self._adapted = True  # else it is the reference itself

    def sample(self, chunk: Chunk, snapshot: lora.Snapshot) -> tuple[Trajectories, CleanPredictions]:
        """Roll out the chunk; OutOfMemory if the GPU is too small. The trajectories carry the hash of the adapter as it
        stands in the module, not of what was sent."""
        if self._loaded != (snapshot.version, snapshot.sha256):
            lora.load(self.model.unet, snapshot.flat)
            self._adapted = lora.differs(self.model.unet)
            self._loaded = (snapshot.version, snapshot.sha256)
        with gpu_memory.smaller("sampler.chunk_size", len(chunk.prompts)):
            return self._rollout(chunk, snapshot.version)

    def rest(self) -> None:
        """Between turns on a shared GPU."""
        gpu_memory.release(self.model.device)

    @torch.no_grad()
    def _rollout(self, chunk: Chunk, version: int) -> tuple[Trajectories, CleanPredictions]:
        """Denoise B prompts over the kernel's N steps. Noise is keyed by (seed, epoch, trajectory id, step), so it does
        not matter who calls this. Evaluation chunks select no transitions and score only x_0."""
        model, kernel, settings = self.model, self.kernel, self.settings
        training = chunk.purpose == "train"
        use = noise.ROLLOUT if training else noise.EVALUATION
        batch, n = len(chunk.prompts), kernel.num_steps
        selected, model_output = np.zeros((batch, 0), np.int64), np.zeros((batch, 0, *model.latent_shape), np.float32)
        if training:
            steps, key = (settings.end or n) - settings.first, (chunk.seed, chunk.epoch, chunk.trajectory_ids)
            selected = settings.first + noise.select_transitions(settings.selection, settings.fraction, steps, *key)
        chosen = np.zeros((batch, n + 1), bool)
        np.put_along_axis(chosen, selected, True, axis=1)
        needed = states_with_reward(settings, chosen)
        store = getattr(torch, settings.state_precision)

        def draw(step: int) -> Tensor:
            drawn = noise.normal(chunk.seed, use, chunk.epoch, chunk.noise_ids(step), step, model.latent_shape)
            return gpu_memory.to_device(drawn, model.device)

        embeddings = model.embed(chunk.prompts)
        guided_clean = settings.clean_prediction == "guided"
        x = draw(noise.INITIAL_STATE).to(store).float()
        grid = gpu_memory.to_device(kernel.timesteps.numpy(), model.device)
        states, log_pf, log_pb, outputs, cleans = [x], [], [], [], []
        log_ref, kl = [], []
        noisy = min(n if settings.noise_steps is None else settings.noise_steps, kernel.noisy_steps)
        compare, adapted = settings.reference or not training, self._adapted
        for i in range(n):
            t = grid[i].expand(batch)
            used = settings.adapted is None or settings.adapted[0] <= i < settings.adapted[1]
            with contextlib.nullcontext() if used else model.without_lora():
                guided, conditional = self._predict(chunk, i, x, t, embeddings)
            if training:
                output = guided if guided_clean else conditional
                if settings.forward_looking == "base" and (rows := np.flatnonzero(needed[:, i])).size:
                    at = gpu_memory.to_device(rows, model.device)
                    inputs = x[at], t[at], embeddings[at], settings.guidance if guided_clean else 1.0
                    output = output.index_copy(0, at, model.predict_reference(*inputs))
                cleans.append(kernel.clean(output, t, x).to(store))
            if i < noisy:
                x_next = kernel.sample(guided, t, x, draw(i + 1)).to(store).float()
                log_pf.append(kernel.log_pf(guided, t, x, x_next, "sum"))
                none = torch.zeros_like(log_pf[-1])
                log_pb.append(kernel.log_pb(t, x, x_next, "sum") if kernel.reverses_noising else none)
                if compare:
                    reference = (
                        model.predict_reference(x, t, embeddings, settings.guidance) if adapted and used else guided
                    )
                    log_ref.append(kernel.log_pf(reference, t, x, x_next, "sum"))
                    kl.append(kernel.divergence(guided, reference, t, x))
            else:
                x_next = kernel.without_noise(guided, t, x).to(store).float()
                for each in (log_pf, log_pb, *((log_ref, kl) if compare else ())):
                    each.append(torch.zeros_like(log_pf[0]))
            if training:
                outputs.append(guided.to(store))
            states.append(x_next)
            x = x_next
        if training:
            stacked = torch.stack(outputs, 1).cpu().numpy()
            model_output = np.take_along_axis(stacked, selected[:, :, None, None, None], axis=1)
        trajectories = Trajectories(
            chunk=chunk,
            policy_version=version,
            adapter_sha256=lora.snapshot(model.unet, version).sha256,
            timesteps=kernel.timesteps.numpy(),
            states=torch.stack(states, 1).to(store).cpu().numpy(),
            log_pf=torch.stack(log_pf, 1).cpu().numpy(),
            log_pb=torch.stack(log_pb, 1).cpu().numpy(),
            selected=selected,
            model_output=np.ascontiguousarray(model_output),
            log_ref=torch.stack(log_ref, 1).cpu().numpy() if compare else None,
        )
        nats = None
        if trajectories.log_ref is not None:
            nats = Nats(trajectories.log_pf - trajectories.log_ref, torch.stack(kl, 1).cpu().numpy())
        row, step = np.nonzero(needed)
        latents = torch.stack([*cleans, x.to(store)], 1).cpu().numpy()[row, step if training else np.zeros_like(step)]
        terminal = n if settings.terminal is None or not training else settings.terminal
        measuring = settings.kernel == "calibrated" and settings.spread is None
        spread = calibration.spread(model, settings, chunk) if measuring else None
        clean = CleanPredictions(chunk, n, np.ascontiguousarray(latents), row, step, terminal, nats, spread)
        return trajectories, clean

    def _predict(self, chunk: Chunk, step: int, x: Tensor, t: Tensor, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """Guided and conditional output; of rows that are still one trajectory, one for all."""
        if not chunk.parents:
            return self.model.predict(x, t, embeddings, self.settings.guidance)
        _, first, place = np.unique(chunk.noise_ids(step), return_index=True, return_inverse=True)
        one, back = (gpu_memory.to_device(rows, self.model.device) for rows in (first, place))
        outputs = self.model.predict(x[one], t[one], embeddings[one], self.settings.guidance)
        return outputs[0][back], outputs[1][back]


def states_with_reward(settings: RolloutSettings, chosen: np.ndarray) -> np.ndarray:
    """Which states [B, N+1] need a reward, for transitions `chosen` [B, N+1] (by the step they start from): both
    ends of each, unless psi is 0 there or only the image counts at the last end; the terminal state of training
    and the image itself always do."""
    needed = np.zeros_like(chosen)
    needed[:, -1] = True
    if settings.image_only:
        return needed
    if settings.forward_looking != "none":
        needed |= chosen
        needed[:, 1:] |= chosen[:, :-1]
        needed[:, : settings.from_step] = False
    if settings.end is not None:
        needed[:, settings.end] = chosen.any(axis=1) & (settings.terminal == settings.end or settings.end_scored)
    return needed
