"""How YAML and `key=value` become a configuration: sections.py has the keys, checks.py the contradictions. Faults are
reported together, each with its key and, for a misspelt one, the nearest known key."""

import copy
import difflib
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from learner.config.checks import ConfigError, contradictions, raise_faults
from learner.config.schema import CONFIG_VERSION, Config, known_keys, section_types
from learner.config.sections import Section
from records.passwords import without_passwords

if TYPE_CHECKING:
    from records.run_folder import Records

ROOT = Path(__file__).resolve().parent.parent.parent
DEFAULT_CONFIG = ROOT / "configs" / "shapes_alignment.yaml"
REWARD, OFFSET = ("name", "weights", "options"), "objective.reward_offset"
# A YAML file, sections of keys, or a config; default: DEFAULT_CONFIG.
Source = Path | str | Mapping[str, Any] | Config | None
Overrides = Sequence[str] | Mapping[str, Any]  # "section.key=value", one or several, or {"section.key": value}


def load_config(source: Source = None, overrides: Overrides = ()) -> Config:
    """Raises a ConfigError: an unreadable file, or all unknown keys and wrong values, or else all contradictions."""
    config, faults = read_config(source, overrides)
    raise_faults(faults)
    return config


def read_config(source: Source = None, overrides: Overrides = (), name: str = "the config") -> tuple[Config, list[str]]:
    """As load_config, but returns the faults, a line each, with the config that the sound settings make: so that
    whatever else is wrong can be said along with them. Messages call sections of keys `name`. Raises a ConfigError
    where nothing can be made of the file, or it is of another version."""
    if isinstance(source, Config):
        tree = source.model_dump(mode="json")
    elif isinstance(source, Mapping):
        tree = copy.deepcopy(dict(source))
    else:
        path, name = Path(source or DEFAULT_CONFIG), str(source or DEFAULT_CONFIG)
        try:
            tree = _parse(path.read_bytes(), f"--config: cannot read {path}")
        except OSError as error:
            raise ConfigError(f"--config: cannot read {path}: {error}") from error
    changes, faults = _pairs(overrides)
    of_file = None if isinstance(source, Config | Mapping) else copy.deepcopy(tree)
    faults += _put(tree, changes)
    other_reward = of_file and _section(of_file, "reward", *REWARD) != _section(tree, "reward", *REWARD)
    if other_reward and OFFSET not in changes:  # the file's is about the mean of its own reward
        _section(tree, "objective").pop(OFFSET.partition(".")[2], None)
    if (version := tree.get("config_version", CONFIG_VERSION)) != CONFIG_VERSION:
        raise ConfigError(
            f"config_version: {name} is of version {version!r}, this Tributary reads {CONFIG_VERSION}: use the version "
            "that wrote it, or start from a preset in configs/"
        )
    if _section(tree, "reward").get("backend") == "native":  # of an older Tributary: there is no other now
        del tree["reward"]["backend"]
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        faults += [_describe(item) for item in error.errors()]
        for item in error.errors():
            section, *key = map(str, item["loc"])
            settings = tree.get(section)
            if key and isinstance(settings, dict):
                settings.pop(key[0], None)
            else:
                tree.pop(section, None)  # a section that is none
        return Config.model_validate(tree), faults
    contradicted = list(contradictions(config))
    was = _section(of_file or {}, "objective").get("kind")
    if contradicted and was not in (None, config.objective.kind):
        contradicted.append(f"objective.kind: {Path(name).name} has settings for {was}; {_presets(config)}")
    return config, faults + contradicted


def config_yaml(config: Config) -> bytes:
    """Every setting, as runs and checkpoints keep them."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False).encode()


def as_arguments(settings: Mapping[str, Any]) -> str:
    """{"section.key": value} as a shell's command line takes it."""
    texts = (f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items())
    return " ".join(map(shlex.quote, texts))


def saved_config(records: "Records") -> Config:
    """The settings of a run, with what was measured before training. Raises a ConfigError where they are of another
    version, or damaged; a StorageError."""
    return settled(given_config(records), records)


def settled(config: Config, records: "Records") -> Config:
    """With what the run's run.json has, if it is measured: sampler.spread, and the window for objective.window=auto.
    Raises a ConfigError where one is of other steps."""
    spread, known, found = records.about.get("spread"), records.about.get("settled"), dict[str, Section]()

    def require(name: str, steps: int) -> None:
        if steps != config.sampler.steps:
            fault = f"its {name} is of {steps} steps, not of {config.sampler.steps}"
            raise ConfigError(f"run.dir: run.json in {records.storage} is damaged: {fault}")

    if config.uncalibrated and spread:
        require("spread", len(spread))
        found["sampler"] = config.sampler.model_copy(update={"spread": tuple(spread)})
    if config.objective.window == "auto" and known:
        require("window", known["steps"])
        found["objective"] = config.objective.model_copy(update={"window": tuple(known["window"])})
    return config.model_copy(update=found)


