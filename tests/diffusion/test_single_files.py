"""A file in a folder's place: one line says what it is and how it becomes a folder, and what can be trained."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from diffusion.locate import BaseModelError, locate
from diffusion.single_files import network_of
from learner.run import main

UNET = "model.diffusion_model.input_blocks.1.0.in_layers.0.weight"
FLUX = ("double_blocks.0.img_attn.qkv.weight", "vector_in.in_layer.weight")
FILES = [
    (("a.lora_A.weight", "a.lora_B.weight"), "is a LoRA, no model: name the folder of the model that it was made for"),
    (("FAKE\nlearner.run: all is well",), "of no known kind: 1 tensors, as FAKE learner.run: all is well"),
    (("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight",), "is a LoRA of FLUX.1, no model"),
    (("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora.up.weight",), "Stable Diffusion 1.x, 2.x,"),
    ((UNET, "cond_stage_model.transformer.x"), "1.x, 2.x in one file: diffusers.StableDiffusionPipeline.from_single"),
    (
        (UNET, "conditioner.embedders.1.model.x"),
        "XL in one file: diffusers.StableDiffusionXLPipeline.from_single_file(",
    ),
    ((UNET, "conditioner.embedders.0.model.x"), "is of no known kind: 2 tensors, as conditioner.embedders.0.model.x"),
    (
        ("model.diffusion_model.joint_blocks.0.x", "text_encoders.clip_l.x"),
        "3, 3.5 in one file: diffusers.StableDiffusion3Pipeline.from_single_file(FILE).save_pretrained(FOLDER)",
    ),
    (
        ("model.diffusion_model.joint_blocks.0.x",),
        "is the transformer of Stable Diffusion 3, 3.5 alone: diffusers.SD3Transformer2DModel.from_single_file(FILE)",
    ),
    (FLUX, "of FLUX.1 alone: diffusers.FluxTransformer2DModel.from_single_file(FILE).save_pretrained(FOLDER/transform"),
    ((*FLUX, "text_encoders.t5xxl.x"), "of FLUX.1 in one file: diffusers.FluxPipeline.from_single_file(FILE).save_"),
    (("double_blocks.0.img_attn.qkv.weight",), "is of no known kind"),  # FLUX.2, Chroma
    (("single_transformer_blocks.0.attn.to_q.weight",), "is a transformer alone, a part of a diffusers folder"),
    (("down_blocks.0.resnets.0.conv1.weight",), "is a U-Net alone"),
    (("decoder.up_blocks.0.resnets.0.conv1.weight",), "is a VAE alone"),
    (("text_model.embeddings.x",), "is a text encoder alone"),
    ((), "is of no known kind: 0 tensors, as none"),
]


def refused(path, tmp_path, capsys) -> str:
    assert main([f"model.path={path}", f"run.dir={tmp_path / 'run'}"]) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"learner.run: model.path: {path} is ") and line.count("\n") == 1
    assert "StableDiffusionXLPipeline" in line and "FluxPipeline (FLUX.1)" in line  # what can be trained
    assert not (tmp_path / "run").exists()
    return line


@pytest.mark.parametrize(("names", "said"), FILES)
def test_a_checkpoint_is_told_by_its_names(names, said, tmp_path, capsys):
    file = tmp_path / "a.safetensors"
    save_file({name: np.zeros((2, 2), np.float32) for name in names}, file)
    assert said in refused(file, tmp_path, capsys)


HEADERS = (b"", b"\x09", b"\xff" * 8, (1 << 20).to_bytes(8, "little") + b"[" * (1 << 20), b"\x02" + bytes(7) + b"[]")


@pytest.mark.parametrize("content", HEADERS, ids=range(len(HEADERS)))
def test_a_damaged_header_is_said(content, tmp_path, capsys):
    (tmp_path / "a.safetensors").write_bytes(content)
    line = refused(tmp_path / "a.safetensors", tmp_path, capsys)
    assert "is no whole safetensors file (" in line and "copy or download it again" in line


@pytest.mark.parametrize("name", ["model.ckpt", "model.bin", "model"])
def test_nothing_is_unpickled(name, tmp_path, capsys):
    (tmp_path / name).write_bytes(b"cbuiltins\nexec\n(S'raise SystemExit'\ntR.")
    assert "convert it to .safetensors on a machine where it is trusted" in refused(tmp_path / name, tmp_path, capsys)


def test_what_else_a_setting_names_is_a_folder_too(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"")
    with pytest.raises(BaseModelError, match=r"model.tiny_decoder: .* is a file, and a diffusers folder is wanted$"):
        locate(str(tmp_path / "a.safetensors"), "config.json", "model.tiny_decoder")


def test_names_that_do_not_tell():
    assert network_of(["base_model.model.q_proj.lora_A.weight"]) is None
