"""What the learner keeps of an epoch for later ones."""

from dataclasses import fields, replace

import numpy as np
import pytest

from diffusion.trajectory import Chunk, Scores, Trajectories
from learner.experience import Experience

CHUNK = Chunk(0, "train", 0, 0, ("a", "b"), (0, 1))


def held_elsewhere(made):
    """As Ray gives it: arrays that are read-only views of memory which stays taken as long as one of them is there."""
    held = {field.name: getattr(made, field.name) for field in fields(made)}
    views = {
        name: np.frombuffer(value.tobytes(), value.dtype).reshape(value.shape)
        for name, value in held.items()
        if isinstance(value, np.ndarray)
    }
    return replace(made, **views)


def arrays(one: Experience) -> dict[str, np.ndarray]:
    return {
        field.name: value
        for part in (one.trajectories, one.scores)
        for field in fields(part)
        if isinstance(value := getattr(part, field.name), np.ndarray)
    }


@pytest.mark.parametrize("output", [True, False])
def test_what_is_kept_holds_nothing_of_the_object_store(output):
    rng = np.random.default_rng(0)
    made = Trajectories(
        CHUNK, 3, "hash", np.arange(4), rng.normal(size=(2, 5, 1, 2, 2)), rng.normal(size=(2, 4)),
        rng.normal(size=(2, 4)), np.array([[0, 2], [1, 3]]), rng.normal(size=(2, 2, 1, 2, 2)),
    )  # fmt: skip
    scores = Scores(CHUNK, rng.normal(size=(2, 5)))
    given = Experience(held_elsewhere(made), held_elsewhere(scores), {"advantage": np.ones((2, 2))})
    assert not any(array.flags.owndata for array in arrays(given).values()), "else this test shows nothing"
    kept = given.kept(output)
    assert all(array.flags.owndata for array in arrays(kept).values()) and len(kept) == len(given)
    for name, array in arrays(kept).items():
        if name != "model_output" or output:
            np.testing.assert_array_equal(array, arrays(given)[name])
    assert kept.trajectories.model_output.size == (made.model_output.size if output else 0)
    assert kept.prepared is given.prepared and kept.trajectories.policy_version == 3
