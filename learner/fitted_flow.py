"""The log-flow of fitted_nabla_db.py: state by state a regression on what is still to come of each trajectory."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from diffusion import gpu_memory
from diffusion.kernels import GaussianKernel
from learner import process_group
from learner.config import Config
from learner.experience import Experience
from learner.kernel_ridge import KernelRidge
from learner.objectives.base import Policy

MOST_WEIGHT = 5.0  # of a trajectory, in means


class FittedFlow:
    def __init__(self, policy: Policy, kernel: GaussianKernel, config: Config) -> None:
        self.policy, self.kernel, self.config = policy, kernel, config
        self.first, self.end = config.objective.span(kernel.num_steps)
        self.times = kernel.timesteps.tolist()
        self.forward_looking = config.needs.reward_gradients
        terminal = config.rollout_settings().terminal
        self.terminal = len(self.times) if terminal is None else terminal  # whose reward counts

    def prepare(
        self, fresh: Sequence[Experience], kept: Sequence[Experience], beta: float, micro_batch: int
    ) -> dict[str, float]:
        """Adds to `prepared` of the epoch's trajectories, for each of K trained transitions: `reference_output` [B, K,
        C, H, W] at x_k, `clean_next`, the reference's clean prediction at x_k+1, `spent` [B, K] nats, and
        `log_flow_gradient` [B, K, C, H, W] at x_k+1, from these trajectories and `kept` earlier ones of all ranks.
        Metrics: the share of log F's variance that is foretold of trajectories left out, in the first and last state.
        """
        for experience in fresh:
            experience.prepared |= self._by_parts(experience, micro_batch, self._look)
        fits = self._fit([*kept, *fresh], beta)
        for experience in fresh:
            experience.prepared |= self._by_parts(experience, micro_batch, self._log_flow, fits)
        return {"flow_explained_first": fits[0].explained, "flow_explained_last": fits[-1].explained}

    def _by_parts(self, experience: Experience, size: int, compute, *more) -> dict[str, np.ndarray]:
        parts = []
        for start in range(0, len(experience.trajectories.chunk.prompts), size):
            rows = slice(start, start + size)
            states = gpu_memory.to_device(experience.trajectories.states[rows], self.policy.model.device).float()
            parts.append(compute(states, experience, rows, *more))
        return {name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in parts[0]}

    def _reference(self, x: Tensor, step: int, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """The reference's output at the state of this step, and its clean prediction: of the image, itself."""
        t = torch.full((len(x),), self.times[step], device=x.device)
        output = self.policy.reference(x, t, embeddings)
        return output, self.kernel.clean(output, t, x).to(x.dtype)

    @torch.no_grad()
    def _look(self, states: Tensor, experience: Experience, rows: slice) -> dict[str, Tensor]:
        embeddings = self.policy.model.embed(experience.trajectories.chunk.prompts[rows])
        outputs, clean = [], []
        for step in range(self.first, self.end + 1):
            x = states[:, step]
            if step < len(self.times):
                output, predicted = self._reference(x, step, embeddings)
            else:
                predicted = x
            clean.append(predicted)
            outputs.append(output)
        outputs = outputs[: self.end - self.first]
        return {"reference_output": torch.stack(outputs, 1), "clean_next": torch.stack(clean[1:], 1)}

    def _fit(self, experiences: Sequence[Experience], beta: float) -> list[KernelRidge]:
        """Of the states x_k+1 of trained transitions, in their order; the same on all ranks."""
        keys, futures = [], []
        for experience in experiences:
            trajectories = experience.trajectories
            if "spent" not in experience.prepared:
                experience.prepared["spent"] = self._spent(experience)
            spent = experience.prepared["spent"].astype(np.float64)
            behind = np.cumsum(spent[:, ::-1], 1)[:, ::-1] - spent  # of later transitions
            futures.append(beta * experience.scores.rewards[:, [self.terminal]].astype(np.float64) - behind)
            chunk = trajectories.chunk
            keys += [
                (chunk.epoch, number, prompt)
                for number, prompt in zip(chunk.trajectory_ids, chunk.prompts, strict=True)
            ]
        shown = process_group.gather(keys)
        every = [key for part in shown for key in part]
        order = sorted(range(len(every)), key=lambda i: every[i][:2])
        prompts = [every[i][2] for i in order]
        values = torch.cat(process_group.gather(torch.from_numpy(np.concatenate(futures))))[order]
        self._weigh(experiences, beta)
        fits = []
        for k in range(self.end - self.first):  # a state at a time: pictures are large
            mine = torch.from_numpy(np.concatenate([each.prepared["clean_next"][:, k] for each in experiences]))
            pictures = torch.cat(process_group.gather(mine))[order]
            known = None
            if self.forward_looking:
                rewards = [each.scores.rewards[:, self.first + k + 1] for each in experiences]
                known = torch.cat(process_group.gather(torch.from_numpy(np.concatenate(rewards))))[order]
            fits.append(KernelRidge(pictures, prompts, values[:, k], known))
        return fits

    def _weigh(self, experiences: Sequence[Experience], beta: float) -> None:
        """Adds to `prepared` `target_weight` [B, K]: of the epoch's trajectories, what the target's density is to the
        policy's that sampled them, self-normalised within the prompt over all ranks, and at most MOST_WEIGHT."""
        logs = [
            beta * each.scores.rewards[:, self.terminal].astype(np.float64) - each.prepared["spent"].sum(1)
            for each in experiences
        ]
        keys = [
            [(each.trajectories.chunk.epoch, prompt) for prompt in each.trajectories.chunk.prompts]
            for each in experiences
        ]
        mine = [pair for part in zip(keys, logs, strict=True) for pair in zip(*part, strict=True)]
        by_prompt: dict[tuple[int, str], list[float]] = defaultdict(list)
        for part in process_group.gather(mine):
            for key, value in part:
                by_prompt[key].append(value)
        mean = {key: np.logaddexp.reduce(sorted(found)) - np.log(len(found)) for key, found in by_prompt.items()}
        for each, group, log in zip(experiences, keys, logs, strict=True):
            weight = np.exp(log - [mean[key] for key in group]).clip(max=MOST_WEIGHT).astype(np.float32)
            each.prepared["target_weight"] = np.repeat(weight[:, None], self.end - self.first, 1)

    def _spent(self, experience: Experience) -> np.ndarray:
        """[B, K] nats log p_F - log p_ref of the trained transitions, as they were sampled."""
        trajectories, columns = experience.trajectories, []
        for k, step in enumerate(range(self.first, self.end)):
            x, after = (torch.from_numpy(trajectories.states[:, i].astype(np.float32)) for i in (step, step + 1))
            t = torch.full((len(x),), self.times[step])
            output = torch.from_numpy(experience.prepared["reference_output"][:, k])
            columns.append(trajectories.log_pf[:, step] - self.kernel.log_pf(output, t, x, after, "sum").numpy())
        return np.stack(columns, 1).astype(np.float32)

    def _log_flow(
        self, states: Tensor, experience: Experience, rows: slice, fits: Sequence[KernelRidge]
    ) -> dict[str, Tensor]:
        prompts, scores, found = experience.trajectories.chunk.prompts[rows], experience.scores, []
        embeddings = self.policy.model.embed(prompts)
        for step, fit in zip(range(self.first + 1, self.end + 1), fits, strict=True):

            def to_clean(clean: Tensor, step: int = step, fit: KernelRidge = fit) -> Tensor:
                gradient = fit.gradient(clean, prompts)
                if self.forward_looking:
                    assert scores.gradients is not None and scores.gradient_row is not None
                    rewards = gpu_memory.to_device(scores.gradients[scores.gradient_row[rows, step]], clean.device)
                    gradient = gradient + fit.slope * rewards
                return gradient

            x = states[:, step]
            if step == len(self.times):
                found.append(to_clean(x))
                continue
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                _, clean = self._reference(x, step, embeddings)
                found.append(torch.autograd.grad(clean, x, to_clean(clean.detach()))[0])
        return {"log_flow_gradient": torch.stack(found, 1)}
