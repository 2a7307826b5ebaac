"""How YAML and `key=value` become a configuration: sections.py has the keys, checks.py the contradictions. Faults are
reported together, each with its key and, for a misspelt one, the nearest known key."""

import copy
import difflib
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from learner.config.checks import ConfigError, contradictions, raise_faults
from learner.config.schema import CONFIG_VERSION, Config, known_keys, section_types
from records.passwords import without_passwords

if TYPE_CHECKING:
    from records.run_folder import Records

ROOT = Path(__file__).resolve().parent.parent.parent
DEFAULT_CONFIG = ROOT / "configs" / "shapes_alignment.yaml"
Source = Path | str | Mapping[str, Any] | None  # a YAML file, or sections of keys; default: the demo's preset
Overrides = Sequence[str] | Mapping[str, Any]  # "section.key=value", or {"section.key": value}


def load_config(source: Source = None, overrides: Overrides = ()) -> Config:
    """Raises a ConfigError: an unreadable file, or all unknown keys and wrong values, or else all contradictions."""
    config, faults = read_config(source, overrides)
    raise_faults(faults)
    return config


def read_config(source: Source = None, overrides: Overrides = (), name: str = "the config") -> tuple[Config, list[str]]:
    """As load_config, but returns the faults, a line each, with the config that the sound settings make: so that
    whatever else is wrong can be said along with them. Messages call sections of keys `name`. Raises a ConfigError
    where nothing can be made of the file, or it is of another version."""
    if isinstance(source, Mapping):
        tree = copy.deepcopy(dict(source))
    else:
        path, name = Path(source or DEFAULT_CONFIG), str(source or DEFAULT_CONFIG)
        try:
            tree = _parse(path.read_bytes(), f"--config: cannot read {path}")
        except OSError as error:
            raise ConfigError(f"--config: cannot read {path}: {error}") from error
    faults = _override(tree, overrides)
    if (version := tree.get("config_version", CONFIG_VERSION)) != CONFIG_VERSION:
        raise ConfigError(
            f"config_version: {name} is of version {version!r}, this Tributary reads {CONFIG_VERSION}: use the version "
            "that wrote it, or start from a preset in configs/"
        )
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
    return config, faults + list(contradictions(config))


def config_yaml(config: Config) -> bytes:
    """Every setting, as runs and checkpoints keep them."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False).encode()


def as_arguments(settings: Mapping[str, Any]) -> str:
    """{"section.key": value} as a shell's command line takes it."""
    texts = (f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items())
    return " ".join(map(shlex.quote, texts))


def saved_config(records: "Records") -> Config:
    """The settings of a run. Raises a ConfigError where they are of another version, or damaged; a StorageError."""
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
        tree = yaml.safe_load(content) or {}
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"{fault}: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{fault}: it holds {type(tree).__name__}, expected sections of keys")
    return tree


def _override(tree: dict[str, Any], overrides: Overrides) -> list[str]:
    """Put them into the tree; the faults."""
    faults = []
    if not isinstance(overrides, Mapping):
        faults = [f"{text}: expected key=value" for text in overrides if "=" not in text]
        pairs = (text.partition("=") for text in overrides if "=" in text)
        overrides = {key.strip(): _value(text) for key, _, text in pairs}
    for key, value in overrides.items():
        *sections, leaf = key.split(".")
        node: Any = tree
        for section in sections:
            node = node.setdefault(section, {}) if isinstance(node, dict) else None
        if isinstance(node, dict):
            node[leaf] = value
        else:
            faults.append(f"{key}: {'.'.join(sections)} holds a single value in the file, expected a section of keys")
    return faults


def _value(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _describe(item: Any) -> str:
    key = ".".join(str(part) for part in item["loc"][:2])
    if item["type"] == "model_type":
        return f"{key}: expected a section of keys, got {item['input']!r}"
    if item["type"] != "extra_forbidden":
        return f"{key}: {item['msg']}, got {item['input']!r:.200}"
    kind, known = ("key", [*known_keys()]) if "." in key else ("section", [*section_types()])
    same_leaf = [other for other in known_keys() if other.split(".")[1] == key.split(".")[-1]]
    close = difflib.get_close_matches(key, known, 1, 0.5) or same_leaf
    remedy = f"did you mean {close[0]}?" if close else f"sections: {', '.join(section_types())}"
    return f"{key}: unknown {kind}; {remedy}"
