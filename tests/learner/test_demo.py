"""The demo's own settings raise the evaluated reward; shuffled among trajectories rewards do not."""

import json

import numpy as np
import pytest

from evaluation.metrics import paired_interval
from learner.run import main

EPOCHS = 20


def gain(folder, *overrides) -> tuple[float, float, float]:
    settings = ["run.runner=inprocess", f"train.epochs={EPOCHS}", f"evaluation.every={EPOCHS}", f"run.dir={folder}"]
    assert main([*settings, *overrides]) == 0
    before, after = (
        json.loads((folder / "evaluation" / f"{name}.json").read_text())
        for name in ("epoch-before", f"epoch-{EPOCHS - 1:06d}")
    )
    rewards = np.array(before["reward"]), np.array(after["reward"])
    return float((rewards[1] - rewards[0]).mean()), *paired_interval(*rewards, before["prompt"])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_demo_learns_and_its_shuffled_control_does_not(tmp_path):
    learned, low, _ = gain(tmp_path / "demo")
    control, control_low, _ = gain(tmp_path / "control", "train.shuffle_rewards=true")
    print(f"demo {learned:+.4f}, control {control:+.4f}")
    assert low > 0 > control_low and learned > control + 0.005
