"""The epoch loop: draw prompts, have them sampled and scored, train, publish, evaluate, record, checkpoint.

    who waits              for what                                unblocked by
    ---------------------  --------------------------------------  ----------------------------------------------------
    a sampler              a chunk of epoch e                      closing epoch e - 1 - train.max_staleness
    a reward actor         its clean predictions                   that sampler
    the learner ranks      every chunk of epoch e, scored          the reward actors
    `train_epoch`          policy version e + 1, published         the ranks, after the epoch's last update
    `evaluate`             every fixed image, scored               samplers and reward actors, before training chunks
    the checkpoint         rows, evaluation and metrics of e       this loop, which writes them
    closing epoch e        its checkpoint, on disk                 this loop: now a later epoch may be sampled
    the views              nothing; and nothing waits for them     told of progress, events, closed epochs and the end

Runners hand trajectories from actor to actor; none of their waits is without a deadline. Whatever a killed run wrote
after its last checkpoint is dropped and made again, bit by bit the same."""

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from diffusion.failures import RunFailure
from diffusion.trajectory import Chunk, Scores
from learner import later
from learner.config import Config, config_yaml
from learner.objectives.base import anneal
from learner.objectives.by_name import describe, prospects
from learner.open_run import OpenRun
from learner.prompts import evaluation_prompts, training_prompts
from learner.protocol import quarantine
from learner.protocol.chunks import evaluation_chunks, training_chunks
from learner.protocol.ledger import Ledger
from learner.protocol.runner import EpochResult, Runner, Vitals
from records import checkpoint
from records.facts import digest
from records.run_folder import BEFORE, CONFIG, Records
from rewards import mixture
from rewards.weighted_sum import WHERE

FAR = 3  # standard deviations of the rewards: an offset of another reward's
Judge = Callable[[int, Sequence[Scores]], dict[str, Any]]  # records an evaluation; returns its part of the metrics line


class Views(Protocol):
    """Whoever shows the run, and is told how it goes. A view that fails warns; it never ends the run."""

    def say(self, text: str) -> None: ...  # a line of the run's output
    def event(self, text: str) -> None: ...  # the same, of a fault that was survived, a node that came or went
    def running(self, vitals: Callable[[], Vitals]) -> None: ...  # the runner is up; how it stands
    def progress(self, what: str, done: int, total: int) -> None: ...  # pieces of what is being done
    def turn(self) -> None: ...  # again and again, whatever the runner waits for
    def epoch_closed(self, line: dict[str, Any], seconds: float) -> None: ...  # of metrics.jsonl; with its recording
    def finished(self) -> None: ...  # all records are written


def run(opened: OpenRun, runner: Runner, judge: Judge, views: Views) -> None:
    """Train up to config.train.epochs epochs. One metrics line an epoch; epoch -1 is the evaluation before training."""
    config, records = opened.config, opened.records
    prompts = training_prompts(config)
    fixed = evaluation_chunks(config, evaluation_prompts(config))
    begun = opened.checkpoint.manifest if opened.checkpoint else {}
    offset: float = begun.get("reward_offset", config.objective.reward_offset or 0.0)
    ledger, epochs = Ledger(begun.get("ledger")), range(begun.get("next_epoch", 0), config.train.epochs)
    runner.begin(lambda epoch: training_chunks(config, prompts, epoch), epochs, ledger)
    views.running(runner.vitals)
    ending = "s" * (config.train.epochs != 1)
    views.say(f"{runner.description}; {config.train.epochs} epoch{ending} of {config.train.trajectories} trajectories")
    views.say(describe(config, runner.dimensions))
    if config.objective.window != "all" and (said := later.in_words(config)):
        views.say(said)
    views.say(prospects(config))
    mixed, warned = mixture.Mixture.of(config.reward.name, config.reward.options), set[str]()
    records.note(dimensions=runner.dimensions)
    if opened.checkpoint is None:
        if fixed:
            evaluated = _evaluate(runner, fixed, BEFORE, judge, views)
            records.append(_line(config, BEFORE, runner, ledger, None, **evaluated))
        offset = _offset(config, records, views)
        _save(opened, runner, ledger, 0, offset, views)
        if fixed:
            views.epoch_closed(records.lines[-1], 0.0)
    for epoch in epochs:
        start = time.perf_counter()
        beta = anneal(config.objective.beta, epoch, config.train.epochs, config.objective.anneal_fraction)
        result = runner.train_epoch(epoch, beta, offset)
        lost = ledger.close(epoch)
        records.save_trajectories(epoch, result.rows(records.run_id, epoch, beta))
        count, limit = ledger.totals["quarantined"], config.reward.quarantine_limit
        quarantine.write(records.storage, result.set_aside, count, limit)
        due = fixed and ((epoch + 1) % config.evaluation.every == 0 or epoch + 1 == config.train.epochs)
        trained = time.perf_counter()
        evaluated = _evaluate(runner, fixed, epoch, judge, views) if due else {}
        evaluated |= {"evaluate_seconds": time.perf_counter() - trained} if due else {}
        evaluated |= {"beta": beta, "seconds": time.perf_counter() - start, "lost_trajectories": lost}
        if mixed is not None:
            evaluated |= _shares(mixed, epoch, result, warned, views)
        line = _line(config, epoch, runner, ledger, result, **evaluated)
        records.append(line)
        _save(opened, runner, ledger, epoch + 1, offset, views)
        runner.closed(epoch)
        views.epoch_closed(line, time.perf_counter() - start)
        if config.train.stop_on_collapse and (signs := collapsed(records)):
            views.say(f"stopped after epoch {epoch + 1}: {signs} (train.stop_on_collapse)")
            return


