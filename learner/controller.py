"""The epoch loop: draw prompts, have them sampled and scored, train, publish, evaluate, record.

    prompts -> chunks -> sampler actors -> reward actors -> learner ranks -> new adapter -> samplers ...

It never sees a trajectory: runners hand references from actor to actor.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from diffusion.trajectory import Scores
from learner.config import Config
from learner.objectives import db
from learner.records import RunDirectory
from learner.runner import EpochResult, Runner
from learner.statistics import paired_interval
from learner.work import evaluation_chunks, read_prompts, training_chunks


def run(config: Config, runner: Runner, directory: RunDirectory, say: Callable[[str], None] = print) -> None:
    """Train for config.train.epochs epochs. One metrics line an epoch; epoch -1 is the evaluation before training."""
    prompts = read_prompts(config.prompts.path)
    evaluation = evaluation_chunks(config, _evaluation_prompts(config, prompts))
    say(f"{runner.description}; {config.train.epochs} epochs of {config.train.trajectories} trajectories")
    say(_target(config, runner.dimensions))
    before = runner.evaluate(evaluation) if evaluation else []
    if before:
        directory.save_sheet("before", before)
        directory.save_evaluation("epoch-before", before)
        directory.append(_line(-1, runner.snapshot.version, None, None, _mean(before)))
        say(f"before training: evaluated reward {_mean(before):.3f} on {config.evaluation.images} fixed images")
    after = before
    for epoch in range(config.train.epochs):
        start = time.perf_counter()
        objective = config.objective
        beta = db.anneal(objective.beta, epoch, config.train.epochs, objective.anneal_fraction)
        result = runner.train_epoch(epoch, beta, training_chunks(config, prompts, epoch))
        directory.save_latest(runner.snapshot.version, runner.save_lora)
        due = evaluation and ((epoch + 1) % config.evaluation.every == 0 or epoch + 1 == config.train.epochs)
        evaluated = None
        if due:
            after = runner.evaluate(evaluation)
            evaluated = _mean(after)
            directory.save_evaluation(f"epoch-{epoch}", after)
        directory.append(_line(epoch, runner.snapshot.version, beta, result, evaluated))
        say(_summary(config, epoch, beta, result, evaluated, time.perf_counter() - start))
    if after:
        sheet = directory.save_sheet("after", after)
        low, high = paired_interval(_rewards(before), _rewards(after))
        say(
            f"evaluated reward {_mean(before):.3f} -> {_mean(after):.3f} on {config.evaluation.images} fixed images: "
            f"{_mean(after) - _mean(before):+.3f}, 95 % interval {low:+.3f} to {high:+.3f}"
        )
        say(f"pictures: {sheet.with_name('before.png')}, {sheet}")
    say(f"LoRA: {directory.path / 'checkpoints' / 'latest' / 'lora'}")


def _target(config: Config, dimensions: int) -> str:
    """What the objective's zero-loss solution samples from: the log-probability reduction decides the exponent."""
    objective = config.objective
    exponent = objective.beta * (dimensions if objective.log_prob_reduction == "mean" else 1)
    return (
        f"{objective.kind}: target proportional to exp({exponent:g} x reward) "
        f"(beta {objective.beta:g}, log-probabilities by {objective.log_prob_reduction} over D = {dimensions})"
    )


def _evaluation_prompts(config: Config, prompts: list[str]) -> list[str]:
    path = config.evaluation.prompts
    return read_prompts(path, "evaluation.prompts") if path else prompts


def _rewards(scores: list[Scores]) -> np.ndarray:
    return np.concatenate([part.rewards[:, -1] for part in scores])


def _mean(scores: list[Scores]) -> float:
    return float(np.mean(_rewards(scores)))


def _line(
    epoch: int, version: int, beta: float | None, result: EpochResult | None, evaluated: float | None
) -> dict[str, Any]:
    """A line of metrics.jsonl. `policy_version` is the one that the epoch ends with, and that was evaluated; epoch -1,
    before training, has neither loss nor training rewards."""
    rewards = np.asarray(result.rewards if result else [])
    return {
        "epoch": epoch,
        "policy_version": version,
        "beta": beta,
        "loss": None,
        **(result.metrics if result else {}),
        "reward_mean": float(rewards.mean()) if result else None,
        "reward_std": float(rewards.std()) if result else None,
        "eval_reward_mean": evaluated,
        "sample_seconds": result.sample_seconds if result else None,
        "score_seconds": result.score_seconds if result else None,
        "train_seconds": result.train_seconds if result else None,
        "trajectories": len(rewards),
    }


def _summary(
    config: Config, epoch: int, beta: float, result: EpochResult, evaluated: float | None, seconds: float
) -> str:
    text = (
        f"epoch {epoch + 1}/{config.train.epochs}  "
        f"reward {np.mean(result.rewards):.3f} +- {np.std(result.rewards):.3f}  "
        f"loss {result.metrics['loss']:.4g}  beta {beta:.3g}  {seconds:.1f} s "
        f"(sample {result.sample_seconds:.1f}, score {result.score_seconds:.1f}, train {result.train_seconds:.1f})"
    )
    return text if evaluated is None else f"{text}  evaluated {evaluated:.3f}"
