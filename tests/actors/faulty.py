"""A reward that fails: what test_faults.py names."""


class NanForRings:
    def __call__(self, images, prompts):
        scores = images.mean((1, 2, 3))
        scores[[i for i, prompt in enumerate(prompts) if "ring" in prompt]] = float("nan")
        return scores
