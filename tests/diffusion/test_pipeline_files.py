"""Every file of a pipeline's folder absent, emptied, cut, of another shape or without a key: one line before anything
starts, with the file and the remedy."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusion.base_model import load_kernel
from diffusion.locate import BaseModelError
from diffusion.parts import check_parts, load_tokenizer
from learner.config import ROOT
from learner.run import main

SHAPES = ROOT / "models/shapes"
PARTS = ("scheduler", "text_encoder", "tokenizer", "unet", "vae")
FILES = ["model_index.json", *(str(file.relative_to(SHAPES)) for part in PARTS for file in (SHAPES / part).iterdir())]
WEIGHTS = [name for name in FILES if name.endswith(".safetensors")]
# Any two of these three make a tokenizer, as transformers reads them: one that is gone or damaged may not matter.
TOKENS = ("tokenizer/tokenizer.json", "tokenizer/vocab.json", "tokenizer/merges.txt")
TEXTS = ["a red circle", "ünknown <|x|> WORDS"]


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGES = {"absent": Path.unlink, "emptied": lambda file: file.write_bytes(b""), "cut": cut}


@pytest.fixture
def folder(tmp_path) -> Path:
    for file in FILES:
        (tmp_path / "model" / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(SHAPES / file, tmp_path / "model" / file)
    return tmp_path / "model"


def refused(folder: Path, *words: str) -> None:
    """Both checks that come before a run or its plan: one line, with all these words."""
    with pytest.raises(BaseModelError) as caught:
        check_parts(str(folder))
        load_kernel(str(folder), 4, 1.0)
    line = str(caught.value)
    assert line.startswith("model.path: ") and str(folder) in line and "\n" not in line
    assert all(word in line for word in words), line


@pytest.mark.parametrize("file", sorted(FILES))
@pytest.mark.parametrize("damage", DAMAGES)
def test_every_file_absent_emptied_or_cut_is_named_before_anything_starts(file, damage, folder):
    DAMAGES[damage](folder / file)
    part, _, name = file.rpartition("/")
    if file in TOKENS and (damage == "absent" or name != "tokenizer.json"):
        check_parts(str(folder))
        ids = [load_tokenizer(path)(TEXTS).input_ids for path in (str(folder), str(SHAPES))]
        assert ids[0] == ids[1]
    else:
        refused(folder, part if part == "tokenizer" else name, "copy or download it again")


@pytest.mark.parametrize("part", PARTS)
def test_every_part_absent_is_named(part, folder):
    shutil.rmtree(folder / part)
    refused(folder, part, "copy or download it again")


@pytest.mark.parametrize("file", sorted(WEIGHTS))
def test_weights_of_another_shape_or_without_a_tensor_are_not_made_up(file, folder):
    whole = load_file(folder / file)
    key = next(key for key in sorted(whole) if whole[key].ndim > 1)
    save_file({**whole, key: torch.zeros(3, 5)}, folder / file)
    today = key.removeprefix("text_model.")
    refused(folder, file, f"has {today} of shape [3, 5], its config.json says {list(whole[key].shape)}", "again")
    save_file({name: value for name, value in whole.items() if name != key}, folder / file)
    refused(folder, file, f"has no {today}", "again")


@pytest.mark.parametrize(
    ("file", "key", "value", "said"),
    [
        ("model_index.json", "_class_name", None, "has no pipeline's _class_name"),
        ("model_index.json", "unet", None, "names None as its unet, not UNet2DConditionModel"),
        (
            "model_index.json",
            "text_encoder",
            ["transformers", "T5EncoderModel"],
            "names T5EncoderModel as its text_enc",
        ),
        (
            "scheduler/scheduler_config.json",
            "_class_name",
            None,
            "names None, a scheduler that DDIM cannot stand in for",
        ),
        ("scheduler/scheduler_config.json", "_class_name", "FlowMatchEulerDiscreteScheduler", "names FlowMatchEuler"),
        ("scheduler/scheduler_config.json", "beta_start", "low", "scheduler"),
        ("scheduler/scheduler_config.json", "thresholding", True, "its thresholding is True"),
        ("unet/config.json", "in_channels", 9, "its in_channels is 9, not 4"),
        ("unet/config.json", "sample_size", [16, 24], "its sample_size is [16, 24], no single number"),
        ("unet/config.json", "sample_size", None, "its sample_size is None, no single number"),
        ("unet/config.json", "cross_attention_dim", None, "unet/diffusion_pytorch_model.safetensors has "),
        ("unet/config.json", "cross_attention_dim", 32, "its cross_attention_dim is 32, not 64"),
        ("unet/config.json", "block_out_channels", None, "unet/config.json cannot be used"),
        ("unet/config.json", "norm_num_groups", 0, "unet/config.json cannot be used: ZeroDivisionError"),
        ("unet/config.json", "addition_embed_type", "text_time", "its addition_embed_type is text_time, not None"),
        ("unet/config.json", "time_cond_proj_dim", 256, "its time_cond_proj_dim is 256, not None"),
        ("vae/config.json", "latent_channels", 16, "its in_channels is 4, not 16"),
        ("vae/config.json", "block_out_channels", "wide", "vae/config.json cannot be used"),
        ("vae/config.json", "block_out_channels", None, "vae/config.json cannot be used"),
        ("text_encoder/config.json", "hidden_size", None, "its cross_attention_dim is 64, not None"),
        ("text_encoder/config.json", "num_hidden_layers", 3, "text_encoder/model.safetensors has no encoder.layers.2"),
        ("text_encoder/config.json", "vocab_size", None, "it knows 135 tokens, the text encoder's config.json 49408"),
        ("text_encoder/config.json", "max_position_embeddings", 8, "model_max_length 16, the text encoder reads 8"),
        (
            "tokenizer/tokenizer_config.json",
            "model_max_length",
            None,
            "says no model_max_length, the text encoder reads",
        ),
        ("tokenizer/tokenizer.json", "model", None, "tokenizer cannot be used: "),
    ],
)
def test_what_a_configuration_says_or_leaves_out(file, key, value, said, folder):
    """None: the key is not there. What libraries have a default for is theirs to say, if the weights fit it."""
    settings = json.loads((folder / file).read_text())
    settings.pop(key)
    (folder / file).write_text(json.dumps(settings if value is None else {**settings, key: value}))
    refused(folder, said)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.bin"])
def test_weights_under_another_name_are_found_at_once(name, folder):
    (folder / "unet/diffusion_pytorch_model.safetensors").rename(folder / "unet" / name)
    refused(folder, "unet/diffusion_pytorch_model.safetensors is missing; there is " + name, "save_pretrained(FOLDER)")


def test_names_of_older_libraries_are_weights_all_the_same(folder):
    """What transformers 5 writes and 4 does not, and the attention of autoencoders from before diffusers 0.16."""
    file = folder / "text_encoder/model.safetensors"
    save_file({key.removeprefix("text_model."): value for key, value in load_file(file).items()}, file)
    file, today = folder / "vae/diffusion_pytorch_model.safetensors", {"to_q": "query", "to_out.0": "proj_attn"}
    old = {}
    for key, value in load_file(file).items():
        for new, name in today.items():
            key = key.replace(f".{new}.", f".{name}.")
        old[key] = value
    save_file(old, file)
    check_parts(str(folder))


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "file", ["unet/config.json", "unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"]
)
def test_a_model_without_text_too(file, damage, ddpm, tmp_path):
    folder = Path(shutil.copytree(ddpm, tmp_path / "model"))
    check_parts(str(folder))
    DAMAGES[damage](folder / file)
    refused(folder, file.rpartition("/")[2], "copy or download it again")


@pytest.mark.parametrize(
    ("file", "damage"),
    [("model_index.json", "cut"), ("unet/config.json", "absent"), ("vae/diffusion_pytorch_model.safetensors", "cut"),
     ("text_encoder/model.safetensors", "absent"), ("tokenizer/tokenizer.json", "cut")],
)  # fmt: skip
def test_neither_a_run_nor_its_plan_begins(file, damage, folder, tmp_path, capsys):
    DAMAGES[damage](folder / file)
    for plan in ([], ["--plan"]):
        settings = [f"model.path={folder}", f"run.dir={tmp_path / 'run'}", "run.runner=inprocess"]
        assert main([*settings, *plan]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"learner.run: model.path: {folder}") and not (tmp_path / "run").exists()
