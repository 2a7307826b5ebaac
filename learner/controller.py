"""The epoch loop: draw prompts, have them sampled and scored, train, publish, evaluate, record, checkpoint.

    prompts -> chunks -> sampler actors -> reward actors -> learner ranks -> new adapter -> samplers ...

It never sees a trajectory: runners hand references from actor to actor. The checkpoint closes an epoch; whatever a
killed run wrote after its last one is dropped and made again, bit by bit the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import yaml

from diffusion.trajectory import Scores
from evaluation import collapse, metrics
from evaluation.intervals import mean_of_good
from learner.config import Config
from learner.config.sections import Objective
from learner.objectives.base import anneal
from learner.objectives.by_name import OBJECTIVES
from learner.open_run import OpenRun
from learner.prompts import evaluation_prompts, training_prompts
from learner.protocol import quarantine
from learner.protocol.chunks import evaluation_chunks, training_chunks
from learner.protocol.ledger import Ledger
from learner.protocol.runner import EpochResult, Runner
from records import checkpoint
from records.heartbeat import Heartbeat
from records.run_folder import BEFORE, CONFIG, Records
from records.storage import StorageError
from reports import html, summary
from reports.progress import Bar
from reports.tracking import Tracker

Say = Callable[[str], None]


def run(opened: OpenRun, runner: Runner, tracker: Tracker, heartbeat: Heartbeat, say: Say) -> None:
    """Train up to config.train.epochs epochs. One metrics line an epoch; epoch -1 is the evaluation before training."""
    config, records, saved = opened.config, opened.records, opened.checkpoint
    prompts = training_prompts(config)
    evaluation = evaluation_chunks(config, evaluation_prompts(config))
    ledger = Ledger(saved.manifest["ledger"] if saved else None)
    with Bar() as bar:

        def progress(what: str, done: int, total: int) -> None:
            bar.show(what, done, total)
            heartbeat.progress(what, done, total)

        def event(text: str) -> None:
            bar.around(say, text)
            heartbeat.event(text)

        runner.hooks.progress, runner.hooks.say, runner.hooks.turn = progress, event, heartbeat.turn
        runner.hooks.last_checkpoint = lambda: _last_files(records, say)
        runner.begin(
            lambda epoch: training_chunks(config, prompts, epoch),
            range(opened.epochs_done, config.train.epochs),
            ledger,
        )
        heartbeat.running(runner.vitals, turns=config.run.runner == "ray")
        say(f"{runner.description}; {config.train.epochs} epochs of {config.train.trajectories} trajectories")
        say(describe_objective(config, runner.dimensions))
        if saved is None:
            if evaluation:
                _save_evaluation(opened, BEFORE, runner.evaluate(evaluation), event)
                records.append(_line(config, BEFORE, runner, None, None, _judged(records, BEFORE), 0.0, ledger))
                bar.around(say, f"before training: evaluated reward {records.lines[-1]['eval_reward_mean']:.3f} on "
                                f"{config.evaluation.images} fixed images")  # fmt: skip
            _save(opened, runner, ledger, 0, say)
            tracker.notify()
        for epoch in range(opened.epochs_done, config.train.epochs):
            start = time.perf_counter()
            objective = config.objective
            beta = anneal(objective.beta, epoch, config.train.epochs, objective.anneal_fraction)
            result = runner.train_epoch(epoch, beta)
            lost = ledger.close(epoch)
            records.save_trajectories(epoch, beta, result)
            quarantine.write(records.storage, result.set_aside)
            quarantine.check_limit(records.storage, ledger.totals["quarantined"], config.reward.quarantine_limit)
            due = evaluation and ((epoch + 1) % config.evaluation.every == 0 or epoch + 1 == config.train.epochs)
            if due:
                _save_evaluation(opened, epoch, runner.evaluate(evaluation), event)
            evaluated = _judged(records, epoch) if due else {}
            seconds = time.perf_counter() - start
            line = _line(config, epoch, runner, beta, result, evaluated, seconds, ledger)
            records.append({**line, "lost_trajectories": lost})
            _save(opened, runner, ledger, epoch + 1, say)
            runner.closed(epoch)
            heartbeat.closed()
            if due and epoch + 1 < config.train.epochs:
                _report(records, config, say)
            tracker.notify()
            bar.around(say, _summary(config, epoch, beta, result, evaluated, time.perf_counter() - start))
            if config.train.stop_on_collapse and collapsed(records):
                bar.around(say, f"stopped after epoch {epoch + 1}: {collapsed(records)} (train.stop_on_collapse)")
                return


def collapsed(records: Records) -> str | None:
    """Signs of collapse at the last evaluation."""
    found = [line.get("collapse") for line in records.lines if line["eval_reward_mean"] is not None]
    return found[-1] if found else None


def finish(records: Records, config: Config, say: Say) -> None:
    """The end of a run, from its records alone: pictures, report, what changed in plain words, what to type next."""
    storage, evaluated = records.storage, records.evaluated()
    if len(evaluated) > 1:
        for name, epoch in (("before", BEFORE), ("after", evaluated[-1])):
            storage.write(f"{name}.png", records.sheet(epoch))
    records.note(finished=True)
    reported = _report(records, config, say)
    for line in _described(lambda: summary.describe(records, config), say):
        say(line)
    if len(evaluated) > 1:
        say(f"pictures: {storage}/before.png, {storage}/after.png")
    say(f"LoRA: {checkpoint.lora_folder(storage)}")
    if reported:
        say(f"report: {storage}/{html.FILE}")
    for line in _described(lambda: summary.next_commands(records, config), say):
        say(line)


def _described(lines: Callable[[], list[str]], say: Say) -> list[str]:
    """Words about a run are a view of it: where they cannot be found, the run has ended well all the same."""
    try:
        return lines()
    except Exception as error:
        say(f"warning: no summary: {type(error).__name__}: {error}")
        return []


def describe_objective(config: Config, dimensions: int) -> str:
    """What the run trains towards, in words, for latents of D = `dimensions`."""
    given, kind = config.objective, OBJECTIVES[config.objective.kind]
    published = {**Objective(kind=given.kind, setting=given.setting).model_dump(), "beta": given.beta}
    other = [key for key, value in given.model_dump().items() if key != "reward_offset" and value != published[key]]
    but = f", but {', '.join(other)}" if other and given.setting == "faithful" else ""
    text = f"{given.kind} ({given.setting}{but}): {kind.target(given, dimensions)}"
    if kind.needs.uses_ratio:
        nats = given.clip_range * (dimensions if given.log_prob_reduction == "mean" else 1)
        text += f"; the clip lets a transition's log-probability move by {nats:.3g} nats"
    return text


def _report(records: Records, config: Config, say: Say) -> bool:
    """Write the report; a page that cannot be drawn is no reason to lose a run."""
    try:
        records.storage.write(html.FILE, html.render(records, config))
    except Exception as error:
        say(f"warning: no {html.FILE}: {type(error).__name__}: {error} (later: python -m learner.report RUN)")
        return False
    return True


def _save(opened: OpenRun, runner: Runner, ledger: Ledger, epochs: int, say: Say) -> None:
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
        "batch_sizes": {
            "chunk": config.sampler.chunk_size,
            "flow_batch": config.flow.batch,
            **runner.batch_sizes,
        },
        "ledger": ledger.to_json(),
        "config_digest": config.digest(),
    }
    settings = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False).encode()
    checkpoint.save(records.storage, manifest, {**runner.checkpoint_files(), CONFIG: settings})
    always = {(epoch + 1) * config.steps_per_epoch for epoch in records.evaluated()}
    try:
        checkpoint.prune(
            records.storage, config.run.keep_checkpoints, always, records.run_id, lambda text: say(f"warning: {text}")
        )
    except StorageError as error:  # the new one is there: that matters
        say(f"warning: an old checkpoint stays: {error}")


def _last_files(records: Records, say: Say) -> dict[str, bytes] | None:
    newest = checkpoint.load_newest(records.storage, records.run_id, lambda text: say(f"warning: {text}"))
    return newest.files if newest else None


def _judged(records: Records, epoch: int) -> dict[str, Any]:
    """An evaluation as a line of metrics.jsonl has it."""
    now = records.evaluation(epoch)
    found: dict[str, Any] = {"eval_reward_mean": mean_of_good(now.rewards)}
    found |= {f"eval_reward_mean/{label}": mean_of_good(values) for label, values in now.held_out.items()}
    if now.features is not None:
        found["eval_vendi"] = metrics.vendi(now.features)
        found["eval_distance"] = mean_of_good(collapse.apartness(now.features, now.prompts))
    if BEFORE in records.evaluated() and epoch != BEFORE:
        found["collapse"] = "; ".join(collapse.signs(records.evaluation(BEFORE), now)) or None
    return found


def _save_evaluation(opened: OpenRun, epoch: int, scores: Sequence[Scores], say: Say) -> None:
    opened.records.save_evaluation(epoch, scores, opened.config.run.thumbnail_pixels)
    bad = [reason for part in scores for reason in part.bad.values()]
    if bad:
        say(f"warning: {len(bad)} evaluation images are bad and left out of the evaluated reward; the first: {bad[0]}")


def _line(
    config: Config, epoch: int, runner: Runner, beta: float | None, result: EpochResult | None,
    evaluated: dict[str, Any], seconds: float, ledger: Ledger,
) -> dict[str, Any]:  # fmt: skip
    """A line of metrics.jsonl. `policy_version` is the one that the epoch ends with, and that was evaluated; `step`
    counts policy updates; epoch -1, before training, has neither loss nor training rewards."""
    rewards = np.asarray(result.rewards if result else [])
    quarantining = config.reward.on_bad_reward == "quarantine"
    return {
        "epoch": epoch,
        "step": (epoch + 1) * config.steps_per_epoch,
        "time": time.time(),
        "policy_version": runner.snapshot.version,
        "adapter_sha256": runner.snapshot.sha256,
        "beta": beta,
        "loss": None,
        **(result.training.metrics if result else {}),
        "reward_mean": float(rewards.mean()) if result else None,
        "reward_std": float(rewards.std()) if result else None,
        **{f"reward_mean/{label}": value for label, value in (result.reward_parts if result else {}).items()},
        "eval_reward_mean": None,
        **evaluated,
        "seconds": seconds,
        "sample_seconds": result.sample_seconds if result else None,
        "score_seconds": result.score_seconds if result else None,
        "train_seconds": result.train_seconds if result else None,
        "trajectories": len(rewards) + (len(result.set_aside) if result else 0),
        **({"quarantined": len(result.set_aside) if result else 0} if quarantining else {}),
        "trajectories_trained": ledger.totals["trained"],
        "updates": result.training.updates if result else [],
    }


def _summary(
    config: Config, epoch: int, beta: float, result: EpochResult, evaluated: dict[str, Any], seconds: float
) -> str:
    text = (
        f"epoch {epoch + 1}/{config.train.epochs}  "
        f"reward {np.mean(result.rewards):.3f} +- {np.std(result.rewards):.3f}  "
        f"loss {result.training.metrics['loss']:.4g}  beta {beta:.3g}  {seconds:.1f} s "
        f"(sample {result.sample_seconds:.1f}, score {result.score_seconds:.1f}, train {result.train_seconds:.1f})"
    )
    if result.set_aside:
        text += f"  {len(result.set_aside)} set aside"
    if evaluated:
        text += f"  evaluated {evaluated['eval_reward_mean']:.3f}"
    return f"{text}  COLLAPSE? {evaluated['collapse']}" if evaluated.get("collapse") else text
