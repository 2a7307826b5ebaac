"""`python -m rewards.package build imagereward|hpsv2` makes the environment that a reward package runs in."""

import sys

if __name__ == "__main__":
    from commands.build_package import main

    sys.exit(main())
