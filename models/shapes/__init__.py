"""The embedded default model: a small Stable-Diffusion-shaped pipeline that draws coloured shapes.

`world.py` draws and captions, `detector.py` reads a picture back, `train.py` made the weights beside it,
`measure.py` prints the figures of README.md.
"""
