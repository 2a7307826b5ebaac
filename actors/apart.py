"""Scoring a chunk one trajectory at a time, when the whole costs every reward actor its process: to find out which
prompt or picture does it. Such trajectories are bad, as those are whose reward is not a number."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ray

from actors.pool import Pool
from learner.pipeline import Key
from rewards.scorer import BadReward

Row = tuple[str, int, int, int]  # of a chunk: its key and the row


@dataclass
class _Chunk:
    rows: int
    parts: dict[int, ray.ObjectRef] = field(default_factory=dict)
    bad: dict[int, str] = field(default_factory=dict)


class Apart:
    """The chunks that are scored so. Their answers come from the same pool, under keys with a row."""

    def __init__(self, pool: Pool, batch: int) -> None:
        self.pool, self.batch = pool, batch
        self._chunks: dict[Key, _Chunk] = {}

    def begin(self, key: Key, rows: int, clean: ray.ObjectRef) -> None:
        self._chunks[key] = _Chunk(rows)
        for row in range(rows):
            self.pool.submit((*key, row), "score_row", partial(_arguments, clean, row, self.batch), first=True)

    def answered(self, key: Row, scores: ray.ObjectRef) -> None:
        if (chunk := self._chunks.get(key[:3])) is None:
            return
        chunk.parts[key[3]] = scores
        self._join_if_whole(key[:3])

    def hopeless(self, key: Row, error: Exception) -> None:
        """
        Raises:
            BadReward: no trajectory of the chunk can be scored.
        """
        if (chunk := self._chunks.get(key[:3])) is None:
            return
        chunk.bad[key[3]] = f"no reward actor survives scoring it: {error}"
        if len(chunk.bad) == chunk.rows:
            raise BadReward(f"none of the {chunk.rows} trajectories of chunk {key[2]} can be scored: {error}")
        self._join_if_whole(key[:3])

    def forget(self, key: Row) -> bool:
        """The chunk is made again, and its rows that are still on their way are of no use; whether it was known."""
        return self._chunks.pop(key[:3], None) is not None

    def _join_if_whole(self, key: Key) -> None:
        chunk = self._chunks[key]
        if len(chunk.parts) + len(chunk.bad) == chunk.rows:
            self.pool.submit(key, "join", lambda: (list(chunk.parts), chunk.bad, *chunk.parts.values()), first=True)
            del self._chunks[key]


def _arguments(*given: Any) -> tuple[Any, ...]:
    return given
