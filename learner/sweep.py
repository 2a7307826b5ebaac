"""`python -m learner.sweep`: see commands/sweep.py."""

from learner.__main__ import enter

if __name__ == "__main__":
    enter("sweep")
