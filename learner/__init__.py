"""Learning: objectives, the flow network, the update step, the epoch loop and its command line."""

import os

# As in diffusion/__init__.py, and for commands that import diffusers before anything of diffusion/.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
