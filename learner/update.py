"""The learner: GFlowNet updates of the LoRA and the flow network from scored trajectories.

Plain Python and torch; one instance a rank. With several ranks each holds an equal share of every update's
trajectories and DistributedDataParallel averages the gradients, so any number of ranks does the same update.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from diffusion import lora, noise
from diffusion.base_model import BaseModel
from diffusion.trajectory import Scores, Trajectories
from learner import receipts, state
from learner.config import Config
from learner.flow import FlowNetwork
from learner.objectives import db

Scored = tuple[Trajectories, Scores]


class NonFiniteGradient(ArithmeticError):
    """An update that would have destroyed the weights; gradients are reduced, so all ranks raise together."""


@dataclass(frozen=True)
class Training:
    """What an epoch of training did, means over ranks: loss, residual^2, drift (squared change of the output since
    rollout), kl (nats a transition, rollout policy to current), gradient norms, flow loss."""

    metrics: dict[str, float]  # means over the epoch's updates
    updates: list[dict[str, float]]  # the same of each update
    trajectory_ids: tuple[int, ...]  # this rank's, in the order trained


@dataclass
class Transitions:
    """A batch of b transitions, tensors on the learner's device. Rewards are raw."""

    x: Tensor  # [b, C, H, W]
    x_next: Tensor  # [b, C, H, W]
    t: Tensor  # [b] int64
    t_next: Tensor  # [b] int64
    embeddings: Tensor  # [b, L, E]
    reward: Tensor  # [b] of the clean prediction at x
    reward_next: Tensor  # [b] of the clean prediction at x_next
    reward_terminal: Tensor  # [b] of the terminal state
    terminal: Tensor  # [b] bool: x_next is the state whose flow is the reward
    log_pf_old: Tensor  # [b] nats, summed over dimensions, of the rollout
    output_old: Tensor  # [b, C, H, W] guided output of the rollout; [b, 0, H, W] in flow-only fits, which need none

    @classmethod
    def concatenate(cls, parts: Sequence[Transitions]) -> Transitions:
        return cls(**{field.name: torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)})


