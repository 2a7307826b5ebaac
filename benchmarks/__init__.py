"""Measurements behind the figures in docs/. Run from the repository's root, `python -m benchmarks.NAME`."""

import cluster as _cluster  # noqa: F401  (sets Ray's authentication mode before Ray is imported)
import diffusion  # noqa: F401 - before transformers is imported: it quiets its warnings
