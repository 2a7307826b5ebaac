"""sampler.kernel: calibrated, whose variances are measured before training, and flow_grpo."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from model_runs import goes_on_to_the_bit

from commands import evaluate, generate, settled
from diffusion import calibration
from diffusion.base_model import BaseModelError, load_kernel
from diffusion.flow_kernels import FlowGRPOKernel, FlowKernel
from diffusion.settings import RolloutSettings
from diffusion.trajectory import Chunk
from evaluation import calibration as measured
from evaluation import settling
from learner.config import saved_config
from learner.run import main
from records.run_folder import Records
from records.storage import Storage

SD3 = ["run.runner=inprocess", "objective.last_transition=skip", "sampler.guidance=2", "model.text_tokens=16"]


class Normal:
    """The flow model of normal data of deviation `deviation`, whose velocity is known."""

    latent_shape, device = (4, 16, 16), torch.device("cpu")

    def __init__(self, deviation: float) -> None:
        self.deviation = deviation

    def embed(self, prompts):
        return None

    def kernel(self, steps: int) -> FlowKernel:
        self.sigma = torch.linspace(0, 1, steps + 1)
        return FlowKernel(self.sigma.flip(0)[:-1].double())

    def predict(self, x, t, embeddings, guidance):
        sigma, variance = self.sigma[t].reshape(-1, 1, 1, 1), self.deviation**2
        clean = (1 - sigma) * variance / ((1 - sigma) ** 2 * variance + sigma**2) * x
        return (x - clean) / sigma, None


@pytest.mark.parametrize("deviation", [1.0, 0.3])
def test_of_normal_data_the_posteriors_variance_is_measured(deviation):
    """Euler's own 50 steps leave images 3 to 6 % of their variance short, 10 steps 20 % and more."""
    chunk = Chunk(0, "evaluate", 0, 1, ("",) * 8, tuple(range(8)))
    found = calibration.spread(Normal(deviation), RolloutSettings(10), chunk)
    t = np.linspace(1, 0.1, 10)
    exact = deviation**2 * t**2 / ((1 - t) ** 2 * deviation**2 + t**2)
    assert found.shape == (8, 10)
    np.testing.assert_allclose(found.mean(0), exact, rtol=0.09)


@pytest.fixture
def settings(small_settings, settings_of, tiny_sd3, monkeypatch):
    monkeypatch.setattr(calibration, "STEPS", 6)
    monkeypatch.setattr(measured, "PICTURES", 8)
    return lambda kind, *more: [*small_settings, *settings_of(kind), f"model.path={tiny_sd3}", *SD3, *more]


def test_a_run_measures_its_variances_once_and_all_go_by_them(settings, tiny_sd3, tmp_path, capsys):
    assert main([*settings("dag_db", "sampler.kernel=calibrated"), "--plan"]) == 0
    assert "calibrated is measured before training: 8 pictures" in capsys.readouterr().out
    run = goes_on_to_the_bit(settings("dag_db", "sampler.kernel=calibrated"), tmp_path)
    about, cut = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("whole", "cut"))
    spread = about["spread"]
    assert capsys.readouterr().out.count("measuring the calibrated variances") == 2  # of three commands
    assert len(spread) == 4 and min(spread) > 0 and cut["spread"] == spread
    config = saved_config(Records.open(Storage(str(run))))
    assert config.sampler.spread == tuple(spread) and config.rollout_settings().spread == tuple(spread)
    kernel, plain = (load_kernel(tiny_sd3, 4, 1.0, "ddim", None, "calibrated", each) for each in (spread, None))
    t, s = plain.sigmas, torch.cat([plain.sigmas[1:], torch.zeros(1)])
    share = (1 - s) - (1 - t) ** 2 / (1 - s) * s**2 / t**2
    more = (kernel.variance(kernel.timesteps, torch.float64) - plain.variance(kernel.timesteps, torch.float64))[:-1]
    torch.testing.assert_close(more, (share**2 * torch.tensor(spread))[:-1], rtol=1e-6, atol=1e-9)
    judge = [str(run), "--images", "4", "--cache", str(tmp_path / "cache")]
    assert evaluate.main(judge) == 0
    assert evaluate.main([*judge, "sampler.steps=5"]) == 2
    assert "sampler.spread: it is of 4 steps, not of sampler.steps 5" in capsys.readouterr().err
    sheet = ["--prompt", "a red circle", "--lora", str(run), "--images", "1", "--out", str(tmp_path / "grid.png")]
    assert generate.main(sheet) == 0
    assert generate.main([*sheet, "--steps", "5"]) == 2
    assert "are of 4 steps" in capsys.readouterr().err
    Records.open(Storage(str(run))).note(spread=None)
    assert generate.main(sheet) == 2
    assert "sampler.spread: a run's is measured" in capsys.readouterr().err
    lora = str(run / "checkpoints/latest/lora")
    preset = tmp_path / "preset.yaml"
    preset.write_text((run / "config.yaml").read_text())
    assert evaluate.main([lora, *judge[1:], "--config", str(preset), "--out", str(tmp_path)]) == 2
    assert "sampler.spread: a run's is measured" in capsys.readouterr().err


def test_a_measured_window_comes_after_and_a_damaged_spread_is_said(settings, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TRIBUTARY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(settling, "STARTS", 16)
    monkeypatch.setattr(settling, "PROMPTS", 4)
    free = ["objective.window=auto", "objective.last_transition=train", "flow.warmup_steps=0", "flow.fit_steps=0"]
    more = ["train.epochs=1", "train.replay_updates=0", "prompts.per_prompt=4", f"run.dir={tmp_path / 'run'}"]
    assert main(settings("rtb", "sampler.kernel=calibrated", *free, *more)) == 0
    records = Records.open(Storage(str(tmp_path / "run")))
    config = saved_config(records)
    assert config.objective.window != "auto" and config.sampler.spread
    preset = tmp_path / "preset.yaml"
    preset.write_bytes(records.settings())
    assert settled.main([str(preset)]) == 0  # measured there, too; the paths are those of the run
    first, last = config.objective.window
    assert f"objective.window=[{first}, {last}]" in capsys.readouterr().out
    records.note(spread=[0.5])
    assert main(settings("rtb", "sampler.kernel=calibrated", *free, *more)) == 2
    assert "its spread is of 1 steps, not of 4" in capsys.readouterr().err


def test_flow_grpos_step_trains_without_a_noising_kernel(settings, tmp_path):
    more = ["sampler.kernel=flow_grpo", "prompts.per_prompt=4"]
    run = goes_on_to_the_bit(settings("grpo", *more), tmp_path)
    table = pq.read_table(run / "trajectories/epoch-000001.parquet")
    assert not any(table["log_pb_sum"].to_pylist()) and all(table["log_pf_sum"].to_pylist())


def test_kernels_of_a_model_and_what_it_has_not(tiny_sd3, tiny_pipeline):
    kernel, other = (load_kernel(tiny_sd3, 5, a, kind="flow_grpo") for a in (0.6, 0.3))
    assert isinstance(kernel, FlowGRPOKernel) and kernel.times.tolist() == load_kernel(tiny_sd3, 5, 1).times.tolist()
    torch.testing.assert_close(kernel.variance(kernel.timesteps), 4 * other.variance(kernel.timesteps))
    for kind in ("calibrated", "flow_grpo"):
        with pytest.raises(BaseModelError, match=f"sampler.kernel: {kind} is a flow model's; set it to ddim"):
            load_kernel(tiny_pipeline, 5, 1.0, kind=kind)
