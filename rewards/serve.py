"""`python -m rewards.serve NAME` serves a reward over HTTP."""

if __name__ == "__main__":
    from commands.serve import enter, main

    enter(main)
