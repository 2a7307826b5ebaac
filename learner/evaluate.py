"""`python -m learner.evaluate`: see commands/evaluate.py."""

from learner.__main__ import enter

if __name__ == "__main__":
    enter("evaluate")
