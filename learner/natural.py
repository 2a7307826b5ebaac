"""`learner.optimizer=natural`: steps of an objective's policy part by least squares instead of a learning rate.

A step solves the regression of least_squares.py over all trajectories of the epoch, and of learner.natural_epochs - 1
earlier ones under the present weights; then it tries lengths of the solution on trajectories kept apart (one prompt
group in eight of the epoch), by their real residuals, and takes the best, which may be none. train.updates_per_epoch
such steps are taken (Gauss-Newton: rows and residuals are computed anew for each). Every rank has its own trajectories'
rows; Gram matrix, solution and length are the same on all."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from learner import least_squares, process_group
from learner.config import Config
from learner.experience import Experience
from learner.objectives.base import Flow, Objective, Policy, Transitions
from learner.rows import Rows, trained

LENGTHS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)  # of the solution
APART = 8  # of so many prompt groups one is kept apart
COLUMNS = 1 << 16  # parameters of the rows that ranks show each other at once
Name = tuple[int, int, int, str]  # epoch, trajectory, number of the residual, prompt


@dataclass
class System:
    """Residuals of this rank's trajectories: names, values [N], weights [N], and rows [N, P] in bfloat16 on the CPU."""

    names: list[Name]
    errors: Tensor
    weights: Tensor
    rows: Tensor | None = None


