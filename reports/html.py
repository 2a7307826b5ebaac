"""report.html of a run: one file with everything in it, made from the durable records alone.

`python -m learner.report RUN` makes it anew; a run does so at every evaluation and at its end. The page asks for
nothing from elsewhere and has no script. Words and figures are facts.py's, curves diagrams.py's, pictures
html_pictures.py's; report.html.j2 puts them together and escapes every text.
"""

from __future__ import annotations

import contextlib
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

import jinja2
import numpy as np
import yaml

from learner.config import Config
from records.heartbeat import without_passwords
from records.run_folder import BEFORE, Records
from records.storage import StorageError
from reports import facts
from reports import html_pictures as pictures
from reports.diagrams import HEIGHT, WIDTH, Diagram, Series, curves, data_url, heat_map
from reports.facts import Line
from reports.model_card import usage

FILE = "report.html"
TEMPLATE = Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8")  # now: files may change under a run
EVALUATIONS = 12  # whose intervals are drawn, evenly chosen

# Title, unit, and the metrics of metrics.jsonl with their labels.
Curves = tuple[tuple[str, str, dict[str, str]], ...]
REWARD: Curves = (
    ("Reward", "raw reward", {"reward_mean": "training rollouts, mean", "eval_reward_mean": "fixed images"}),
)
DIVERSITY: Curves = (
    ("Different pictures (Vendi score)", "effective number among the fixed images", {"eval_vendi": "fixed images"}),
    ("Vendi score of a prompt", "effective number, mean over prompts", {"eval_vendi_per_prompt": "fixed images"}),
    ("Distance within a prompt", "mean cosine distance of two pictures", {"eval_distance": "fixed images"}),
)
LEARNING: Curves = (
    ("Loss", "", {"loss": "the objective's", "flow_loss": "flow-only fits"}),
    ("Parts of the loss", "", {"forward_loss": "forward", "reverse_loss": "reverse", "terminal_loss": "terminal"}),
    ("Clipped", "share of transitions", {"clipped": "ratio outside of the clip"}),
    ("Step size", "nats a transition", {"kl": "KL, rollout policy to the one being updated"}),
    ("Gradient norm before clipping", "", {"grad_norm": "LoRA", "flow_grad_norm": "flow network"}),
    ("Staleness", "policy versions behind", {"staleness_mean": "mean", "staleness_max": "most"}),
)
TIMES: Curves = (
    (
        "Seconds an epoch",
        "seconds",
        {"seconds": "all", "sample_seconds": "sampling", "score_seconds": "scoring", "train_seconds": "training"},
    ),
)


def render(records: Records, config: Config) -> bytes:
    """The page. Works at any time of a run, with whatever is there.

    Raises:
        ValueError, TypeError, LookupError, AttributeError: metrics or evaluations hold what they never should.
        StorageError: a file that must be there cannot be read.
    """
    evaluated, known = records.evaluated(), facts.state(records.storage)
    trained = [line for line in records.lines if line["epoch"] != BEFORE]
    settings = without_passwords(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True))
    figures = None
    with contextlib.suppress(StorageError):  # a damaged evaluation
        figures = facts.figures(records.storage)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": facts.number, "duration": facts.duration, "clock": facts.clock}
    page = environment.from_string(TEMPLATE).render(
        about=records.about,
        place=str(records.storage),
        config=config,
        now=time.time(),
        known=known,
        towards=facts.towards(config),
        headline=facts.changes(records, evaluated).get(""),
        collapse=facts.collapse(records.lines),
        epochs=len(trained),
        trajectories=sum(line.get("trajectories") or 0 for line in trained),
        throughput=facts.throughput(trained),
        size=(WIDTH, HEIGHT),
        curves=_sections(records, evaluated),
        epochs_read=pictures.EPOCHS_READ,
        before_after=pictures.pairs(records, evaluated),
        extremes=pictures.extremes(records.storage),
        figures=figures,
        timings=facts.timings(trained, config.run.runner == "ray"),
        time_curves=_diagrams(TIMES, trained),
        faults=facts.faults(records, trained, known),
        usage=usage(config, "peft" if config.prompts.path is None else "diffusers", config.model.path, known["lora"]),
        quote=shlex.quote,
        settings=settings,
        settings_file=data_url("text/yaml", settings.encode()),
    )
    return page.encode()


def _sections(records: Records, evaluated: Sequence[int]) -> list[tuple[str, list[Diagram]]]:
    """Diagrams by what they are about; without those that have no data."""
    lines = records.lines
    labels: dict[str, str] = {}
    for prefix, words in (("reward_mean/", "Part of the reward"), ("eval_reward_mean/", "Held-out reward")):
        for key in dict.fromkeys(key for line in lines for key in line if key.startswith(prefix)):
            labels.setdefault(key.removeprefix(prefix), words)
    by_label: Curves = tuple(
        (f"{words}: {label}", "raw reward", {f"{key}/{label}": kind for key, kind in REWARD[0][2].items()})
        for label, words in labels.items()
    )
    betas = {line.get("beta") for line in lines} - {None}
    beta: Curves = (("Reward exponent", "beta", {"beta": "beta"}),) if len(betas) > 1 else ()
    distribution = heat_map("Rewards of the training rollouts", "raw reward", pictures.rewards(records.storage))
    rewards = _diagrams(REWARD, lines, _intervals(records, evaluated)) + _diagrams(by_label, lines)
    sections = [
        ("Reward", rewards + ([distribution] if distribution else [])),
        ("Diversity", _diagrams(DIVERSITY, lines)),
        ("Learning", _diagrams((*LEARNING, *beta), lines)),
    ]
    return [(name, diagrams) for name, diagrams in sections if diagrams]


def _diagrams(
    wanted: Curves, lines: Sequence[Line], intervals: Sequence[tuple[float, float, float]] = ()
) -> list[Diagram]:
    """Those that have data. Evaluations, which `intervals` are of, are few and of the same images: not smoothed."""
    diagrams = []
    for title, unit, names in wanted:
        series = []
        for name, label in names.items():
            points = [(line["epoch"] + 1, line[name]) for line in lines if line.get(name) is not None]
            evaluation = name.startswith("eval_")
            series.append(Series(label, points, not evaluation, intervals if evaluation else ()))
        diagrams.append(curves(title, unit, series))
    return [diagram for diagram in diagrams if diagram]


def _intervals(records: Records, evaluated: Sequence[int]) -> list[tuple[float, float, float]]:
    """(epochs done, low, high) of the evaluated reward: the paired interval of its change, on what it was before."""
    after = [epoch for epoch in evaluated if epoch != BEFORE]
    places = np.linspace(0, len(after) - 1, min(len(after), EVALUATIONS)).round().astype(int)
    changes = [facts.changes(records, [BEFORE, after[i]]).get("") for i in places] if BEFORE in evaluated else []
    return [(change.epoch, change.before + change.low, change.before + change.high) for change in changes if change]
