"""A pixel-space DDPM, made on the spot, as a base model: loading, training, its LoRA in plain diffusers and PEFT."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from peft import PeftModel

from diffusion import lora, noise
from diffusion.base_model import BaseModel, Decoder, load_kernel
from diffusion.parts import without_weights
from learner.run import main
from records.storage import Storage
from rewards import registry

SETTINGS = (
    "prompts.path=null", "sampler.guidance=1", "sampler.steps=4", "sampler.chunk_size=4", "prompts.per_prompt=4",
    "train.trajectories=8", "train.epochs=2", "train.updates_per_epoch=1", "evaluation.images=4", "lora.rank=2",
    "learner.micro_batch=4", "flow.warmup_steps=2", "flow.fit_steps=2", "flow.batch=8", "flow.widths=[8,16]",
    "flow.stem_stride=1", "mlflow.enabled=false", "run.runner=inprocess", "reward.name=jpeg_incompressibility",
)  # fmt: skip


@pytest.fixture(scope="module")
def flat_ddpm(ddpm, tmp_path_factory) -> str:
    """The same laid out as on the hub: all files at the top."""
    folder = tmp_path_factory.mktemp("flat")
    for source in (f"{ddpm}/unet", f"{ddpm}/scheduler", ddpm):
        shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("unet", "scheduler"))
    return str(folder)


def test_both_layouts_load_and_predict_as_plain_diffusers(ddpm, flat_ddpm):
    plain = UNet2DModel.from_pretrained(f"{ddpm}/unet")
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([1, 900])
    with torch.no_grad():
        expected = plain(x, t).sample
        for path in (ddpm, flat_ddpm):
            model = BaseModel(path)
            model.attach_lora(2, 2, 0)
            empty = model.embed(["", ""])
            assert empty.shape == (2, 0, 0) and model.latent_shape == (3, 16, 16) and model.embedding_width is None
            assert torch.equal(model.predict(x, t, empty, 1.0)[0], expected)
            assert torch.equal(model.predict_reference(x, t, empty), expected)
            assert load_kernel(path, 50, 1.0).timesteps[-1] == 1
            for _, parameter in lora.named(model.unet):
                parameter.add_(0.1)
            assert not torch.equal(model.predict(x, t, empty, 1.0)[0], expected)
            assert torch.equal(model.predict_reference(x, t, empty), expected)
    assert without_weights(flat_ddpm)[1] is None
    images = Decoder(ddpm)(torch.tensor([-2.0, -1.0, 0.0, 1.0]).reshape(4, 1, 1, 1))
    assert images.flatten().tolist() == [0, 0, 0.5, 1]


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["sampler.transitions=low_variance", "sampler.transition_fraction=0.5", "flow.warmup_steps=0",
         "flow.fit_steps=0", "objective.kind=residual_nabla_db", "reward.name=bright:reward"],
    ],
)  # fmt: skip
def test_a_run_from_the_command_line_and_its_lora_in_plain_diffusers(ddpm, tmp_path, monkeypatch, overrides):
    (tmp_path / "bright.py").write_text(
        "def reward(images, prompts):\n    return images.mean((1, 2, 3))\n\n\nreward.differentiable = True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    run = tmp_path / "run"
    assert main([*SETTINGS, f"model.path={ddpm}", f"run.dir={run}", "learner.learning_rate=0.3", *overrides]) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [-1, 0, 1]
    adapter = run / "checkpoints/latest/lora"
    assert sorted(file.name for file in adapter.iterdir()) == sorted(lora.PEFT_FILES)
    assert Storage(str(run)).read("report.html")

    # The images of the last evaluation, drawn again with plain diffusers and PEFT at the same noise.
    unet = PeftModel.from_pretrained(UNet2DModel.from_pretrained(f"{ddpm}/unet"), str(adapter)).merge_and_unload()
    scheduler = DDIMScheduler.from_pretrained(f"{ddpm}/scheduler", steps_offset=1, set_alpha_to_one=False)
    assert scheduler.config.clip_sample
    scheduler.set_timesteps(4)
    draws = [torch.from_numpy(noise.normal(0, noise.EVALUATION, 0, range(4), i, (3, 16, 16))) for i in range(5)]
    x = draws[0]
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            x = scheduler.step(unet(x, t).sample, t, x, eta=1.0, variance_noise=draws[i + 1]).prev_sample
    name = "bright:reward" if overrides else "jpeg_incompressibility"
    drawn, close = registry.load(name)(Decoder(ddpm)(x), [""] * 4), 1e-5 if overrides else 2e-3
    files = (run / f"evaluation/epoch-{epoch}.json" for epoch in ("000001", "before"))
    recorded, untrained = (json.loads(file.read_text())["reward"] for file in files)
    assert drawn.tolist() == pytest.approx(recorded, abs=close)
    assert np.abs(np.subtract(recorded, untrained)).max() > 2 * close


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["prompts.path=configs/prompts/shapes_placed.txt"], "takes no prompts; set prompts.path=null"),
        (["sampler.guidance=3"], "nothing to guide; set it to 1"),
        (["sampler.steps=1000"], "its grid begins at timestep 1000 of 1000: set fewer sampler.steps"),
        (["sampler.guidance=3", "model.path=TINY"], "takes prompts; name a file of them"),
    ],
)
def test_settings_of_the_other_kind_are_refused(ddpm, tiny_pipeline, tmp_path, capsys, overrides, message):
    overrides = [override.replace("TINY", tiny_pipeline) for override in overrides]
    assert main([*SETTINGS, f"model.path={ddpm}", f"run.dir={tmp_path / 'run'}", *overrides]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2, "add_attention": False},
         "no attention"),
        ({"sample_size": [16, 24]}, "sample_size"),
        ({"num_class_embeds": 10}, "num_class_embeds is 10"),
        ({"in_channels": 1, "out_channels": 1}, "its in_channels is 1, not 3, its out_channels is 1, not 3"),
    ],
)  # fmt: skip
def test_unets_that_cannot_be_used_are_refused(ddpm, tmp_path, capsys, change, message):
    folder = shutil.copytree(ddpm, tmp_path / "model")
    config = folder / "unet/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    assert main([*SETTINGS, f"model.path={folder}", f"run.dir={tmp_path / 'run'}"]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("model.path") == 1
