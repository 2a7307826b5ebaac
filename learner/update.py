"""The learner: GFlowNet updates of the LoRA and the flow network from scored trajectories.

One instance a rank, which holds an equal share of every update's trajectories. Gradients are averaged over ranks
(learner/process_group.py), so any number of ranks does the same update."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from statistics import fmean
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import AdamW

from diffusion import gpu_memory, lora, noise
from diffusion.base_model import BaseModel
from diffusion.failures import RunFailure
from diffusion.trajectory import Scores, Trajectories
from learner import later, process_group, state
from learner.config import Config
from learner.experience import Experience, concatenate, made_up
from learner.fitted_flow import FittedFlow
from learner.natural import Natural
from learner.objectives.base import Loss, Policy, Transitions
from learner.objectives.by_name import OBJECTIVES
from learner.protocol import quarantine, receipts
from learner.protocol.runner import Training
from rewards.mixture import Mixture

Scored = tuple[Trajectories, Scores]
Compute = Callable[[Transitions], dict[str, Tensor]]  # values by name, [b, ...]
ANCHOR = "anchor"  # in Transitions.prepared: outputs that the regulariser holds the policy to
WARM_UP = 0.05  # of the updates, with learner.schedule=linear
MICRO_BATCH = 8  # where no GPU's memory says
MOST = 64  # a larger one gains nothing, and must fit into a chunk's transitions


class NonFiniteGradient(RunFailure, ArithmeticError):
    """An update that would have destroyed the weights; gradients are reduced, so all ranks raise together."""


class Learner:
    """The policy's adapter, the flow network that the objective asks for, and their optimizers: equal on all ranks."""

    def __init__(self, model: BaseModel, flow: nn.Module | None, config: Config) -> None:
        self.model, self.config = model, config
        given = config.sampler
        self.kernel = model.kernel(given.steps, given.eta, given.grid, given.kernel, given.spread)
        self.objective = OBJECTIVES[config.objective.kind](config.objective, self.kernel)
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.policy = Policy(model, config.sampler.guidance)
        self.policy_parameters: list[nn.Parameter] = [p for _, p in lora.named(model.unet)]
        decay = config.learner.weight_decay
        rate, betas = config.learner.learning_rate, (0.9, config.learner.adam_beta2)
        self.policy_optimizer = AdamW(self.policy_parameters, lr=rate, betas=betas, weight_decay=decay)
        # Networks and optimizers whose state_dict a checkpoint has.
        self._parts: dict[str, Any] = {"policy_optimizer": self.policy_optimizer}
        self.flow = flow
        self.flow_parameters: list[nn.Parameter] = [] if flow is None else list(flow.to(model.device).parameters())
        if flow is not None:
            decay = decay if config.flow.weight_decay is None else config.flow.weight_decay
            self.flow_optimizer = AdamW(self.flow_parameters, lr=config.flow.learning_rate, weight_decay=decay)
            self._parts |= {"flow": flow, "flow_optimizer": self.flow_optimizer}
        # The last epochs, update by update, for flow-only fits and replayed policy updates.
        self.replay: deque[list[list[Experience]]] = deque(maxlen=config.kept_epochs)
        self.published = lora.snapshot(model.unet, 0)
        self.recent = {0: self.published.sha256}  # by version: whose trajectories train.max_staleness lets in
        natural = config.learner.optimizer == "natural"
        self.natural = Natural(self.policy, self.objective, flow, self.rank) if natural else None
        fitted = self.objective.needs.fitted_flow
        self.fitted_flow = FittedFlow(self.policy, self.kernel, config) if fitted else None
        mixture = Mixture.of(config.reward.name, config.reward.options)
        self.mixture = mixture if mixture and mixture.normalise != "none" else None
        self.stood_still = False  # a natural step found nothing to do: the next version may equal the last
        self.micro_batch = config.learner.micro_batch or MICRO_BATCH
        self.tell: Callable[[int, int], None] = lambda done, total: None  # transitions of the epoch trained; all of it
        self._done = self._total = 0

    def fit_micro_batch(self, share: float = 1.0) -> int:
        """Unless the config gives one, the largest micro-batch that every rank's `share` of the free GPU memory holds.
        Gradients depend on it in their last bits: a run's checkpoints keep it."""
        if self.config.learner.micro_batch is None and self.model.device.type == "cuda":
            with gpu_memory.smaller("learner.micro_batch", 1):
                fits = gpu_memory.largest_batch(self._try_micro_batch, self.model.device, MOST, share)
            self.micro_batch = min(process_group.gather(fits))
        return self.micro_batch

    def _try_micro_batch(self, size: int) -> None:
        """One forward and backward pass of `size` made-up transitions; networks and objective stay as they are."""
        batch = made_up(size, self.model, self.kernel.timesteps.tolist(), self.objective.needs.reward_gradients)
        before = deepcopy(self.objective.memory)
        self.objective.begin_epoch((0, 1), ("", ""), (0.0, 1.0), np.zeros((2, self.objective.group), np.float32), 1.0)
        batch.prepared |= self.objective.prepare(self.policy, batch)
        self.loss(batch, 1.0)[0].backward()
        self.objective.memory = before
        for parameter in [*self.policy_parameters, *self.flow_parameters]:
            parameter.grad = None

    def rest(self) -> None:  # between turns on a shared GPU
        gpu_memory.release(self.model.device)

    def publish(self, version: int) -> lora.Snapshot:
        """The adapter as it stands, as this version. Raises StaleWeights if it is bitwise the one before."""
        fresh = lora.snapshot(self.model.unet, version)
        if not self.stood_still:
            receipts.check_moved(self.published, fresh)
        self.published = fresh
        recent, oldest = {**self.recent, version: fresh.sha256}, version - self.config.train.max_staleness
        self.recent = {number: sha256 for number, sha256 in recent.items() if number >= oldest}
        return fresh

    def train_epoch(
        self, epoch: int, beta: float, updates: Sequence[Sequence[Scored]], offset: float | None = None
    ) -> Training:
        """A step of the policy for each of `updates`, this rank's share of that update; then train.replay_updates more,
        each on an update of an earlier epoch. `offset`: objective.reward_offset, where the config leaves it open.
        Raises StaleWeights, GroupBroken or OutOfMemory."""
        if offset is not None:
            objective = self.config.objective.model_copy(update={"reward_offset": offset})
            self.config = self.config.model_copy(update={"objective": objective})
        scored = [pair for update in updates for pair in update]
        for trajectories, _ in scored:
            receipts.check(trajectories, self.recent, f"chunk {trajectories.chunk.index} of epoch {epoch}")
        fresh = [[Experience(*quarantine.replaced(*pair)) for pair in update] for update in updates]
        with gpu_memory.smaller("learner.micro_batch", self.micro_batch):
            parts = process_group.gather(self._all_updates(epoch, beta, fresh))
        # Means over ranks, whose rows have the same names.
        rows = [{name: fmean(part[i][name] for part in parts) for name in row} for i, row in enumerate(parts[0])]
        names = sorted({name for row in rows for name in row})
        means = {name: fmean(row[name] for row in rows if name in row) for name in names}
        if self.config.train.max_staleness:
            versions = [sampled.policy_version for sampled, _ in scored for _ in sampled.chunk.trajectory_ids]
            lags = [self.published.version - version for part in process_group.gather(versions) for version in part]
            means |= {"staleness_mean": fmean(lags), "staleness_max": float(max(lags))}
        trained = tuple(number for _, scores in scored for number in scores.good_ids)
        return Training(means, rows, trained, tuple(bad for pair in scored for bad in quarantine.set_aside(*pair)))

    def _all_updates(self, epoch: int, beta: float, fresh: list[list[Experience]]) -> list[dict[str, float]]:
        """Metrics of each update of the epoch, those of earlier epochs last."""
        train = self.config.train
        told = self._prepare([experience for update in fresh for experience in update], beta)
        if self.natural is not None:
            return self._natural_updates(epoch, beta, fresh)
        earlier = [update for part in list(self.replay)[-train.replay_epochs :] for update in part]
        if self.fitted_flow is not None:  # what earlier epochs were to match is of earlier fits, of fewer trajectories
            earlier = fresh
        updates = list(fresh)
        for index in range(len(fresh), len(fresh) + (train.replay_updates if earlier else 0)):
            # The same draws on every rank: each holds its share of the same past update.
            draws = noise.generator(self.config.run.seed, noise.PAST_UPDATES, epoch, index)
            updates.append(earlier[draws.integers(len(earlier))])
        if self.replay.maxlen:
            whole = train.replay_updates > 0 and self.fitted_flow is None
            self.replay.append([[each.kept(whole) for each in update] for update in fresh])
        updates[1:] = map(self._anchored, updates[1:])
        self._done, self._total = 0, sum(len(experience) for update in updates for experience in update)
        rows = [told | self._train(epoch, index, beta, update) for index, update in enumerate(updates)]
        for row, update in zip(rows[len(fresh) :], updates[len(fresh) :], strict=True):
            row["replay_age"] = float(self.published.version - update[0].trajectories.policy_version)
        return rows

    def _natural_updates(self, epoch: int, beta: float, fresh: list[list[Experience]]) -> list[dict[str, float]]:
        """Every step is over all trajectories: the updates of an epoch are Gauss-Newton steps on the same ones."""
        assert self.natural is not None
        past = list(self.replay)[-(self.config.learner.natural_epochs - 1) :] if self.replay.maxlen else []
        earlier = [each for part in past for update in part for each in update]
        if self.replay.maxlen:
            self.replay.append([[each.kept(False) for each in update] for update in fresh])
        own, rows = [each for update in fresh for each in update], []
        for index in range(len(fresh)):
            flow = self.config.flow
            steps = flow.fit_steps + (flow.warmup_steps if epoch == index == 0 else 0)
            fitted = self._fit_flow(epoch, index, beta, steps) if steps else {}
            rows.append(fitted | self.natural.step(self.config, self.micro_batch, own, earlier, beta))
            self.tell(index + 1, len(fresh))
        self.stood_still = not any(row["length"] for row in rows)
        return rows

    def _prepare(self, experiences: Sequence[Experience], beta: float) -> dict[str, float]:
        """Let the objective compute what it needs once an epoch; metrics."""
        # Id, prompt, reward, nats, and scores by the reward's parts where they are standardised, of each image.
        mine: list[tuple[int, str, float, list[float], list[float]]] = []
        labels = tuple(self.mixture.weights) if self.mixture else ()
        offset = self.config.objective.reward_offset or 0.0
        for experience in experiences:
            chunk, rewards = experience.trajectories.chunk, (experience.scores.rewards[:, -1] - offset).tolist()
            nats = self.objective.nats(experience.trajectories).tolist()
            by_part = [[float(experience.scores.parts[label][row]) for label in labels] for row in range(len(rewards))]
            mine += zip(chunk.trajectory_ids, chunk.prompts, rewards, nats, by_part, strict=True)
        everyone = sorted(row for part in process_group.gather(mine) for row in part)
        ids, prompts, raw, nats, parts = zip(*everyone, strict=True)
        if self.mixture is not None:
            raw = tuple(self.mixture.trained(ids, prompts, parts))
        self.objective.begin_epoch(ids, prompts, raw, np.asarray(nats, np.float32), beta)
        told = {}
        if self.fitted_flow is not None:
            kept = [experience for epoch in self.replay for update in epoch for experience in update]
            told = self.fitted_flow.prepare(experiences, kept, beta, self.micro_batch)
        for experience in experiences:
            computed = self._by_transition(experience, lambda batch: self.objective.prepare(self.policy, batch))
            experience.prepared |= computed
            if self.objective.needs.adjoint:
                experience.prepared |= self._carried_back(experience)
            experience.scores = replace(experience.scores, gradients=None, gradient_row=None, parts={})
        return told

    def _carried_back(self, experience: Experience) -> dict[str, np.ndarray]:
        """[B, K, ...], a micro-batch of trajectories at a time; only the selected transitions'."""
        trajectories, scores, device = experience.trajectories, experience.scores, self.model.device
        chunk, first = trajectories.chunk, self.config.objective.span(len(trajectories.timesteps))[0]
        assert scores.gradients is not None and scores.gradient_row is not None
        parts = []
        for start in range(0, len(chunk.prompts), self.micro_batch):
            rows = slice(start, start + self.micro_batch)
            states = gpu_memory.to_device(trajectories.states[rows], device).float()
            at_image = gpu_memory.to_device(scores.gradients[scores.gradient_row[rows, -1]], device)
            times, embeddings = trajectories.timesteps.tolist(), self.model.embed(chunk.prompts[rows])
            noisy = self.config.noise_steps
            parts.append(self.objective.carry_back(self.policy, states, times, noisy, embeddings, at_image))
        places = (trajectories.selected - first)[:, :, None, None, None]
        joined = {name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in parts[0]}
        return {name: np.take_along_axis(values, places, 1) for name, values in joined.items()}

    def _windows(self, experience: Experience) -> list[list[np.ndarray]]:
        return experience.windows(self.micro_batch, self.objective.group, self.objective.needs.compares_groups)

    def _by_transition(self, experience: Experience, compute: Compute) -> dict[str, np.ndarray]:
        """What `compute` returns of each micro-batch, as arrays [B, K, ...] by selected transition."""
        positions = [part for window in self._windows(experience) for part in window]
        values: list[dict[str, Tensor]] = []
        for part in positions:
            values.append(compute(experience.gather(part, self.model, self.config)))
            if not values[0]:  # nothing to compute
                return {}
        place = np.argsort(np.concatenate(positions)).reshape(experience.trajectories.selected.shape)
        return {name: torch.cat([part[name] for part in values]).cpu().numpy()[place] for name in values[0]}

    def _train(self, epoch: int, index: int, beta: float, update: Sequence[Experience]) -> dict[str, float]:
        """One update of an epoch, after the flow-only steps that precede it."""
        flow = self.config.flow
        steps = flow.fit_steps + (flow.warmup_steps if epoch == index == 0 else 0)
        metrics = self._fit_flow(epoch, index, beta, steps) if steps else {}
        self._set_rate(epoch, index)
        metrics |= later.hold(update, self.config, self.policy, self.kernel, self.micro_batch)
        batches = (batch for experience in update for batch in self._micro_batches(experience, beta))
        # The first update starts where the regulariser holds the policy: nothing to hold yet (see _anchored).
        held = index > 0 or not self._off_policy(update)
        return metrics | self.update(batches, sum(map(len, update)), beta, held)

    def _set_rate(self, epoch: int, index: int) -> None:
        """The policy's learning rate of this update."""
        share = 1.0
        if self.config.learner.schedule == "linear":
            every = self.config.steps_per_epoch
            done, total = epoch * every + index, self.config.train.epochs * every
            share = max(0.0, min((done + 1) / (WARM_UP * total), (1 - done / total) / (1 - WARM_UP), 1.0))
        for parameters in self.policy_optimizer.param_groups:
            parameters["lr"] = self.config.learner.learning_rate * share

    def _off_policy(self, update: Sequence[Experience]) -> bool:
        return any(each.trajectories.policy_version != self.published.version for each in update)

    def _anchored(self, update: Sequence[Experience]) -> list[Experience]:
        """Where an earlier policy sampled, have the regulariser hold the policy to what it is before the epoch's
        updates: to hold it to what it was then would take back what it has learned since (ADR 22)."""
        if not self.config.objective.regulariser or not self._off_policy(update):
            return list(update)
        with torch.no_grad():
            anchors = [self._by_transition(each, lambda batch: {ANCHOR: self.policy.output(batch)}) for each in update]
        return [replace(each, prepared=each.prepared | anchor) for each, anchor in zip(update, anchors, strict=True)]

    def _fit_flow(self, epoch: int, index: int, beta: float, steps: int) -> dict[str, float]:
        """Flow-only steps on replayed rollouts, with the log p_F that the sampler stored."""
        assert self.flow is not None
        recent = list(self.replay)[-self.config.flow.replay_epochs :]
        pool = [experience for part in recent for update in part for experience in update]
        rng = noise.generator(self.config.run.seed, noise.REPLAY, epoch, index, self.rank)
        losses = []
        for _ in range(steps):
            pick = rng.integers(0, len(pool), 4)
            each = max(1, self.config.flow.batch // len(pick))
            parts = [pool[i].gather(rng.integers(0, len(pool[i]), each), self.model, self.config) for i in pick]
            loss = self.objective.flow_loss(concatenate(parts), self.flow, beta)
            loss.backward()
            process_group.average_gradients(self.flow_parameters)
            self._step(self.flow_optimizer, self.flow_parameters)
            losses.append(loss.detach())
        return {"flow_loss": torch.stack(losses).double().mean().item()}

    def _micro_batches(self, experience: Experience, beta: float) -> Iterator[Transitions]:
        """The chunk's transitions, window by window: what an objective compares is in one window."""
        for window in self._windows(experience):
            batches = [experience.gather(part, self.model, self.config) for part in window]
            self.objective.prepare_window(self.policy, batches, self.flow, beta)
            yield from batches

    def update(self, batches: Iterable[Transitions], count: int, beta: float, held: bool = True) -> dict[str, float]:
        """One policy step (and flow step, when the two train on one loss) on the mean over all `count` transitions,
        with the regulariser if `held`. Returns the loss's parts, and gradient norms before clipping."""
        joint = self.flow is not None and self.config.flow.fit_steps == 0
        sums: dict[str, Tensor] = {}  # on the device: reading them out would make the host wait
        for batch in batches:
            loss, parts = self.loss(batch, beta, joint, held)
            share = len(batch.t) / count
            (loss * share).backward()
            self._done += len(batch.t)
            self.tell(self._done, self._total)
            for name, value in parts.items():
                sums[name] = sums.get(name, 0.0) + value.double() * share
        process_group.average_gradients(self.policy_parameters + (self.flow_parameters if joint else []))
        totals = {name: value.item() for name, value in sums.items()}
        totals["grad_norm"] = self._step(self.policy_optimizer, self.policy_parameters)
        if joint:
            totals["flow_grad_norm"] = self._step(self.flow_optimizer, self.flow_parameters)
        return totals

    def loss(self, batch: Transitions, beta: float, flow_gradient: bool = True, held: bool = True) -> Loss:
        """The objective's loss of a batch and the regulariser, means over its transitions, with its parts detached."""
        if self.objective.needs.reward_gradients and self.flow is not None:  # the reverse loss differentiates by x
            batch.x.requires_grad_()
        output = self.policy.output(batch)
        loss, parts = self.objective.loss(batch, output, self.flow, beta, flow_gradient)
        drift = (output - batch.output_old).square().mean()
        if held:
            anchor = batch.prepared.get(ANCHOR)
            moved_by = drift if anchor is None else (output - anchor).square().mean()
            loss = loss + self.config.objective.regulariser * moved_by
        with torch.no_grad():
            moved = self.kernel.mean(output, batch.t, batch.x) - self.kernel.mean(batch.output_old, batch.t, batch.x)
            kl = (moved.square().flatten(1).sum(1) / (2 * self.kernel.variance(batch.t))).mean()
        parts = {"loss": loss, **parts, "drift": drift, "kl": kl}
        return loss, {name: value.detach() for name, value in parts.items()}

    def _step(self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> float:
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.learner.max_grad_norm)
        if not torch.isfinite(norm):
            raise NonFiniteGradient(
                f"the gradient is not finite (norm {norm.item()}): the adapter of version {self.published.version} is "
                "kept; go on with the same command, its run.dir, and a lower learner.learning_rate, "
                "flow.learning_rate or objective.beta"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm.item()

    def state_files(self) -> dict[str, bytes]:
        """What this rank adds to a checkpoint: the rollouts that it may still train on; rank 0 also networks,
        optimizers and, under lora/, the adapter for other programs."""
        files = {state.replay_file(self.rank): state.dump_replay(self.replay)}
        if self.rank == 0:
            files |= {f"lora/{name}": content for name, content in lora.files(self.model.unet).items()}
            saved = {name: part.state_dict() for name, part in self._parts.items()}
            saved |= {"version": self.published.version, "recent": self.recent, "objective": self.objective.memory}
            saved["adapter"] = torch.from_numpy(np.array(self.published.flat))
            files[state.LEARNER_FILE] = state.dump(saved)
        return files

    def restore(self, files: dict[str, bytes]) -> None:
        """Go on from a checkpoint's files, made by as many ranks as there are now. Raises an UnusableState."""
        try:
            saved = state.parse(files[state.LEARNER_FILE])
            lora.load(self.model.unet, saved["adapter"].numpy())
            for name, part in self._parts.items():
                part.load_state_dict(saved[name])
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise state.UnusableState(
                f"{state.LEARNER_FILE} is not of this run ({error!r:.100}): {state.REMEDY}"
            ) from error
        for parameters in self.policy_optimizer.param_groups:  # lower now, perhaps
            parameters["lr"] = self.config.learner.learning_rate
        for parameters in self.flow_optimizer.param_groups if self.flow is not None else ():
            parameters["lr"] = self.config.flow.learning_rate
        self.objective.memory = saved["objective"]
        self.replay.clear()
        self.replay.extend(state.parse_replay(files[state.replay_file(self.rank)]))
        self.published = lora.snapshot(self.model.unet, saved["version"])
        self.recent = dict(saved["recent"])
