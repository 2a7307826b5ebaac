"""Folders of transformers and SDXL, damaged or made to deceive: one line before a run starts, and no code is run."""

import json
import shutil
from pathlib import Path

import pytest

from learner.run import main

SETTINGS = {
    "tiny_sdxl": [],
    "tiny_sd3": ["model.text_tokens=16"],
    "tiny_flux": ["model.text_tokens=16", "model.pixels=64"],
}
INDEX, TRANSFORMER, VAE = "model_index.json", "transformer/config.json", "vae/config.json"
SCHEDULER = "scheduler/scheduler_config.json"
ALL, FLOW = tuple(SETTINGS), ("tiny_sd3", "tiny_flux")
EVIL = "open('ran', 'w').close()\nclass CLIPTokenizer: pass\n"
ABSENT = object()
CHANGES = [  # of a JSON file
    (ALL, INDEX, "tokenizer", ["evil", "CLIPTokenizer"], "names evil.CLIPTokenizer as its tokenizer, not CLIPTok"),
    (ALL, INDEX, "scheduler", ["evil", "DDIMScheduler"], "names evil.DDIMScheduler as its scheduler, not "),
    (ALL, INDEX, "scheduler", ABSENT, "names None as its scheduler, not "),
    (ALL, INDEX, "text_encoder", ["CLIPTextModel"], "names None as its text_encoder, not CLIPTextModel"),
    (ALL, INDEX, "text_encoder_2", [5, "X"], "names 5.X as its text_encoder_2, not "),
    (ALL, SCHEDULER, "_class_name", "x", "scheduler_config.json names x"),
    (ALL, VAE, "scaling_factor", "x", "vae/config.json cannot be used: TypeError"),
    (ALL, VAE, "norm_num_groups", -1, "vae/config.json cannot be used: RuntimeError"),
    (ALL, VAE, "block_out_channels", None, "vae/config.json cannot be used"),
    (FLOW, TRANSFORMER, "joint_attention_dim", "x", "joint_attention_dim is x"),
    (FLOW, TRANSFORMER, "num_attention_heads", -1, "transformer"),
    (FLOW, TRANSFORMER, "num_layers", "two", "transformer/config.json cannot be used: TypeError"),
    (("tiny_sd3",), "text_encoder_2/config.json", "projection_dim", None, "cannot be used: TypeError"),
    (("tiny_sd3",), "text_encoder_2/config.json", "num_hidden_layers", -1, "text_encoder_2/config.json cannot be used"),
    (("tiny_sd3",), TRANSFORMER, "num_layers", 0, "transformer/config.json cannot be used: Target modules"),
    (("tiny_sd3",), INDEX, "text_encoder_3", ["transformers", "UMT5EncoderModel"], "names UMT5EncoderModel as its"),
    (("tiny_sd3",), TRANSFORMER, "patch_size", 0, "cannot be used: ZeroDivisionError"),
    (("tiny_sd3",), TRANSFORMER, "sample_size", -1, "transformer/config.json cannot be used"),
    (("tiny_sd3",), TRANSFORMER, "pos_embed_max_size", ABSENT, "transformer/diffusion_pytorch_model.safetensors has"),
    (("tiny_flux",), TRANSFORMER, "axes_dims_rope", ABSENT, "transformer/config.json cannot be used: RuntimeError"),
    (("tiny_flux",), TRANSFORMER, "in_channels", "x", "its in_channels is x, not 16"),
    (
        ("tiny_flux",), "text_encoder_2/config.json", "relative_attention_max_distance", 0,
        "text_encoder_2/config.json cannot be used",
    ),
    (("tiny_flux",), "text_encoder_2/config.json", "vocab_size", 9999, "tokenizer_2 cannot be used: it knows "),
]  # fmt: skip
GONE = [
    *((ALL, part) for part in ("vae", "scheduler", "tokenizer", "text_encoder_2")),
    (("tiny_flux",), "tokenizer_2"),
    (FLOW, "transformer/diffusion_pytorch_model.safetensors"),
]
OVERRIDES = [
    (ALL, "model.pixels=60", "model.pixels: 60 is no multiple of "),
    (("tiny_sd3",), "model.pixels=256", "model.pixels: 256 is more than 128"),
    (ALL, "model.text_tokens=0", "model.text_tokens"),
    (ALL, "model.text_tokens=100000", "model.text_tokens"),
]


def rows(table):
    return [pytest.param(kind, *row, id=f"{kind}-{i}") for i, (kinds, *row) in enumerate(table) for kind in kinds]


@pytest.fixture
def refused(small_settings, request, tmp_path, monkeypatch, capsys):
    """`refused(kind, damage, *settings)`: the one line of a run over a copy of the model with `damage(folder)` done."""

    def go(kind: str, damage, *settings: str) -> str:
        monkeypatch.chdir(tmp_path)
        folder = shutil.copytree(request.getfixturevalue(kind), tmp_path / "model")
        damage(folder)
        own = [*SETTINGS[kind], f"model.path={folder}", "run.runner=inprocess", "objective.last_transition=skip"]
        own += ["objective.clean_prediction=guided", *settings, f"run.dir={tmp_path / 'run'}"]
        assert main([*small_settings, *own]) == 2
        said = capsys.readouterr().err
        lines = [line for line in said.splitlines() if line.startswith("learner.run: ") and ": warning: " not in line]
        assert len(lines) == 1 and "Traceback" not in said
        assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]  # no run, and no code was run
        return lines[0]

    return go


@pytest.mark.parametrize(("kind", "file", "key", "value", "said"), rows(CHANGES))
def test_what_a_configuration_must_not_say(kind, file, key, value, said, refused):
    def damage(folder: Path) -> None:
        for place in (folder, folder / "tokenizer"):
            (place / "evil.py").write_text(EVIL)
        settings = {**json.loads((folder / file).read_text()), key: value}
        if value is ABSENT:
            del settings[key]
        (folder / file).write_text(json.dumps(settings))

    assert said in refused(kind, damage)


@pytest.mark.parametrize(("kind", "part"), rows(GONE))
def test_parts_that_are_gone(kind, part, refused):
    def damage(folder: Path) -> None:
        (folder / part).rename(folder.parent / "gone")
        shutil.rmtree(folder.parent / "gone") if (folder.parent / "gone").is_dir() else (
            folder.parent / "gone"
        ).unlink()

    line = refused(kind, damage)
    assert part in line and "copy or download it again" in line


@pytest.mark.parametrize(("kind", "setting", "said"), rows(OVERRIDES))
def test_sizes_that_cannot_be(kind, setting, said, refused):
    assert said in refused(kind, lambda folder: None, setting)
