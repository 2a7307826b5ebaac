"""The example is the algorithm: its LoRA is the service's, bit for bit."""

import learner
from examples.minimal_loop import SETTINGS, train
from learner import load_config

SMALL = SETTINGS | {
    "sampler.steps": 4, "sampler.chunk_size": 2, "prompts.per_prompt": 2, "train.trajectories": 4,
    "learner.micro_batch": 4, "flow.widths": [8, 16],
}  # fmt: skip


def test_the_minimal_loop_trains_the_services_lora(tmp_path, capsys):
    alone = train(load_config(overrides=[f"{key}={value}" for key, value in SMALL.items()]))
    served = learner.train(settings={**SMALL, "mlflow.enabled": False}, run_dir=tmp_path / "run")
    assert served.metrics[-1]["adapter_sha256"] == alone.sha256
    assert served.metrics[0]["adapter_sha256"] != alone.sha256  # both epochs moved it
    assert "epoch 2: reward 0." in capsys.readouterr().out
