"""The configuration: schema.py has every key, load.py reads it, checks.py finds contradictions. Imports no torch."""

from learner.config.load import (
    DEFAULT_CONFIG,
    ROOT,
    ConfigError,
    config_yaml,
    load_config,
    raise_faults,
    read_config,
    resolve,
    saved_config,
)
from learner.config.schema import CONFIG_VERSION, Config, known_keys

__all__ = [
    "CONFIG_VERSION", "DEFAULT_CONFIG", "ROOT", "Config", "ConfigError", "config_yaml", "known_keys", "load_config",
    "raise_faults", "read_config", "resolve", "saved_config",
]  # fmt: skip
