"""`python -m rewards.verify`: commands/verify.py."""

if __name__ == "__main__":
    import sys

    from commands.verify import main

    sys.exit(main())
