"""A progress bar for whoever watches a terminal; in a job's log there is one plain line an epoch instead."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from tqdm import tqdm


class Bar:
    """The bar of what is going on within an epoch, on stderr; nothing at all where that is no terminal."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None
        self._on = sys.stderr.isatty()

    def show(self, what: str, done: int, total: int) -> None:
        """`done` of `total` chunks of `what`."""
        if not self._on:
            return
        if self._bar is None:
            self._bar = tqdm(desc=what, total=total, leave=False, bar_format="{desc}{n}/{total} |{bar}| {elapsed}")
        self._bar.total, self._bar.n = total, done
        self._bar.set_description(what)

    def around(self, say: Callable[[str], None], text: str) -> None:
        """Say a line, with the bar out of its way."""
        self.close()
        say(text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
