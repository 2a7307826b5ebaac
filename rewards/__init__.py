"""Rewards: functions of (images, prompts) -> scores, never Ray. One file a reward; registry.py finds them by name."""
