"""Ground floor: kernels, rollouts, base models, LoRA state. Plain torch, never Ray."""
