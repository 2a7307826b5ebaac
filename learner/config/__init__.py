"""The configuration: schema.py has every key, load.py reads it, checks.py finds contradictions. Imports no torch."""

from learner.config.checks import ConfigError, raise_faults
from learner.config.load import (
    DEFAULT_CONFIG,
    ROOT,
    as_arguments,
    config_yaml,
    given_config,
    load_config,
    read_config,
    resolve,
    saved_config,
    settled,
)
from learner.config.schema import Config, known_keys

__all__ = [
    "DEFAULT_CONFIG", "ROOT", "Config", "ConfigError", "as_arguments", "config_yaml", "given_config", "known_keys",
    "load_config", "raise_faults", "read_config", "resolve", "saved_config", "settled",
]  # fmt: skip
