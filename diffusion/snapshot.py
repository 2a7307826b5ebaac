"""One policy version as it travels: numpy alone, so that whoever only passes it on needs no diffusion library."""

import hashlib
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Snapshot:
    """One version of the adapter: read-only float32 buffer [P] and the sha256 of its bytes."""

    version: int
    flat: np.ndarray
    sha256: str


def digest(flat: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(flat, np.float32).data).hexdigest()
