"""An embedded flow-matching model: a Stable Diffusion 3 pipeline of the shapes world. See README.md."""
