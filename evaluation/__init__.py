"""Judging a model: fixed image sets, figures with intervals, adapters and runs to judge."""