def given_config(records: "Records") -> Config:
    """As saved_config, but as the run was told."""
    place = f"{records.storage}/config.yaml"
    tree = _parse(records.settings(), f"run.dir: {place} is damaged")
    mlflow = tree.get("mlflow")  # of a run of an older Tributary it may hold a password
    if isinstance(mlflow, dict) and isinstance(mlflow.get("uri"), str):
        mlflow["uri"] = without_passwords(mlflow["uri"])
    config, faults = read_config(tree, name=place)
    raise_faults([f"run.dir: {place} is damaged: {fault}" for fault in faults])
    return config


def resolve(path: str) -> Path:
    """A path of the config: as given if it exists, else relative to the project, so that presets hold from
    any working directory."""
    local = Path(path).expanduser()
    return ROOT / local if not local.exists() and (ROOT / local).exists() else local


def _parse(content: bytes, fault: str) -> dict[str, Any]:
    """Raises a ConfigError: `fault`, and why: no YAML, or no sections of keys."""
    try:
        tree = yaml.load(content, _Loader) or {}  # noqa: S506 (it is a safe one)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"{fault}: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{fault}: it holds {type(tree).__name__}, expected sections of keys")
    sections = {str(name): section for name, section in tree.items()}  # YAML has other keys, too
    return {
        name: {str(key): value for key, value in section.items()} if isinstance(section, dict) else section
        for name, section in sections.items()
        if section is not None or name not in section_types()  # all its keys are comments
    }


class _Loader(yaml.SafeLoader):
    """YAML's own would take the last of two equal keys without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        given = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in given:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
                given.add(key.value)
        return super().construct_mapping(node, deep)


def _section(tree: dict[str, Any], name: str, *keys: str) -> dict[str, Any]:
    """A section's settings, or those of `keys`; of what is none, none."""
    section = tree.get(name)
    settings = section if isinstance(section, dict) else {}
    return {key: settings.get(key) for key in keys} if keys else settings


def _pairs(overrides: Overrides) -> tuple[dict[str, Any], list[str]]:
    """By key; and the faults."""
    if isinstance(overrides, Mapping):
        return dict(overrides), []
    texts = [overrides] if isinstance(overrides, str) else overrides
    pairs = (text.partition("=") for text in texts if "=" in text)
    faults = [f"{text}: expected key=value" for text in texts if "=" not in text]
    return {key.strip(): _value(text) for key, _, text in pairs}, faults


def _put(tree: dict[str, Any], changes: Mapping[str, Any]) -> list[str]:
    """Put them into the tree; the faults."""
    faults = []
    for key, value in changes.items():
        *sections, leaf = key.split(".")
        node: Any = tree
        for section in sections:
            node = node.setdefault(section, {}) if isinstance(node, dict) else None
        if isinstance(node, dict):
            node[leaf] = value
        else:
            faults.append(f"{key}: {'.'.join(sections)} holds a single value in the file, expected a section of keys")
    return faults


def _presets(config: Config) -> str:
    """Which has settings for this objective, if possible of the same model."""
    kind, presets = config.objective.kind, []
    for file in DEFAULT_CONFIG.parent.glob("*.yaml"):
        tree = yaml.safe_load(file.read_bytes())
        if _section(tree, "objective").get("kind") == kind:
            presets.append((_section(tree, "model").get("path") != config.model.path, kind not in file.stem, file))
    if not presets:
        return f"leave out what is not for {kind}"
    file, here = min(presets)[-1], Path.cwd()
    return f"those for {kind} are in --config {file.relative_to(here) if file.is_relative_to(here) else file}"


def _value(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _describe(item: Any) -> str:
    key = ".".join(str(part) for part in item["loc"][:2])
    if item["type"] == "model_type":
        return f"{key}: expected a section of keys, got {item['input']!r}"
    if item["type"] == "tuple_type" and len(item["loc"]) <= 3:
        return f"{key}: expected a list, as in {key}=[{item['input']}], got {item['input']!r}"
    if item["type"] == "dict_type" and len(item["loc"]) <= 2:
        return f"{key}: expected keys with values, as in {key}={{key: value}}, got {item['input']!r}"
    if item["type"] != "extra_forbidden":
        choices = re.findall(r"'(.*?)'", item.get("ctx", {}).get("expected", ""))
        close = difflib.get_close_matches(str(item["input"]), choices, 1)
        return f"{key}: {item['msg']}, got {item['input']!r:.200}" + (f"; did you mean {close[0]}?" if close else "")
    if key == "reward.backend":
        return (
            "reward.backend: a package is served now: start `python -m rewards.serve NAME --package` beside the run, "
            "and set reward.name=remote with its url in reward.options (docs/remote_rewards.md)"
        )
    kind, known = ("key", [*known_keys()]) if "." in key else ("section", [*section_types()])
    same_leaf = [other for other in known_keys() if other.split(".")[1] == key.split(".")[-1]]
    close = difflib.get_close_matches(key, known, 1, 0.5) or same_leaf
    remedy = f"did you mean {close[0]}?" if close else f"sections: {', '.join(section_types())}"
    return f"{key}: unknown {kind}; {remedy}"
