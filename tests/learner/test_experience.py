"""What the learner keeps of an epoch for later ones."""

from dataclasses import replace

import numpy as np
import pytest

from diffusion.trajectory import Chunk, Scores, Trajectories
from learner.experience import Experience

CHUNK = Chunk(0, "train", 0, 0, ("a", "b"), (0, 1))


def arrays(record) -> dict[str, np.ndarray]:
    return {name: value for name, value in vars(record).items() if isinstance(value, np.ndarray)}


def held_elsewhere(record):
    """As Ray gives it: arrays that are read-only views of memory which stays taken as long as one of them is there."""
    views = {n: np.frombuffer(array.tobytes(), array.dtype).reshape(array.shape) for n, array in arrays(record).items()}
    return replace(record, **views)


@pytest.mark.parametrize("output", [True, False])
def test_what_is_kept_holds_nothing_of_the_object_store(output):
    rng = np.random.default_rng(0)
    made = Trajectories(
        CHUNK, 3, "hash", np.arange(4), rng.normal(size=(2, 5, 1, 2, 2)), rng.normal(size=(2, 4)),
        rng.normal(size=(2, 4)), np.array([[0, 2], [1, 3]]), rng.normal(size=(2, 2, 1, 2, 2)),
    )  # fmt: skip
    scores = Scores(CHUNK, rng.normal(size=(2, 5)))
    given = Experience(held_elsewhere(made), held_elsewhere(scores), {"advantage": np.ones((2, 2))})
    kept = given.kept(output)
    assert len(kept) == len(given) and kept.trajectories.policy_version == 3 and kept.prepared is given.prepared
    for before, after in ((given.trajectories, kept.trajectories), (given.scores, kept.scores)):
        assert not any(array.flags.owndata for array in arrays(before).values()), "else this test shows nothing"
        for name, array in arrays(after).items():
            assert array.flags.owndata
            if name != "model_output" or output:
                np.testing.assert_array_equal(array, arrays(before)[name])
    assert kept.trajectories.model_output.size == (made.model_output.size if output else 0)
