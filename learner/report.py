"""`python -m learner.report`: see commands/report.py."""

from learner.__main__ import enter

if __name__ == "__main__":
    enter("report")
