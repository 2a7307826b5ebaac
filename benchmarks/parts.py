"""What benchmarks/device.py measures: the project's parts, a diffusers pipeline, the published algorithm.

All share one base model with one adapter, put back before each run, so that two parts differ in their work alone.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMPipeline, DDIMScheduler, StableDiffusionPipeline
from torch import nn

from benchmarks.measure import Part, ceiling
from benchmarks.published import Published
from benchmarks.usual import Rollouts
from diffusion import lora
from diffusion.base_model import Decoder
from diffusion.rollout import Sampler
from diffusion.settings import RolloutSettings
from diffusion.trajectory import CleanPredictions, Trajectories
from learner import build
from learner.config import Config, ConfigError, load_config
from learner.objectives.needs import NEEDS
from learner.prompts import training_prompts
from learner.protocol.chunks import training_chunks
from learner.update import Learner, Scored
from rewards.scorer import Scorer

EPOCH = 1  # epoch 0 may warm the flow network up, once in a run
# The published DAG-DB in the project's own words: where its learner computes the same numbers (tests/benchmarks).
COMPARISON = (
    "objective.kind=dag_db", "objective.setting=faithful", "objective.forward_looking=snapshot",
    "objective.clean_prediction=conditional", "objective.detach_next_flow=false", "objective.penalty=squared",
    "objective.transition_weight=uniform", "objective.last_transition=train", "objective.forward_looking_decay=none",
    "objective.reward_offset=0", "objective.log_prob_reduction=mean", "objective.forward_looking_from=0",
    "sampler.transitions=all", "flow.fit_steps=0", "flow.warmup_steps=0", "flow.weight_decay=null",
    "train.replay_updates=0", "train.shuffle_rewards=false", "objective.forward_looking_decoder=full",
)  # fmt: skip
ROLLOUT, ROLLOUT_BASE, PIPELINE = "rollout, snapshot", "rollout, base", "diffusers pipeline"
SCORE, SCORE_CHEAP, LEARN = "score, all states", "score, late states", "learn, as published"
SCORE_TINY = "score, tiny decoder"
# Of half of each trajectory's transitions, drawn at random: the same loss on average, so the same target.
HALF = {"transitions": "random", "transition_fraction": 0.5}
SCORE_HALF, SCORE_HALF_TINY, LEARN_HALF = "score, half", "score, half, tiny decoder", "learn, half"
PUBLISHED_SAMPLE, PUBLISHED_LEARN = "published: sample, score", "published: learn"


def learning(kind: str) -> str:
    """The name of an objective's part."""
    return f"learn, {kind}"


def with_settings(path: Path | None, overrides: Sequence[str], *more: str) -> Config:
    """
    Raises:
        ConfigError: see there.
    """
    return load_config(path, [*overrides, "run.runner=inprocess", "evaluation.images=0", *more])


def for_objective(path: Path | None, overrides: Sequence[str], kind: str) -> Config:
    """The config with another objective, and whatever that rules out switched off.

    Raises:
        ConfigError: the config's other settings do not go with it.
    """
    needed = [f"objective.kind={kind}", "train.replay_updates=0"]  # which an epoch without past does not do
    if NEEDS[kind].flow != "log_flow":
        needed += ["flow.fit_steps=0", "flow.warmup_steps=0"]
    if NEEDS[kind].flow == "gradient":
        needed.append("flow.stem_stride=1")
    return with_settings(path, overrides, *needed)


