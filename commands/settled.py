"""Where a reward is settled between noise and picture: `python -m learner.settled RUN_OR_CONFIG [key=value ...]`.

What objective.window=auto measures before training (evaluation/settling.py), by the settings of a run or of a preset.
Nothing of the run is changed. What is drawn is kept: the same command, or that run, has it at once.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

from cluster import signals
from commands.outcome import attempt, complain, warner
from diffusion.failures import RunFailure
from learner.config import Config, ConfigError, raise_faults, read_config, saved_config
from records import facts
from records.storage import Storage
from reports.progress import Bar


def settings(name: str, overrides: list[str]) -> Config:
    """Of a preset's file or a run. Raises a ConfigError for bad ones, and for code that only a run's files name."""
    from evaluation.adapters import unconfirmed
    from learner.prompts import training_prompts
    from records.run_folder import Records
    from rewards import registry

    if Path(name).is_file():
        config, faults = read_config(Path(name), overrides)
    else:
        if not facts.there(Storage(name)):
            raise ConfigError("there is no run, and no config file")
        run = Records.open(Storage(name), warner("settled"))
        config, faults = read_config(saved_config(run).model_dump(mode="json"), overrides)
        faults = faults or unconfirmed(config, {text.partition("=")[0].strip() for text in overrides}, run)
    raise_faults(faults)
    reward = config.reward
    registry.check(reward.name, reward.weights, reward.options, training_prompts(config))
    return config


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; exit status 0, 2: bad input, 1: it failed, 130 and 143 as learner.run."""
    parser = argparse.ArgumentParser(
        prog="python -m learner.settled", description="Measure where the reward is settled on the base model's paths."
    )
    parser.add_argument("name", metavar="RUN_OR_CONFIG", help="run directory or URL, or a YAML preset")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, as learner.run takes them")
    parser.add_argument("--cache", type=Path, help="where finished paths are kept (default: ~/.cache/tributary)")
    parser.add_argument("--json", action="store_true", help="for programs: the states as one array")
    args = parser.parse_intermixed_args(arguments)
    configs: list[Config] = []
    if status := attempt("settled", lambda: configs.append(settings(args.name, args.overrides)), args.name):
        return status
    signals.enter("running")
    from evaluation import settling
    from evaluation.image_sets import Cache
    from learner.api import settled_profile

    try:
        with Bar() as bar:
            say = partial(bar.around, partial(complain, "settled"))
            profile = settled_profile(configs[0], Cache(args.cache), say, bar.show)
        share = configs[0].objective.window_share
        print(json.dumps(profile) if args.json else "\n".join(settling.table(profile, share)))
    except RunFailure as error:
        complain("settled", f"{type(error).__name__}: {error} (once that is mended, the same command goes on)")
        return 1
    except KeyboardInterrupt:
        complain("settled", "interrupted; the same command goes on")
        return signals.status()
    return 0
