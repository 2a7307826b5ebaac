"""The token for a judge behind HTTP: from an environment variable or a file, and never part of a setting. Imports no
torch."""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import SecretStr

VARIABLE = "TRIBUTARY_REWARD_TOKEN"
PRINTABLE = re.compile(r"[\x21-\x7e]+")  # all that may stand in a header


def read(variable: str, file: str | None, settings: str = "reward.options.token_") -> str | None:
    """The content of `file`, else of the environment variable; None where that is not set. Raises ValueError, without
    the token in it, for a file that cannot be read and for what cannot be a token. `settings`: what named the two
    begins so, and goes on with env and file."""
    if file is None:
        where, text = f"{settings}env: the variable {variable}", os.environ.get(variable)
    else:
        where = f"{settings}file: {file}"
        try:
            text = Path(file).expanduser().read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is no text"
            raise ValueError(f"{where} cannot be read here: {reason}") from error
    if text is not None and not PRINTABLE.fullmatch(text):
        raise ValueError(f"{where} holds no token: expected printable ASCII characters without spaces, one or more")
    return text


def carried(*settings: Any) -> dict[str, SecretStr]:
    """What the environment variables hold that these settings (options, terms, held-out rewards) name. It goes to the
    reward actors with their constructor's arguments: of a runtime environment Ray's dashboard and logs would show it.
    """
    return {name: SecretStr(os.environ[name]) for name in _variables(*settings) if os.environ.get(name)}


def put(tokens: Mapping[str, SecretStr]) -> None:
    """Into this process's environment."""
    os.environ.update({name: token.get_secret_value() for name, token in tokens.items()})


def _variables(*settings: Any) -> Iterator[str]:
    for value in settings:
        if isinstance(value, dict):
            if "urls" in value:
                yield str(value.get("token_env", VARIABLE))
            yield from _variables(*value.values())
        elif isinstance(value, list | tuple):
            yield from _variables(*value)