def finish(records: Records, views: Views) -> None:  # also where nothing was left to do
    records.note(finished=True)
    views.finished()


def collapsed(records: Records) -> str | None:
    """Signs of collapse at the last evaluation."""
    signs = [line.get("collapse") for line in records.lines if line["eval_reward_mean"] is not None]
    return signs[-1] if signs else None


def _evaluate(runner: Runner, fixed: Sequence[Chunk], epoch: int, judge: Judge, views: Views) -> dict[str, Any]:
    scores = runner.evaluate(fixed)
    if bad := [reason for part in scores for reason in part.bad.values()]:
        views.event(f"warning: {len(bad)} evaluation images are bad and left out of the reward; the first: {bad[0]}")
    return judge(epoch, scores)


def _shares(
    mixed: mixture.Mixture, epoch: int, result: EpochResult, warned: set[str], views: Views
) -> dict[str, float | None]:
    """For the metrics line: each part's share of the variance of what was trained on. Warns of parts without spread,
    once each."""
    prompts, parts = result.parts
    where = "within any prompt" if mixed.normalise == "prompt" else "among the pictures"
    for label in mixed.without_spread(prompts, parts):
        if label not in warned:
            warned.add(label)
            place, mean = list(mixed.weights).index(label), np.mean(parts[label])
            views.event(
                f"warning: {WHERE}[{place}] ({label}): its scores have no spread {where} in epoch {epoch} (mean "
                f"{mean:.4g}), so nothing is learned from it: check its options and weights, try it on pictures that "
                "differ (python -m learner score), or leave it out"
            )
    shares = mixture.shares(mixed.contributions(prompts, parts))
    return {f"reward_share/{label}": share for label, share in shares.items()}


def _offset(config: Config, records: Records, views: Views) -> float:
    """objective.reward_offset as given, else about the mean reward before training: it moves no target, and spares the
    flow network a constant."""
    given, mean = config.objective.reward_offset, records.lines[-1]["eval_reward_mean"] if records.lines else None
    if config.needs.flow != "log_flow":  # it has no meaning
        return given or 0.0
    if given is None:
        known = "the mean reward before training" if mean is not None else "as no reward before training is known"
        views.say(f"objective.reward_offset: {(chosen := float(f'{mean or 0:.4g}')):g}, {known}")
        return chosen
    if mean is not None:
        rewards = np.asarray(records.evaluation(BEFORE)["reward"], float)
        if abs(mean - given) > FAR * np.nanstd(rewards):
            views.say(
                f"warning: objective.reward_offset is {given:g}, but the mean reward before training {mean:.3g}: the "
                "flow network has to learn the difference first, and the loss says little until then; where the "
                "setting is left out, it is that mean"
            )
    return given


def _save(opened: OpenRun, runner: Runner, ledger: Ledger, epochs: int, offset: float, views: Views) -> None:
    """Close the first `epochs` epochs."""
    config, records = opened.config, opened.records
    manifest = {
        "run_id": records.run_id,
        "mlflow_run_id": records.about.get("mlflow_run_id"),
        "step": epochs * config.steps_per_epoch,
        "next_epoch": epochs,
        "prompts_drawn": epochs * config.train.trajectories // config.prompts.per_prompt,
        "policy_version": runner.snapshot.version,
        "adapter_sha256": runner.snapshot.sha256,
        "ranks": runner.ranks,
        "batch_sizes": {"chunk": config.sampler.chunk_size, "flow_batch": config.flow.batch, **runner.batch_sizes},
        "ledger": ledger.to_json(),
        "reward_offset": offset,
        "config_digest": opened.given.digest(),
        "run": {**records.about, "finished": epochs == config.train.epochs},  # should run.json be damaged
        "metrics_sha256": digest(records.lines),
    }
    checkpoint.save(records.storage, manifest, {**runner.checkpoint_files(), CONFIG: config_yaml(opened.given)})
    keep, always = config.run.keep_checkpoints, {(epoch + 1) * config.steps_per_epoch for epoch in records.evaluated()}
    try:
        checkpoint.prune(
            records.storage, keep, always, records.steps, records.run_id, lambda text: views.say(f"warning: {text}")
        )
    except RunFailure as error:  # the new one is there: that matters
        views.say(f"warning: an old checkpoint stays: {error}")


def _line(
    config: Config, epoch: int, runner: Runner, ledger: Ledger, result: EpochResult | None, **measured: Any
) -> dict[str, Any]:
    """A line of metrics.jsonl. `policy_version` is the one that the epoch ends with, and that was evaluated; `step`
    counts policy updates; epoch -1, before training, has neither loss nor training rewards."""
    rewards, set_aside = np.asarray(result.rewards if result else []), len(result.set_aside) if result else 0
    return {
        "epoch": epoch,
        "step": (epoch + 1) * config.steps_per_epoch,
        "time": time.time(),
        "policy_version": runner.snapshot.version,
        "adapter_sha256": runner.snapshot.sha256,
        **dict.fromkeys(("beta", "loss", "eval_reward_mean")),
        **(result.training.metrics if result else {}),
        "reward_mean": float(rewards.mean()) if result else None,
        "reward_std": float(rewards.std()) if result else None,
        **{f"reward_mean/{label}": value for label, value in (result.reward_parts if result else {}).items()},
        "seconds": 0.0,
        **{name: getattr(result, name, None) for name in ("sample_seconds", "score_seconds", "train_seconds")},
        "trajectories": len(rewards) + set_aside,
        **({"quarantined": set_aside} if config.reward.on_bad_reward == "quarantine" else {}),
        "trajectories_trained": ledger.totals["trained"],
        "updates": result.training.updates if result else [],
        **measured,
    }
