"""For notebooks and scripts: `learner.train(config, reward=my_function)` trains and returns metrics and the LoRA."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from learner.config import DEFAULT_CONFIG, Config, ConfigError, build_config, read_tree

if TYPE_CHECKING:
    from torch import Tensor

PROMPTS = "prompts.json"  # in the run directory: prompts that were given as Python objects
Reward = Callable[["Tensor", Sequence[str]], "Tensor"]


@dataclass(frozen=True)
class TrainedRun:
    """What a finished run left."""

    run_dir: str  # directory or URL; README.md says what is in it
    metrics: list[dict[str, Any]]  # a dict an epoch, as in metrics.jsonl; epoch -1 is the evaluation before training
    lora: str  # folder for diffusers' `load_lora_weights`; kohya.safetensors in it is for ComfyUI and A1111


def train(
    config: Config | Mapping[str, Any] | str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    *,
    reward: Reward | str | None = None,
    prompts: Sequence[str] | None = None,
    runner: Literal["ray", "inprocess"] | None = None,
    run_dir: str | Path | None = None,
    say: Callable[[str], None] = print,
) -> TrainedRun:
    """Train to the end, or go on with the run in `run_dir`; the same as `python -m learner.run`.

    Args:
        config: a YAML preset's path, sections of keys as a dict, or a Config; default: the demo's preset.
        settings: `{"section.key": value}`, in place of the config's.
        reward: a function `(images [B, 3, H, W] float in [0, 1], prompts) -> [B]`, or a reward's name. With an
            attribute `differentiable = True` it serves the nabla objectives. On Ray it is sent to the reward actors.
            Commands that read the run later, such as learner.evaluate, find it only if it can be imported.
        prompts: in place of prompts.path; kept in the run directory.
        runner: run.runner; `inprocess` needs no Ray.
        run_dir: run.dir.
        say: gets each line of progress.

    Raises:
        ConfigError: bad settings; a line for each fault.
        RunFailure: the run ended early; the same call goes on from its last closed epoch.
    """
    source, tree = _tree(config)
    given = dict(settings or {})
    if runner is not None:
        given["run.runner"] = runner
    if run_dir is not None:
        given["run.dir"] = str(run_dir)
    own = reward if callable(reward) else None
    if reward is not None:
        given["reward.name"] = _name_of(own) if own else reward
    for key, value in given.items():
        section, _, leaf = key.partition(".")
        node = tree.setdefault(section, {}) if leaf else None
        if not isinstance(node, dict):
            raise ConfigError(f"{key}: expected section.key")
        node[leaf] = value
    if prompts is not None:
        tree.setdefault("prompts", {})["path"] = PROMPTS  # its folder is known when the rest is sound
    built, faults = build_config(tree, (), str(source))
    if faults:
        raise ConfigError("\n".join(faults))

    from learner import job, open_run  # here: they import torch
    from learner.prompts import evaluation_prompts, training_prompts
    from records import checkpoint
    from rewards.registry import UserReward

    def warn(text: str) -> None:
        say(f"warning: {text}")

    with contextlib.ExitStack() as undo:  # nothing is left of a call that is refused
        if prompts is not None:
            built = _with_prompts(built, source, prompts, undo)
        texts = [*training_prompts(built), *evaluation_prompts(built)]
        _, resources = job.check(built, warn, own)
        opened = open_run.open_run(built, source, texts, warn)
        undo.pop_all()
    try:
        job.run(opened, resources, say, own_reward=UserReward(built.reward.name, own) if own else None)
    finally:
        opened.close()
    records = opened.records
    return TrainedRun(str(records.storage), records.lines, checkpoint.lora_folder(records.storage))


def _tree(config: Config | Mapping[str, Any] | str | Path | None) -> tuple[Path, dict[str, Any]]:
    """What names a new run, and the config as sections of keys."""
    if config is None or isinstance(config, str | Path):
        source = Path(config or DEFAULT_CONFIG)
        return source, read_tree(source)
    tree = config.model_dump(mode="json") if isinstance(config, Config) else json.loads(json.dumps(dict(config)))
    return Path("run.yaml"), tree


def _name_of(reward: Reward) -> str:
    """As reward.name has it: where the function can be imported from, if it can."""
    kind = reward if hasattr(reward, "__qualname__") else type(reward)
    return f"{kind.__module__}:{kind.__qualname__}"


def _with_prompts(config: Config, source: Path, prompts: Sequence[str], undo: contextlib.ExitStack) -> Config:
    """The config with the prompts as a file of the run directory: whoever reads the run later finds them."""
    from learner import open_run

    folder = open_run.directory(config, source)
    if "://" in folder:
        raise ConfigError("prompts: given as a list they need a local run.dir; or write a file and set prompts.path")
    file, content = Path(folder) / PROMPTS, json.dumps(list(prompts), ensure_ascii=False, indent=1)
    if file.exists() and file.read_text(encoding="utf-8") != content:
        raise ConfigError(f"prompts: the run in {folder} began with others; give those, or choose another run.dir")
    if not file.exists():
        for missing in [parent for parent in reversed(file.parents) if not parent.exists()]:
            undo.callback(missing.rmdir)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content, encoding="utf-8")
        undo.callback(file.unlink)
    run = config.run.model_copy(update={"dir": folder})
    return config.model_copy(update={"run": run, "prompts": config.prompts.model_copy(update={"path": str(file)})})