@dataclass
class Bench:
    """Model, scorer and an epoch's chunks for all parts of one run."""

    config: Config  # with COMPARISON
    cheap_from: int
    tiny: str | None = None  # a tiny decoder's folder or hub id

    def __post_init__(self) -> None:
        self.changes: dict[str, dict[str, Any]] = {}  # of each objective's part: what its config has otherwise
        build.prepare_process(self.config)
        self.model = build.build_model(self.config)
        self.model.unet.eval()
        self.scorer = build.build_scorer(self.config)
        self.start = lora.snapshot(self.model.unet, 0)
        self.prompt = training_prompts(self.config)[0]
        # As a run would choose them.
        device, latent = build.device(self.config), self.model.latent_shape
        self.batch = self.scorer.batch or self.scorer.fitting_batch(latent, self.prompt, device)
        self.scorer.batch = self.batch
        self.chunks = training_chunks(self.config, training_prompts(self.config), EPOCH)
        self.prompts = [prompt for chunk in self.chunks for prompt in chunk.prompts]
        self.dtype = self.model.unet.conv_in.weight.dtype
        vae = getattr(self.scorer.decoder, "vae", None)  # pixels need none
        self.decode_dtype = torch.float32 if vae is None else vae.dtype
        self._sampled: dict[RolloutSettings, list[tuple[Trajectories, CleanPredictions]]] = {}
        self._scored: dict[tuple[RolloutSettings, bool], list[Scored]] = {}

    def put_back(self) -> None:
        """The adapter that the trajectories were sampled with."""
        lora.load(self.model.unet, self.start.flat)

    def parts(self, objectives: dict[str, Config]) -> list[Part]:
        """Everything but the objectives' own parts is under self.config."""
        compared = self.config.rollout_settings()
        learner = Learner(self.model, self._flow(self.config), self.config)
        learner.fit_micro_batch()
        self.changes = {kind: _changes(self.config, config) for kind, config in objectives.items()}
        rows = [
            *(ceiling(self.model.device, dtype) for dtype in dict.fromkeys((self.dtype, self.decode_dtype))),
            self._rollout(ROLLOUT, compared),
            self._rollout(ROLLOUT_BASE, replace(compared, forward_looking="base")),
            self._pipeline(),
            self._score(SCORE, compared, 0, self.scorer),
            self._score(SCORE_CHEAP, compared, self.cheap_from, self.scorer),
            *self._score_tiny(SCORE_TINY, compared),
            self._learn(LEARN, learner, self.config),
            *self._published(learner),
            *self._half(),
        ]
        for kind, config in objectives.items():
            own = Learner(self.model, self._flow(config), config)
            own.fit_micro_batch()
            rows.append(self._learn(learning(kind), own, config))
        return rows

    def _flow(self, config: Config) -> nn.Module | None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.run.seed + 1)
            return build.flow_network(config, self.model.latent_shape, self.model.embedding_width)

    def _rollout(self, name: str, settings: RolloutSettings) -> Part:
        sampler = Sampler(self.model, settings)

        def run() -> None:
            for chunk in self.chunks:
                sampler.sample(chunk, self.start)

        return Part(name, "images", len(self.prompts), self.dtype, run, self.put_back)

    def _pipeline(self) -> Part:
        """Latents only, as rollouts stop there too; where there is no VAE, pixels."""
        model, given = self.model, self.config.sampler
        settings = dict(model.scheduler.config)
        if settings["timestep_spacing"] == "leading":
            settings["steps_offset"] = max(1, settings["steps_offset"])  # diffusers' own step to 0 has no variance
        scheduler = DDIMScheduler.from_config(settings)
        pipeline: Any
        common = {"num_inference_steps": given.steps, "eta": given.eta}
        if model.embedding_width is None:
            pipeline = DDIMPipeline(model.unet, scheduler)
        else:
            pipeline = StableDiffusionPipeline(
                vae=getattr(self.scorer.decoder, "vae", None), text_encoder=model.texts.text_encoder, unet=model.unet,
                tokenizer=model.texts.tokenizer, scheduler=scheduler, safety_checker=None, feature_extractor=None,
                requires_safety_checker=False,
            )  # fmt: skip
        pipeline.set_progress_bar_config(disable=True)

        def run() -> None:
            for chunk in self.chunks:
                if model.embedding_width is None:
                    pipeline(batch_size=len(chunk.prompts), output_type="np", **common)
                else:
                    pipeline(list(chunk.prompts), guidance_scale=given.guidance, output_type="latent", **common)

        return Part(PIPELINE, "images", len(self.prompts), self.dtype, run, self.put_back)

    def _half(self) -> list[Part]:
        """The rollout is the whole one's."""
        config = self.config.model_copy(update={"sampler": self.config.sampler.model_copy(update=HALF)})
        own, settings = Learner(self.model, self._flow(config), config), config.rollout_settings()
        own.fit_micro_batch()
        scores = [self._score(SCORE_HALF, settings, 0, self.scorer), *self._score_tiny(SCORE_HALF_TINY, settings)]
        return [*scores, self._learn(LEARN_HALF, own, config)]

    def _score_tiny(self, name: str, settings: RolloutSettings) -> list[Part]:
        """Inner states by the tiny decoder, the images by the whole one."""
        if self.tiny is None:
            return []
        tiny = Decoder(self.tiny, build.device(self.config), self.decode_dtype, tiny=True)
        scorer = Scorer(self.scorer.decoder, self.scorer.reward, tiny=tiny, batch=self.scorer.batch)
        return [self._score(name, settings, 0, scorer)]

    def _score(self, name: str, settings: RolloutSettings, from_step: int, scorer: Scorer) -> Part:
        """The states from `from_step` on, as objective.forward_looking_from leaves them."""
        cleans = [_late(clean, from_step) for _, clean in self._sample(settings)]

        def run() -> None:
            for clean in cleans:
                scorer.score(clean)

        return Part(name, "states", sum(len(clean.latents) for clean in cleans), self.decode_dtype, run)

    def _learn(self, name: str, learner: Learner, config: Config) -> Part:
        files = learner.state_files()
        scored = self._score_for(config)
        size = math.ceil(len(scored) / config.train.updates_per_epoch)
        updates = [scored[i : i + size] for i in range(0, len(scored), size)]

        def reset() -> None:
            self.put_back()
            learner.restore(files)

        def run() -> None:
            learner.train_epoch(EPOCH, config.objective.beta, updates)

        count = sum(made.selected.size for made, _ in scored)
        return Part(name, "transitions", count, self.dtype, run, reset)

    def _published(self, learner: Learner) -> list[Part]:
        """Its learner on the project's trajectories; its sampler for itself, which costs the same whatever it draws."""
        config = self.config
        assert learner.flow is not None
        flow = copy.deepcopy(learner.flow)
        published = Published(self.model, self.scorer, flow, config, learner.micro_batch)
        scored = self._score_for(config)
        rollouts = Rollouts.join(
            [Rollouts.of(made, scores.rewards[:, -1], self.model.device) for made, scores in scored]
        )
        updates = config.train.updates_per_epoch

        def sample() -> None:
            for chunk in self.chunks:
                published.sample(chunk.prompts)

        def reset() -> None:
            self.put_back()
            published.reset()

        def learn() -> None:
            published.train(rollouts, config.objective.beta, updates)

        count = sum(made.selected.size for made, _ in scored)
        return [
            Part(PUBLISHED_SAMPLE, "images", len(self.prompts), self.dtype, sample, self.put_back),
            Part(PUBLISHED_LEARN, "transitions", count, self.dtype, learn, reset),
        ]

    def _sample(self, settings: RolloutSettings) -> list[tuple[Trajectories, CleanPredictions]]:
        if settings not in self._sampled:
            self.put_back()
            sampler = Sampler(self.model, settings)
            self._sampled[settings] = [sampler.sample(chunk, self.start) for chunk in self.chunks]
        return self._sampled[settings]

    def _score_for(self, config: Config) -> list[Scored]:
        """Trajectories as the config's objective wants them, and their scores."""
        settings, gradients = config.rollout_settings(), config.needs.reward_gradients
        if (settings, gradients) not in self._scored:
            scorer = Scorer(
                self.scorer.decoder, self.scorer.reward, gradients=gradients, batch=None if gradients else self.batch
            )
            self._scored[settings, gradients] = [(made, scorer.score(clean)) for made, clean in self._sample(settings)]
        return self._scored[settings, gradients]


def _late(clean: CleanPredictions, from_step: int) -> CleanPredictions:
    keep = clean.step >= from_step
    return replace(clean, latents=clean.latents[keep], row=clean.row[keep], step=clean.step[keep])


def _changes(base: Config, config: Config) -> dict[str, Any]:
    before = base.flat()
    return {key: value for key, value in config.flat().items() if value != before[key]}


def objective_configs(
    path: Path | None, overrides: Sequence[str], kinds: Sequence[str], differentiable: bool
) -> tuple[dict[str, Config], dict[str, str]]:
    """Configs of the objectives that can be measured, and of the others, by name, why not."""
    configs, missing = {}, {}
    for kind in kinds:
        try:
            config = for_objective(path, overrides, kind)
        except ConfigError as error:
            missing[learning(kind)] = " ".join(str(error).splitlines())
            continue
        if NEEDS[kind].reward_gradients and not differentiable:
            missing[learning(kind)] = f"reward {config.reward.name} is not differentiable"
        else:
            configs[kind] = config
    return configs, missing
