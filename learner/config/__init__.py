"""The configuration: schema.py has every key, load.py reads it, checks.py finds contradictions. Imports no torch."""

from learner.config.load import (
    DEFAULT_CONFIG,
    ROOT,
    ConfigError,
    build_config,
    config_yaml,
    load_config,
    read_config,
    read_tree,
    resolve,
    saved_config,
)
from learner.config.schema import CONFIG_VERSION, Config, known_keys

__all__ = [
    "CONFIG_VERSION", "DEFAULT_CONFIG", "ROOT", "Config", "ConfigError", "build_config", "config_yaml", "known_keys",
    "load_config", "read_config", "read_tree", "resolve", "saved_config",
]  # fmt: skip