class Learner:
    """Holds the policy's adapter, the flow network and their optimizers."""

    def __init__(self, model: BaseModel, flow: FlowNetwork, config: Config) -> None:
        """`model` has its adapter attached. Wraps both networks in DDP if a process group is there."""
        self.model, self.config, self.objective = model, config, config.objective
        self.kernel = model.kernel(config.sampler.steps, config.sampler.eta)
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.unet: nn.Module = self._parallel(model.unet)
        self.flow: nn.Module = self._parallel(flow.to(model.device))
        self.policy_parameters: list[nn.Parameter] = [p for _, p in lora.named(model.unet)]
        self.flow_parameters: list[nn.Parameter] = list(flow.parameters())
        decay = config.learner.weight_decay
        self.policy_optimizer = AdamW(self.policy_parameters, lr=config.learner.learning_rate, weight_decay=decay)
        self.flow_optimizer = AdamW(self.flow_parameters, lr=config.flow.learning_rate, weight_decay=decay)
        self.replay: deque[list[Scored]] = deque(maxlen=config.flow.replay_epochs)
        self.published = lora.snapshot(model.unet, 0)

    def _parallel(self, module: nn.Module) -> nn.Module:
        return DistributedDataParallel(module) if self.world_size > 1 else module

    def publish(self, version: int) -> lora.Snapshot:
        """The adapter as it stands, as this version; later trajectories must carry its hash.

        Raises:
            StaleWeights: it is bitwise the one before.
        """
        fresh = lora.snapshot(self.model.unet, version)
        receipts.check_moved(self.published, fresh)
        self.published = fresh
        return fresh

    def train_epoch(self, epoch: int, beta: float, updates: Sequence[Sequence[Scored]]) -> Training:
        """One optimizer step of the policy for each element of `updates`, this rank's share of that update.

        Raises:
            StaleWeights: trajectories of another adapter than the published one.
        """
        for trajectories, _ in (scored for update in updates for scored in update):
            receipts.check(trajectories, self.published, f"chunk {trajectories.chunk.index} of epoch {epoch}")
        if self.config.flow.fit_steps or self.config.flow.warmup_steps:
            self.replay.append([(_without_output(made), scores) for update in updates for made, scores in update])
        rows: list[dict[str, float]] = []
        for index, update in enumerate(updates):
            steps = self.config.flow.fit_steps + (self.config.flow.warmup_steps if epoch == index == 0 else 0)
            metrics = self._fit_flow(epoch, index, beta, steps) if steps else {}
            batches = (batch for scored in update for batch in self._micro_batches(scored))
            rows.append(metrics | self.update(batches, sum(scored[0].selected.size for scored in update), beta))
        names = sorted({name for row in rows for name in row})
        table = torch.tensor([[row.get(name, np.nan) for name in names] for row in rows], dtype=torch.float64)
        table = table.to(self.model.device)
        if self.world_size > 1:
            dist.all_reduce(table)
            table /= self.world_size
        means = dict(zip(names, table.nanmean(0).tolist(), strict=True))
        each = [
            {name: value for name, value in zip(names, row, strict=True) if not np.isnan(value)}
            for row in table.tolist()
        ]
        trained = (number for update in updates for made, _ in update for number in made.chunk.trajectory_ids)
        return Training(means, each, tuple(trained))

    def state_files(self) -> dict[str, bytes]:
        """What this rank adds to a checkpoint: the rollouts that its flow fits draw from, and from rank 0, being equal
        on all ranks, networks, optimizers and, under lora/, the adapter for other programs."""
        files = {state.replay_file(self.rank): state.dump_replay(self.replay)}
        if self.rank == 0:
            files |= {f"lora/{name}": content for name, content in lora.files(self.model.unet).items()}
            files[state.LEARNER_FILE] = state.dump(
                {
                    "version": self.published.version,
                    "adapter": torch.from_numpy(np.array(self.published.flat)),
                    "flow": _unwrap(self.flow).state_dict(),
                    "policy_optimizer": self.policy_optimizer.state_dict(),
                    "flow_optimizer": self.flow_optimizer.state_dict(),
                }
            )
        return files

    def restore(self, files: dict[str, bytes]) -> None:
        """Go on from a checkpoint's files, made by as many ranks as there are now."""
        saved = state.parse(files[state.LEARNER_FILE])
        lora.load(self.model.unet, saved["adapter"].numpy())
        _unwrap(self.flow).load_state_dict(saved["flow"])
        self.policy_optimizer.load_state_dict(saved["policy_optimizer"])
        self.flow_optimizer.load_state_dict(saved["flow_optimizer"])
        self.replay.clear()
        self.replay.extend(state.parse_replay(files[state.replay_file(self.rank)]))
        self.published = lora.snapshot(self.model.unet, saved["version"])

    def update(self, batches: Iterable[Transitions], count: int, beta: float) -> dict[str, float]:
        """One policy step (and flow step, when the two train on one loss) on the mean over all `count` transitions
        of the micro-batches; returns the loss's parts and the gradient norms before clipping.

        Raises:
            NonFiniteGradient: the network whose gradient it was is unchanged.
        """
        joint = self.config.flow.fit_steps == 0
        nets = [self.unet, self.flow] if joint else [self.unet]
        totals: dict[str, float] = {}
        done = 0
        for batch in batches:
            done += len(batch.t)
            with self._sync_last(nets, done == count):
                loss, parts = self.loss(batch, beta, flow_gradient=joint)
                share = len(batch.t) / count
                (loss * share).backward()
            for name, value in parts.items():
                totals[name] = totals.get(name, 0.0) + value.item() * share
        totals["grad_norm"] = self._step(self.policy_optimizer, self.policy_parameters)
        if joint:
            totals["flow_grad_norm"] = self._step(self.flow_optimizer, self.flow_parameters)
        return totals

    def loss(self, batch: Transitions, beta: float, flow_gradient: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
        """DAG-DB loss of a batch, mean over its transitions, with its parts detached."""
        objective, kernel = self.objective, self.kernel
        output, _ = self.model.predict(batch.x, batch.t, batch.embeddings, self.config.sampler.guidance, self.unet)
        log_pf = kernel.log_pf(output, batch.t, batch.x, batch.x_next, objective.log_prob_reduction)
        delta = self.residual(batch, log_pf, beta, flow_gradient)
        variance = kernel.variance(batch.t)
        weights = db.transition_weights(variance, self._grid_variance(), objective.transition_weight)
        balance = (weights * db.penalty(delta, objective.penalty, objective.huber_width)).mean()
        drift = (output - batch.output_old).square().mean()
        loss = balance + objective.regulariser * drift
        with torch.no_grad():
            moved = kernel.mean(output, batch.t, batch.x) - kernel.mean(batch.output_old, batch.t, batch.x)
            kl = (moved.square().flatten(1).sum(1) / (2 * variance)).mean()
        parts = {"loss": loss, "balance": balance, "drift": drift, "kl": kl, "residual_squared": delta.square().mean()}
        return loss, {name: value.detach() for name, value in parts.items()}

    def residual(self, batch: Transitions, log_pf: Tensor, beta: float, flow_gradient: bool) -> Tensor:
        """delta [b] of the batch under the current flow network (Eq. 8), rewards multiplied by beta."""
        objective = self.objective
        with contextlib.nullcontext() if flow_gradient else torch.no_grad():
            both = self.flow(
                torch.cat([batch.x, batch.x_next]),
                torch.cat([batch.t, batch.t_next]),
                torch.cat([batch.embeddings, batch.embeddings]),
            )
        f, f_next = both.chunk(2)
        scale = beta if objective.forward_looking != "none" else 0.0
        psi, psi_next = (
            scale * db.gamma(self.kernel.abar(t), objective.forward_looking_decay) * reward
            for t, reward in ((batch.t, batch.reward), (batch.t_next, batch.reward_next))
        )
        log_flow_next = db.next_log_flow(
            f_next, psi_next, beta * batch.reward_terminal, batch.terminal, objective.detach_next_flow
        )
        log_pb = self.kernel.log_pb(batch.t, batch.x, batch.x_next, objective.log_prob_reduction)
        return db.residual(db.log_flow(f, psi), log_pf, log_pb, log_flow_next)

    def _fit_flow(self, epoch: int, update: int, beta: float, steps: int) -> dict[str, float]:
        """Flow-only steps on replayed rollouts, with the log p_F that the sampler stored."""
        pool = [scored for part in self.replay for scored in part]
        rng = noise.generator(self.config.run.seed, noise.REPLAY, epoch, update, self.rank)
        losses = []
        per_dim = self.dimensions if self.objective.log_prob_reduction == "mean" else 1
        for _ in range(steps):
            pick = rng.integers(0, len(pool), 4)
            each = max(1, self.config.flow.batch // len(pick))
            parts = [self._gather(pool[i], rng.integers(0, pool[i][0].selected.size, each)) for i in pick]
            batch = Transitions.concatenate(parts)
            delta = self.residual(batch, batch.log_pf_old / per_dim, beta, flow_gradient=True)
            loss = db.penalty(delta, self.objective.penalty, self.objective.huber_width).mean()
            loss.backward()
            self._step(self.flow_optimizer, self.flow_parameters)
            losses.append(loss.item())
        return {"flow_loss": float(np.mean(losses))}

    @property
    def dimensions(self) -> int:
        """D: numbers in one latent."""
        return int(np.prod(self.model.latent_shape))

    def _micro_batches(self, scored: Scored) -> Iterator[Transitions]:
        flat = np.arange(scored[0].selected.size)
        for start in range(0, len(flat), self.config.learner.micro_batch):
            yield self._gather(scored, flat[start : start + self.config.learner.micro_batch])

    def _gather(self, scored: Scored, flat: np.ndarray) -> Transitions:
        """The transitions at positions `flat` of selected.ravel()."""
        trajectories, scores = scored
        row, column = np.unravel_index(flat, trajectories.selected.shape)
        step = trajectories.selected[row, column]
        n = len(trajectories.timesteps)
        end = n - 1 if self.objective.last_transition == "skip" else n
        device = self.model.device

        def tensor(array: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device)

        times = np.append(trajectories.timesteps, 0)
        # States without a reward have psi = 0 (forward_looking none, or before forward_looking_from).
        rewards = np.nan_to_num(scores.rewards - np.float32(self.objective.reward_offset))
        return Transitions(
            x=tensor(trajectories.states[row, step]),
            x_next=tensor(trajectories.states[row, step + 1]),
            t=tensor(times[step]),
            t_next=tensor(times[step + 1]),
            embeddings=self.model.embed([trajectories.chunk.prompts[r] for r in row]),
            reward=tensor(rewards[row, step]),
            reward_next=tensor(rewards[row, step + 1]),
            reward_terminal=tensor(rewards[row, end]),
            terminal=tensor(step + 1 >= end),
            log_pf_old=tensor(trajectories.log_pf[row, step]),
            output_old=tensor(trajectories.model_output[row, column]),
        )

    def _grid_variance(self) -> Tensor:
        return self.kernel.variance(self.kernel.timesteps)

    def _sync_last(self, nets: Sequence[nn.Module], last: bool) -> contextlib.ExitStack:
        """Gradients are exchanged once an update, in its last backward pass."""
        stack = contextlib.ExitStack()
        for net in nets:
            if isinstance(net, DistributedDataParallel) and not last:
                stack.enter_context(net.no_sync())
        return stack

    def _step(self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> float:
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.learner.max_grad_norm)
        if not torch.isfinite(norm):
            raise NonFiniteGradient(
                f"the gradient is not finite (norm {norm.item()}): the adapter of version {self.published.version} is "
                "kept; lower the learning rates or objective.beta"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm.item()


def _unwrap(module: nn.Module) -> nn.Module:
    return module.module if isinstance(module, DistributedDataParallel) else module


def _without_output(made: Trajectories) -> Trajectories:
    """For the replay: flow-only fits do not use the rollout's model output, a third of a trajectory's bytes."""
    return replace(made, model_output=made.model_output[:, :, :0].copy())
