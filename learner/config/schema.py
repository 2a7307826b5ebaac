"""The configuration as a whole: its sections, what a resumed run may change, and what follows from it. No torch."""

import hashlib
import json
from typing import Any

from diffusion.settings import RolloutSettings
from learner.config import sections
from learner.config.sections import Section, key
from learner.objectives.needs import NEEDS, Needs

REMOTE = "remote"  # the reward behind HTTP
CONFIG_VERSION = 2  # of the keys and their meaning

# What a resumed run may set anew: on CPU none of it changes a bit of the result, but train.epochs, which prolongs it,
# and the batches that must fit into memory, which change last bits (it says so): a small GPU must not strand a run.
FREE = (
    "run.dir", "run.root", "run.resume", "run.keep_checkpoints", "run.thumbnail_pixels", "run.chunk_attempts",
    "run.ready_seconds", "run.chunk_seconds", "run.train_seconds", "run.autoscale", "sampler.actors",
    "sampler.gpus", "sampler.labels", "reward.actors", "reward.gpus", "reward.labels", "reward.quarantine_limit",
    "reward.try_first", "learner.gpus", "learner.labels", "learner.attempts", "train.epochs", "train.stop_on_collapse",
    "learner.micro_batch", "reward.batch", "mlflow.enabled", "mlflow.uri", "mlflow.experiment", "mlflow.finish_seconds",
    "mlflow.group", "mlflow.registered_model",
)  # fmt: skip

# What may be lower in a run that ended with a gradient that is not finite: it is told to.
LOWERED = ("learner.learning_rate", "flow.learning_rate", "objective.beta")


class Config(Section):
    config_version: int = key(CONFIG_VERSION, "version of these keys; set only by the program")
    run: sections.Run = sections.Run()
    model: sections.Model = sections.Model()
    prompts: sections.Prompts = sections.Prompts()
    sampler: sections.SamplerConfig = sections.SamplerConfig()
    reward: sections.RewardConfig = sections.RewardConfig()
    lora: sections.LoraConfig = sections.LoraConfig()
    flow: sections.FlowConfig = sections.FlowConfig()
    learner: sections.LearnerConfig = sections.LearnerConfig()
    objective: sections.Objective = sections.Objective()
    train: sections.Train = sections.Train()
    evaluation: sections.Evaluation = sections.Evaluation()
    mlflow: sections.Mlflow = sections.Mlflow()

    def flat(self) -> dict[str, Any]:
        """Every setting as `section.key`, JSON types."""
        tree = self.model_dump(mode="json")
        return {f"{section}.{key}": value for section in section_types() for key, value in tree[section].items()}

    def binding(self) -> dict[str, Any]:
        """The settings that a resumed run must share with its beginning: all but FREE, and where a judge is."""
        shared = {key: value for key, value in self.flat().items() if key not in FREE}
        return shared | ({"reward.options": None} if self.reward.name == REMOTE else {})

    def digest(self) -> str:
        """sha256 of the binding settings: equal runs have equal ones."""
        return hashlib.sha256(json.dumps(self.binding(), sort_keys=True).encode()).hexdigest()

    @property
    def steps_per_epoch(self) -> int:
        return self.train.updates_per_epoch + self.train.replay_updates

    @property
    def kept_epochs(self) -> int:
        """Epochs of rollouts that a learner keeps to train on again."""
        fits = self.flow.fit_steps or self.flow.warmup_steps
        again = self.train.replay_epochs if self.train.replay_updates or self.needs.fitted_flow else 0
        if self.learner.optimizer == "natural":
            again = max(again, self.learner.natural_epochs - 1)
        return max(self.flow.replay_epochs if fits else 0, again)

    @property
    def needs(self) -> Needs:  # of the objective
        return NEEDS[self.objective.kind]

    @property
    def own_code(self) -> dict[str, Any]:
        """The settings by which code of a user's own runs, or by which others are sent pictures and a token, by key:
        rewards as module:callable or remote, and their options."""
        reward, terms, named = self.reward, self.reward.options.get("terms"), {}
        if _is_own(reward.name):
            named = {"reward.name": reward.name} | ({"reward.options": reward.options} if reward.options else {})
        elif isinstance(terms, list | tuple) and any(map(_is_own, terms)):  # of a weighted_sum
            named = {"reward.options": reward.options}
        held_out = self.evaluation.held_out
        return named | ({"evaluation.held_out": [*held_out]} if any(map(_is_own, held_out)) else {})

    @property
    def asks_inner_states(self) -> str | None:
        """The objective, where it asks for the rewards of inner states."""
        asks = self.needs.inner_rewards and self.objective.forward_looking != "none"
        return self.objective.kind if asks else None

    @property
    def noise_steps(self) -> int:
        """Transitions that add noise; the later ones are DDIM's without."""
        steps = self.sampler.steps
        return self.objective.span(steps)[1] if self.sampler.noise == "window" else steps

    @property
    def uncalibrated(self) -> bool:
        """Whether its kernel's variances are still to be measured."""
        return self.sampler.kernel == "calibrated" and self.sampler.spread is None

    def rollout_settings(self) -> RolloutSettings:
        steps = self.sampler.steps
        first, end = self.objective.span(steps)
        # The gradient of the image's reward is not one to the window's end: there the clean prediction's counts.
        by_prediction = self.needs.reward_gradients and not (self.needs.adjoint or self.needs.fitted_flow)
        by_prediction |= self.objective.window == "all" and self.needs.inner_rewards
        return RolloutSettings(
            num_steps=self.sampler.steps,
            guidance=self.sampler.guidance,
            eta=self.sampler.eta,
            grid=self.sampler.grid,
            kernel=self.sampler.kernel,
            spread=self.sampler.spread,
            forward_looking=self.objective.forward_looking if self.needs.inner_rewards else "none",
            clean_prediction=self.objective.clean_prediction,
            from_step=self.objective.forward_looking_from,
            selection=self.sampler.transitions,
            fraction=self.sampler.transition_fraction,
            first=first,
            end=end if end < steps else None,
            terminal=end if end < steps and by_prediction else None,
            end_scored=self.needs.fitted_flow and self.needs.inner_rewards,
            adapted=(first, end) if self.sampler.adapter == "window" else None,
            noise_steps=self.noise_steps,
            image_only=not self.needs.inner_rewards,
            reference=self.needs.reference,
            state_precision=self.sampler.state_precision,
        )


def _is_own(reward: Any) -> bool:
    """Whether a term or held-out reward, a name or {name, ...}, is a user's own, or is sent pictures and a token."""
    name = str(reward.get("name") if isinstance(reward, dict) else reward)
    return ":" in name or name == REMOTE


def known_keys() -> dict[str, Any]:
    """Every `section.key` with its field."""
    sections = section_types().items()
    return {f"{name}.{leaf}": field for name, section in sections for leaf, field in section.model_fields.items()}


def section_types() -> dict[str, type[Section]]:
    """Every section by name."""
    return {name: type(field.default) for name, field in Config.model_fields.items() if name != "config_version"}
