"""`python -m learner.upload`: see commands/upload.py."""

from learner.__main__ import enter

if __name__ == "__main__":
    enter("upload")
