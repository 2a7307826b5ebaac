"""`python -m learner.generate`: see commands/generate.py."""

from learner.__main__ import enter

if __name__ == "__main__":
    enter("generate")
