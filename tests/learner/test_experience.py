"""What the learner makes of an epoch, and what it keeps of it for later ones."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from diffusion.trajectory import Chunk, Scores, Trajectories
from learner.config import Config
from learner.experience import Experience

CHUNK = Chunk(0, "train", 0, 0, ("a", "b"), (0, 1))


def arrays(record) -> dict[str, np.ndarray]:
    return {name: value for name, value in vars(record).items() if isinstance(value, np.ndarray)}


class Embeds:
    device = torch.device("cpu")

    def embed(self, prompts):
        return torch.tensor([[[float(ord(prompt))]] for prompt in prompts])


@pytest.mark.parametrize("last", ["train", "skip"])
def test_each_transition_has_its_own_states_rewards_and_prompt(last):
    rng = np.random.default_rng(0)
    states, log_pf, rewards = (rng.normal(size=size).astype(np.float32) for size in ((2, 5, 1, 1, 1), (2, 4), (2, 5)))
    chosen = np.array([[0, 1, 2], [2, 0, 1] if last == "skip" else [3, 0, 1]])
    outputs = rng.normal(size=(2, 3, 1, 1, 1)).astype(np.float32)
    made = Trajectories(CHUNK, 3, "hash", np.array([8, 6, 4, 2]), states, log_pf, log_pf, chosen, outputs)
    settings = {"last_transition": last, "reward_offset": 0.5}
    config = Config.model_validate({"objective": settings, "sampler": {"steps": 4}})
    batch = Experience(made, Scores(CHUNK, rewards)).gather(np.arange(6), Embeds(), config)
    end, times = 4 - (last == "skip"), [8, 6, 4, 2, 0]
    for i, (row, step) in enumerate((row, step) for row, steps in enumerate(chosen) for step in steps):
        assert (batch.t[i], batch.t_next[i]) == (times[step], times[step + 1])
        assert (batch.x[i], batch.x_next[i]) == (states[row, step], states[row, step + 1])
        raw = rewards[row] - np.float32(0.5)
        assert (batch.reward[i], batch.reward_next[i], batch.reward_terminal[i]) == (raw[step], raw[step + 1], raw[end])
        assert batch.terminal[i] == (step + 1 == end) and batch.log_pf_old[i] == log_pf[row, step]
        assert batch.trajectory_id[i] == row and batch.embeddings[i] == ord("ab"[row])
        assert batch.output_old[i] == outputs.reshape(-1)[i]


@pytest.mark.parametrize(
    ("kind", "end"), [("rtb", 4), ("rsub", 4), ("dag_db", 4), ("grpo", 4), ("residual_nabla_db", 3)]
)
def test_at_a_windows_end_the_images_reward_counts_and_for_gradients_the_clean_predictions(kind, end):
    rng = np.random.default_rng(1)
    states, log_pf, log_ref, rewards = (
        rng.normal(size=size).astype(np.float32) for size in ((2, 5, 1, 1, 1), (2, 4), (2, 4), (2, 5))
    )
    chosen, outputs = np.array([[1, 2]] * 2), np.zeros((2, 2, 1, 1, 1), np.float32)
    made = Trajectories(CHUNK, 3, "hash", np.array([8, 6, 4, 2]), states, log_pf, log_pf, chosen, outputs, log_ref)
    settings = {"kind": kind, "window": [1, 2], "reward_offset": 0.0}
    config = Config.model_validate({"objective": settings, "sampler": {"steps": 4}})
    batch = Experience(made, Scores(CHUNK, rewards)).gather(np.arange(4), Embeds(), config)
    assert batch.t.tolist() == [6, 4] * 2 and batch.terminal.tolist() == [False, True] * 2
    np.testing.assert_array_equal(batch.reward_terminal, rewards[[0, 0, 1, 1], end])
    np.testing.assert_array_equal(batch.log_ref, log_ref[:, 1:3].ravel())


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
