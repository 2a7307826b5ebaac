"""How YAML and `key=value` become a configuration. The keys are in sections.py, contradictions in checks.py.

Errors are collected and reported together, each naming its key and, for a misspelt one, the nearest known key.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from learner.config.checks import contradictions
from learner.config.schema import CONFIG_VERSION, Config, known_keys, section_types

if TYPE_CHECKING:
    from records.run_folder import Records

ROOT = Path(__file__).resolve().parent.parent.parent
DEFAULT_CONFIG = ROOT / "configs" / "shapes_alignment.yaml"


class ConfigError(ValueError):
    """Everything wrong with a configuration, one line a fault."""


def load_config(path: Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file (default: the demo's preset) and apply `section.key=value` overrides.

    Raises:
        ConfigError: an unreadable file, any number of unknown keys and wrong values, or, where there are none, any
            number of contradictions.
    """
    config, faults = read_config(path, overrides)
    if faults:
        raise ConfigError("\n".join(faults))
    return config


def read_config(path: Path | None = None, overrides: Sequence[str] = ()) -> tuple[Config, list[str]]:
    """As load_config, but returns the faults, a line each, with the config that the sound settings make: so that
    whatever else is wrong can be said along with them.

    Raises:
        ConfigError: nothing can be made of the file.
    """
    path = path or DEFAULT_CONFIG
    return build_config(read_tree(path), overrides, str(path))


def read_tree(path: Path) -> dict[str, Any]:
    """The sections of keys in a YAML file.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config: cannot read {path}: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"--config: {path} holds {type(tree).__name__}, expected sections of keys")
    return tree


def build_config(tree: dict[str, Any], overrides: Sequence[str], source: str) -> tuple[Config, list[str]]:
    """The config that sections of keys and overrides make, with the faults; `tree`, read from `source`, is changed.

    Raises:
        ConfigError: it is of another version.
    """
    faults = [fault for override in overrides if (fault := _apply(tree, override))]
    if tree.get("config_version", CONFIG_VERSION) != CONFIG_VERSION:
        raise ConfigError(
            f"config_version: {source} is of version {tree['config_version']!r}, this Tributary reads "
            f"{CONFIG_VERSION}: use the version that wrote it, or start from a preset in configs/"
        )
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        faults += [_describe(item) for item in error.errors()]
        for item in error.errors():
            _leave_out(tree, item["loc"])
        return Config.model_validate(tree), faults
    return config, faults + list(contradictions(config))


def config_yaml(config: Config) -> bytes:
    """Every setting, as runs and checkpoints keep them."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False).encode()


def saved_config(records: Records) -> Config:
    """The settings of a run.

    Raises:
        ConfigError: they are of another version, or damaged.
    """
    place = f"{records.storage}/config.yaml"
    try:
        tree = yaml.safe_load(records.storage.read("config.yaml"))
        version = tree.get("config_version") if isinstance(tree, dict) else None
        if version == CONFIG_VERSION:
            return Config.model_validate(tree)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"run.dir: {place} is damaged: {' '.join(str(error).split())}") from error
    raise ConfigError(
        f"config_version: the settings in {place} are of version {version!r}, this Tributary reads {CONFIG_VERSION}: "
        "use the version that wrote them, or choose another run.dir"
    )


def _leave_out(tree: dict[str, Any], location: Sequence[Any]) -> None:
    """Remove a faulty setting: `section.key`, or a section that is none."""
    section, *key = location
    if key and isinstance(tree.get(section), dict):
        tree[section].pop(key[0], None)
    else:
        tree.pop(section, None)


def resolve(path: str) -> Path:
    """A path of the config: as given if it exists, else relative to the project, so that presets hold from
    any working directory."""
    given = Path(path).expanduser()
    return given if given.exists() or given.is_absolute() else (ROOT / given if (ROOT / given).exists() else given)


def _apply(tree: dict[str, Any], override: str) -> str | None:
    key, equals, text = override.partition("=")
    if not equals:
        return f"{override}: expected key=value"
    *sections, leaf = key.strip().split(".")
    node: Any = tree
    for section in sections:
        node = node.setdefault(section, {}) if isinstance(node, dict) else None
    if not isinstance(node, dict):
        return f"{key}: {'.'.join(sections)} holds a single value in the file, expected a section of keys"
    try:
        node[leaf] = yaml.safe_load(text)
    except yaml.YAMLError:
        node[leaf] = text
    return None


def _describe(item: Any) -> str:
    key = ".".join(str(part) for part in item["loc"][:2])
    if item["type"] == "extra_forbidden" and "." not in key:
        close = difflib.get_close_matches(key, section_types(), 1)
        return f"{key}: unknown section" + (
            f"; did you mean {close[0]}?" if close else f"; there are {', '.join(section_types())}"
        )
    if item["type"] == "extra_forbidden":
        return f"{key}: {_nearest(key)}"
    if item["type"] == "model_type":
        return f"{key}: expected a section of keys, got {item['input']!r}"
    return f"{key}: {item['msg']}, got {item['input']!r}"


def _nearest(key: str) -> str:
    keys = known_keys()
    by_leaf = [known for known in keys if known.split(".")[1] == key.split(".")[-1]]
    close = difflib.get_close_matches(key, keys, 1, 0.5) or by_leaf
    return "unknown key" + (f"; did you mean {close[0]}?" if close else f"; sections: {', '.join(section_types())}")
