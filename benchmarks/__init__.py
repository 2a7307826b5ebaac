"""Measurements behind the figures in docs/. Run from the repository's root, `python -m benchmarks.NAME`."""

import diffusion  # noqa: F401 - before transformers is imported: it quiets its warnings
