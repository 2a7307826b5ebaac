"""The example is the algorithm: its LoRA is the service's, bit for bit."""

import learner
from examples.minimal_loop import SETTINGS, train
from learner import load_config


def test_the_minimal_loop_trains_the_services_lora(tmp_path, capsys):
    overrides = [f"{key}={value}" for key, value in SETTINGS.items()]
    alone = train(load_config(overrides=overrides))
    served = learner.train(settings={**SETTINGS, "mlflow.enabled": False}, run_dir=tmp_path / "run")
    assert served.metrics[-1]["adapter_sha256"] == alone.sha256
    assert served.metrics[0]["adapter_sha256"] != alone.sha256  # both epochs moved it
    assert "epoch 2: reward 0." in capsys.readouterr().out
