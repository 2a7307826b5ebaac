"""Commands: one small file a verb; `python -m learner` lists them."""
