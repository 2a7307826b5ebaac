"""GFlowNet objectives as pure tensor maths: one file an objective, found by name in by_name.py."""