class Natural:
    def __init__(self, policy: Policy, objective: Objective, flow: Flow, rank: int) -> None:
        self.policy, self.objective, self.flow, self.rank = policy, objective, flow, rank
        self.rows = Rows(policy.model.unet)
        self.parameters = [parameter for _, parameter in trained(policy.model.unet)]
        self.sizes = [parameter.numel() for parameter in self.parameters]

    def step(
        self, config: Config, micro_batch: int, fresh: Sequence[Experience], earlier: Sequence[Experience], beta: float
    ) -> dict[str, float]:
        """One step of the weights; metrics. `explained`: share of the residuals' variance that left-out rows explain,
        `length`: of the step in units of the solution, `residual_variance`: mean over residuals kept apart after it,
        in squares of nats, and `residual_before`."""
        self.config, self.micro_batch = config, micro_batch
        fit = [self._system(each, beta, lambda number: not self._is_apart(number)) for each in fresh]
        fit += [self._system(each, beta, lambda number: True) for each in earlier]
        candidates, solution = self._solve(_joined(fit))
        del fit  # the rows are large
        best = before = self._apart(fresh, beta)
        start, taken, length = [parameter.detach().clone() for parameter in self.parameters], candidates[0], 0.0
        for direction in candidates:
            for trial in LENGTHS:
                self._move(start, direction, trial)
                found = self._apart(fresh, beta)
                if found >= best:
                    break
                best, taken, length = found, direction, trial
        self._move(start, taken, length)
        values = {"explained": solution.explained, "length": length, "residual_before": before}
        return values | {"residual_variance": best, "loss": best}

    @torch.no_grad()
    def _move(self, start: Sequence[Tensor], direction: Tensor, length: float) -> None:
        for parameter, origin, part in zip(self.parameters, start, direction.split(self.sizes), strict=True):
            parameter.copy_(origin + length * part.view_as(parameter).to(parameter))

    def _apart(self, fresh: Sequence[Experience], beta: float) -> float:
        """Weighted mean square of the centred residuals of the trajectories kept apart, on all ranks."""
        mine = _joined([self._system(each, beta, self._is_apart, False) for each in fresh])
        names, _, (errors, weights) = _of_all_ranks(mine.names, mine.errors, mine.weights)
        roots = weights.sqrt()
        constants = roots[:, None] * least_squares.columns(self._groups(names))
        return float(least_squares.without(constants, roots * errors).square().sum() / weights.sum())

    def _is_apart(self, number: int) -> bool:
        """Whether the trajectory of this number judges steps."""
        return number // self.config.prompts.per_prompt % APART == APART - 1

    def _groups(self, names: Sequence[Name]) -> Tensor:
        """[N] int64: trajectories of one prompt and epoch share a free constant, if the objective has one."""
        if not self.objective.needs.free_constant:
            return torch.full((len(names),), -1)
        numbers: dict[tuple[int, str], int] = {}
        return torch.tensor([numbers.setdefault((epoch, prompt), len(numbers)) for epoch, _, _, prompt in names])

    def _system(
        self, experience: Experience, beta: float, use: Callable[[int], bool], with_rows: bool = True
    ) -> System:
        """Of one chunk's trajectories whose number `use` accepts."""
        objective = self.objective
        chunk, columns = experience.trajectories.chunk, experience.trajectories.selected.shape[1]
        names: list[Name] = []
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        wanted = {row for row, number in enumerate(chunk.trajectory_ids) if use(number)}
        for window in experience.windows(self.micro_batch, objective.group):
            places = np.concatenate(window) // columns
            if not wanted.issuperset(places.tolist()):
                window = [part[[place in wanted for place in (part // columns).tolist()]] for part in window]
                window = [part for part in window if len(part)]
                if not window:
                    continue
            batches = [experience.gather(part, self.policy.model, self.config) for part in window]
            errors, weights, rows = self._window(batches, beta, with_rows)
            found.append((errors.flatten(), weights.flatten(), rows))
            rows_of = np.concatenate(window)[:: objective.group] // columns
            for place, first in zip(rows_of.tolist(), np.concatenate(window)[:: objective.group].tolist(), strict=True):
                number, prompt = chunk.trajectory_ids[place], chunk.prompts[place]
                names += [(chunk.epoch, number, first % columns + m, prompt) for m in range(errors.shape[1])]
        if not found:
            empty = torch.zeros(0)
            return System(
                [], empty, empty, torch.zeros(0, sum(self.sizes), dtype=torch.bfloat16) if with_rows else None
            )
        errors, weights, rows = map(torch.cat, zip(*found, strict=True))
        return System(names, errors, weights, rows if with_rows else None)

    def _window(self, batches: Sequence[Transitions], beta: float, with_rows: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Residuals [n, M] of whole groups, their weights, and rows [n M, P] (or [0, P])."""
        objective = self.objective
        numbers, rows = [], []
        for batch in batches:
            with self.rows.watched(), torch.set_grad_enabled(with_rows):
                each = objective.numbers(batch, self.policy.output(batch), self.flow, beta)
                numbers.append([value.detach() for value in each])
                if with_rows:
                    rows.append(torch.cat(self.rows.of(each[0]), 1))
        ratio, log_flow, goal = (torch.cat(part).reshape(-1, objective.group) for part in zip(*numbers, strict=True))
        errors, weights = objective.residuals(ratio, log_flow, goal[:, 0])
        slopes = torch.zeros(0, sum(self.sizes))
        if with_rows:
            first = [value[:1] for value in (log_flow, goal[:, 0])]
            jacobian = torch.func.jacrev(lambda one: objective.residuals(one[None], *first)[0][0])(ratio[0])
            by_group = torch.cat(rows).reshape(len(ratio), objective.group, -1)
            slopes = torch.einsum("mk,nkp->nmp", jacobian, by_group).flatten(0, 1)
        return errors.cpu(), weights.expand_as(errors).cpu(), slopes.to(torch.bfloat16).cpu()

    def _solve(self, system: System) -> tuple[list[Tensor], least_squares.Solution]:
        """Directions [P] to try, the same on all ranks: the whole solution, and its scaling of the adapter alone."""
        assert system.rows is not None
        adapter = torch.cat([parameter.detach().flatten() for parameter in self.parameters]).float().cpu()
        parts = [slice(start, start + COLUMNS) for start in range(0, len(adapter), COLUMNS)]
        along = torch.zeros(len(system.names))
        for part in parts:
            along += system.rows[:, part].float() @ adapter[part]
        names, order, (errors, weights, along) = _of_all_ranks(system.names, system.errors, system.weights, along)
        squares = torch.stack([part.float().square().sum() for part in system.rows.split(self.sizes, 1)])
        information = torch.stack(process_group.gather(squares)).sum(0) / len(names) / torch.tensor(self.sizes)
        scale = least_squares.scale(information, self.sizes, self.config.learner.natural_floor)
        gram = torch.zeros(len(names), len(names), dtype=torch.float64)
        for part in parts:
            mine = (system.rows[:, part].float() * scale[part]).to(torch.bfloat16)
            block = torch.cat(process_group.gather(mine))[order].float()
            gram += (block @ block.T).double()
        roots = weights.sqrt()
        constants = least_squares.columns(self._groups(names))
        free = torch.cat([constants, along[:, None]], 1) if along.any() else constants
        solution = least_squares.solve(gram * roots[:, None] * roots, errors * roots, free * roots[:, None])
        coefficients = torch.zeros(len(names), dtype=torch.float64)
        coefficients[order] = solution.coefficients * roots
        first = sum(process_group.gather(len(system.names))[: self.rank])
        own = coefficients[first : first + len(system.names)].float()
        moved = torch.cat([scale[part].square() * (system.rows[:, part].float().T @ own) for part in parts])
        moved = torch.stack(process_group.gather(moved)).sum(0)
        rescaled = solution.free[-1].item() * adapter if along.any() else torch.zeros_like(adapter)
        return [-moved - rescaled, *([-rescaled] if along.any() and solution.explained > 0 else [])], solution


def _joined(parts: Sequence[System]) -> System:
    rows = [part.rows for part in parts if part.rows is not None]
    names = [name for part in parts for name in part.names]
    errors, weights = (torch.cat([getattr(part, key) for part in parts]) for key in ("errors", "weights"))
    return System(names, errors, weights, torch.cat(rows) if rows else None)


def _of_all_ranks(names: list[Name], *values: Tensor) -> tuple[list[Name], list[int], list[Tensor]]:
    """All ranks' residuals by name, whatever the ranks: their names, places in what ranks gather, values in float64."""
    shown = process_group.gather((names, values))
    every = [name for part, _ in shown for name in part]
    order = sorted(range(len(every)), key=lambda i: every[i][:3])
    joined = [torch.cat(parts)[order].double() for parts in zip(*(part for _, part in shown), strict=True)]
    return [every[i] for i in order], order, joined
