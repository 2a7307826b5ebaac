"""Runs with the reward ocr. The embedded model draws shapes and cannot write, so its own pictures score nothing; that
training follows what is read is shown with a decoder that writes in its place."""

import csv

import pyarrow.parquet as pq
import pytest
import torch
from emulated_run import lora
from words import as_images, page

import learner
from learner import build
from learner.run import main

pytestmark = pytest.mark.long
PROMPTS = [
    ('a red circle with the word "OPEN"', ""),
    ('a blue ring, "NO ENTRY" below', ""),
    ("a yellow star with a number", "42"),
]


@pytest.fixture
def settings(small_settings, tmp_path) -> list[str]:
    """One small epoch of the embedded model, prompts with quoted text and a column."""
    with (tmp_path / "prompts.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("prompt", "text"), *PROMPTS])
    return [
        *small_settings, "model.path=models/shapes", "train.epochs=1", "reward.name=ocr", "objective.kind=rtb",
        "flow.warmup_steps=0", "flow.fit_steps=0", f"prompts.path={tmp_path / 'prompts.csv'}",
    ]  # fmt: skip


def test_on_pictures_without_text_a_run_goes_to_its_end(settings, tmp_path):
    assert main([*settings, "run.runner=inprocess", f"run.dir={tmp_path / 'run'}"]) == 0
    rows = pq.read_table(tmp_path / "run/trajectories").to_pylist()
    assert {row["prompt"] for row in rows} <= {prompt for prompt, _ in PROMPTS} and len(rows) == 8
    assert all(0 <= row["reward"] <= 0.5 for row in rows)  # a ring may pass for an o
    assert sum(row["reward"] == 0 for row in rows) >= 6


@pytest.mark.ray
def test_on_ray_the_same_bits(settings, tmp_path, cluster):
    for name, way in {"inprocess": "run.runner=inprocess", "ray": "sampler.actors=2"}.items():
        assert main([*settings, way, f"run.dir={tmp_path / name}"]) == 0
    assert lora(tmp_path / "ray") == lora(tmp_path / "inprocess")


class Writer:
    """Writes the more letters of OPEN right, the brighter the first channel of its latents is on average."""

    def __init__(self, *place: object) -> None:
        pages = as_images(*(page((60, 300, 110, text)) for text in ("GRIM", "GREM", "OREM", "OPEM", "OPEN")))
        self.pages = torch.nn.functional.avg_pool2d(pages, 2)

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        right = (5 * (0.5 + latents[:, 0].mean((1, 2)))).clamp(0, 4).long()
        return self.pages[right]


def test_training_follows_what_is_read(tmp_path, monkeypatch):
    """The reward through a whole run, with scores that differ."""
    monkeypatch.setattr(build, "Decoder", Writer)
    result = learner.train(
        "configs/shapes_ddpo.yaml",
        {
            "reward.name": "ocr", "sampler.steps": 5, "sampler.chunk_size": 8, "prompts.per_prompt": 8,
            "train.epochs": 3, "train.trajectories": 32, "learner.ranks": 1, "learner.learning_rate": 5e-3,
            "evaluation.images": 8, "evaluation.every": 3, "mlflow.enabled": False,
        },
        prompts=['a red circle with the word "OPEN"'], runner="inprocess", run_dir=str(tmp_path / "run"),
    )  # fmt: skip
    before, *_, last = result.metrics
    assert result.metrics[1]["reward_std"] > 0.05
    assert last["eval_reward_mean"] > before["eval_reward_mean"] + 0.1
    scores = {row["reward"] for row in pq.read_table(tmp_path / "run/trajectories").to_pylist()}
    assert scores <= {0, 0.25, 0.5, 0.75, 1} and len(scores) >= 3
