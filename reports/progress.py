"""A progress bar for whoever watches a terminal; in a job's log there is one plain line an epoch instead."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from tqdm import tqdm


class Bar(AbstractContextManager["Bar"]):
    """The bar of what is going on within an epoch, on stderr; nothing at all where that is no terminal."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None

    def show(self, what: str, done: int, total: int) -> None:
        """`done` of `total` pieces of `what`: chunks, transitions to train on, actors that start."""
        if self._bar is None:
            form = "{desc}{n}/{total} |{bar}| {elapsed}"
            self._bar = tqdm(desc=what, total=total, leave=False, disable=None, bar_format=form)
        self._bar.total, self._bar.n = total, done
        self._bar.set_description(what)

    def around(self, say: Callable[[str], None], text: str) -> None:
        """Say a line, with the bar out of its way."""
        self.close()
        say(text)

    def close(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    __exit__ = close
