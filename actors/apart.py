"""Scoring a chunk one trajectory at a time, when the whole costs every reward actor its process: to find out which
prompt or picture does it. Such trajectories are bad, as those are whose reward is not a number."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ray

from actors.pool import Pool
from learner.protocol.buffer import Key
from rewards.scorer import BadReward

Row = tuple[str, int, int, int, int]  # of a chunk: its key, the row, and which making of the chunk it is of


@dataclass
class _Chunk:
    rows: int
    making: int
    parts: dict[int, ray.ObjectRef] = field(default_factory=dict)
    bad: dict[int, str] = field(default_factory=dict)


class Apart:
    """The chunks that are scored so. Their answers come from the same pool, under keys with a row."""

    def __init__(self, pool: Pool, batch: int) -> None:
        self.pool, self.batch = pool, batch
        self._chunks: dict[Key, _Chunk] = {}
        self._joined: set[Key] = set()
        self._makings = 0

    def begin(self, key: Key, rows: int, clean: ray.ObjectRef) -> bool:
        """Whether it can be done: not if it was, and putting the parts together is what costs the actors."""
        if key in self._joined:
            return False
        self._makings += 1
        self._chunks[key] = _Chunk(rows, self._makings)
        for row in range(rows):
            arguments = partial(_arguments, clean, row, self.batch)
            self.pool.submit((*key, row, self._makings), "score_row", arguments, first=True)
        return True

    def answered(self, key: Row, scores: ray.ObjectRef) -> None:
        if (chunk := self._of(key)) is None:
            return
        chunk.parts[key[3]] = scores
        self._join_if_whole(key[:3])

    def hopeless(self, key: Row, error: Exception) -> None:
        """
        Raises:
            BadReward: no trajectory of the chunk can be scored.
        """
        if (chunk := self._of(key)) is None:
            return
        chunk.bad[key[3]] = f"no reward actor survives scoring it: {error}"
        if len(chunk.bad) == chunk.rows:
            raise BadReward(f"none of the {chunk.rows} trajectories of chunk {key[2]} can be scored: {error}")
        self._join_if_whole(key[:3])

    def lost(self, key: Row) -> bool:
        """The chunk must be made again; whether it is one that is scored so. Its other rows are of no use then."""
        return self._of(key) is not None

    def forget(self, key: Key) -> None:
        """The chunk is made again: what is still on its way is of no use, and the next one begins anew."""
        self._chunks.pop(key, None)
        self._joined.discard(key)

    def _of(self, key: Row) -> _Chunk | None:
        chunk = self._chunks.get(key[:3])
        return chunk if chunk is not None and chunk.making == key[4] else None

    def _join_if_whole(self, key: Key) -> None:
        chunk = self._chunks[key]
        if len(chunk.parts) + len(chunk.bad) == chunk.rows:
            self.pool.submit(key, "join", lambda: (list(chunk.parts), chunk.bad, *chunk.parts.values()), first=True)
            self._joined.add(key)
            del self._chunks[key]


def _arguments(*given: Any) -> tuple[Any, ...]:
    return given
