"""Ground floor: kernels, rollouts, base models, LoRA state. Plain torch, never Ray."""

import os

# The core works without torchvision on purpose; transformers warns of that at every import otherwise.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
