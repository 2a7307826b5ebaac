"""Thin Ray shells around the compute classes, and the runner that dispatches to them. No logic of their own."""

import cluster as _cluster  # noqa: F401  (sets Ray's authentication mode before Ray is imported)
