"""`python -m rewards.score`: commands/score.py."""

if __name__ == "__main__":
    import sys

    from commands.score import main

    sys.exit(main())
