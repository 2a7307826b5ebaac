"""`python -m learner.compare`: see commands/compare.py."""

from learner.__main__ import enter

if __name__ == "__main__":
    enter("compare")
