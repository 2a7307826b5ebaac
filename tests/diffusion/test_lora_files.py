"""LoRA files of every form come back bit by bit; what does not is refused in one line."""

import json
import re

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusion import lora, lora_files
from diffusion.base_model import BaseModel
from diffusion.lora_files import BadAdapter

RANK, ALPHA = 2, 0.3  # a float32 that prints as 0.30000001192092896


def disturb(unet) -> np.ndarray:
    flat = lora.snapshot(unet, 0).flat
    flat = (flat + 0.05 * np.random.default_rng(0).standard_normal(flat.shape)).astype(np.float32)
    lora.load(unet, flat)
    return flat


@pytest.fixture(scope="module")
def saved(tiny_pipeline, tmp_path_factory):
    """Folder of a LoRA with alpha != rank, with the same as diffusers writes it in `theirs`; and its buffer."""
    folder = tmp_path_factory.mktemp("lora")
    model = BaseModel(tiny_pipeline)
    model.attach_lora(RANK, ALPHA, seed=0)
    flat = disturb(model.unet)
    lora.save_files(model.unet, folder)
    state, config = get_peft_model_state_dict(model.unet), model.unet.peft_config["default"]
    StableDiffusionPipeline.save_lora_weights(
        folder / "theirs", convert_state_dict_to_diffusers(state), unet_lora_adapter_metadata=config.to_dict()
    )
    return folder, flat


@pytest.fixture
def changed(saved, tmp_path):
    """Writes diffusers' own file, or ours of that name, anew with other tensors or metadata."""

    def write(change=dict, metadata="same", name=lora.DIFFUSERS_FILE, **settings):
        source = saved[0] / ("theirs" if name == lora.DIFFUSERS_FILE else "") / name
        if metadata == "same":
            with safe_open(str(source), "pt") as opened:
                metadata = opened.metadata()
            if settings:
                said = json.loads(metadata[lora_files.METADATA_KEY]) | {f"unet.{k}": v for k, v in settings.items()}
                metadata = {lora_files.METADATA_KEY: json.dumps(said)}
        file = tmp_path / name
        save_file(change(load_file(source)), file, metadata)
        return file

    return write


@pytest.mark.parametrize("name", ["", lora.DIFFUSERS_FILE, lora.KOHYA_FILE, f"theirs/{lora.DIFFUSERS_FILE}"])
def test_what_was_saved_comes_back_bit_by_bit(saved, tiny_pipeline, name):
    folder, flat = saved
    adapter = lora_files.read(folder / name)
    assert (adapter.rank, adapter.alpha, adapter.note) == (RANK, ALPHA, None)
    assert adapter.source == str(folder / (name or lora.DIFFUSERS_FILE))
    model = BaseModel(tiny_pipeline)
    snapshot = lora_files.attach(model, adapter)
    assert np.array_equal(snapshot.flat.view(np.uint32), flat.view(np.uint32))
    assert snapshot.sha256 == adapter.sha256 == lora.digest(flat)
    content = {file: (folder / file).read_bytes() for file in (lora.DIFFUSERS_FILE, lora.KOHYA_FILE)}
    assert lora.files(model.unet) == content and len(set(content.values())) == 1
    assert model.unet.peft_config["default"].lora_alpha == ALPHA


def test_other_names_for_the_same(saved, changed, tiny_pipeline, tmp_path):
    """unet.save_lora_adapter, which knows no prefix; attn1.processor.to_q_lora.down, as diffusers before PEFT."""
    model = BaseModel(tiny_pipeline)
    lora_files.attach(model, lora_files.read(saved[0]))
    model.unet.save_lora_adapter(tmp_path / "own")
    pattern = re.compile(r"(attn\d)\.(to_q|to_k|to_v|to_out)(\.0)?\.lora")
    old = changed(lambda tensors: {pattern.sub(r"\1.processor.\2_lora", name): t for name, t in tensors.items()})
    for file in (tmp_path / "own", old):
        adapter = lora_files.read(file)
        assert (adapter.alpha, adapter.sha256, adapter.note) == (ALPHA, lora.digest(saved[1]), None)


def test_pefts_form_of_a_model_without_text(ddpm, tmp_path):
    model = BaseModel(ddpm)
    model.attach_lora(RANK, ALPHA, seed=0)
    flat = disturb(model.unet)
    lora.save_files(model.unet, tmp_path)
    for path in (tmp_path, tmp_path / lora.PEFT_FILES[1]):
        adapter = lora_files.read(path)
        assert (adapter.rank, adapter.alpha, adapter.note) == (RANK, ALPHA, None)
        again = BaseModel(ddpm)
        assert np.array_equal(lora_files.attach(again, adapter).flat, flat)
    settings = {"peft_type", "r", "lora_alpha", "target_modules", "init_lora_weights"}  # an older PEFT knows these
    assert set(json.loads((tmp_path / lora.PEFT_FILES[0]).read_text())) == settings
    (tmp_path / lora.PEFT_FILES[0]).unlink()
    assert lora_files.read(tmp_path).alpha == RANK and "alpha" in lora_files.read(tmp_path).note


def test_a_lora_on_other_modules_keeps_them(tiny_pipeline, tmp_path):
    """Half precision, two targets, a convolution: as others train them."""
    model = BaseModel(tiny_pipeline)
    model.unet.add_adapter(LoraConfig(r=3, lora_alpha=5, target_modules=["to_q", "proj_in", "conv_out"]))
    flat = disturb(model.unet).astype(np.float16)
    lora.load(model.unet, flat.astype(np.float32))
    lora.save_files(model.unet, tmp_path)
    tensors = {name: tensor.half() for name, tensor in load_file(tmp_path / lora.KOHYA_FILE).items()}
    save_file(tensors, tmp_path / "theirs.safetensors")
    x, t, embeddings = torch.randn(1, 4, 16, 16), torch.tensor([99]), model.embed(["a red ring"])
    half, again, plain = (BaseModel(tiny_pipeline, dtype=dtype) for dtype in (torch.bfloat16, *[torch.float32] * 2))
    for file, adapted in ((lora.DIFFUSERS_FILE, half), ("theirs.safetensors", again)):
        adapter = lora_files.read(tmp_path / file)
        assert (adapter.rank, adapter.alpha) == (3, 5)
        assert np.array_equal(lora_files.attach(adapted, adapter).flat, flat.astype(np.float32))
    with torch.no_grad():
        expected = model.predict(x, t, embeddings, 1.0)[0]
        assert torch.equal(again.predict(x, t, embeddings, 1.0)[0], expected)
        assert not torch.allclose(plain.predict(x, t, embeddings, 1.0)[0], expected, atol=1e-3)
        lora_files.merge(plain.unet, adapter)
        assert torch.allclose(plain.predict(x, t, embeddings, 1.0)[0], expected, atol=1e-5)


def test_without_metadata_alpha_is_the_rank_as_in_diffusers(changed, tiny_pipeline):
    file = changed(metadata=None)
    adapter = lora_files.read(file)
    assert adapter.alpha == RANK and "does not say its alpha: taken to be its rank 2" in adapter.note
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline, use_safetensors=True)
    pipe.load_lora_weights(str(file.parent))
    model = BaseModel(tiny_pipeline)
    lora_files.attach(model, adapter)
    x, t, embeddings = torch.randn(1, 4, 16, 16), torch.tensor([99]), model.embed(["a red ring"])
    with torch.no_grad():
        theirs = pipe.unet(x, t, encoder_hidden_states=embeddings).sample
    assert torch.equal(model.predict(x, t, embeddings, 1.0)[0], theirs)


def test_the_names_of_stable_diffusions_modules_survive_kohyas_underscores(tmp_path):
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
    names = [name for name, module in unet.named_modules() if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)]
    assert len(names) > 250
    parts = {"lora_down": torch.ones(1, 2), "lora_up": torch.ones(2, 1)}
    places = [f"lora_unet_{name.replace('.', '_')}" for name in names]
    kohya = {f"{place}.{part}.weight": t.clone() for place in places for part, t in parts.items()}
    save_file(kohya, tmp_path / "all.safetensors")
    assert lora_files.read(tmp_path).modules == sorted(names)


@pytest.mark.parametrize(("width", "generation"), [(768, "sd_v1"), (1024, "sd_v2"), (64, None)])
def test_which_stable_diffusion_a_lora_fits(width, generation):
    """A model with texts as wide, but narrower layers, is none."""
    for channels, expected in (((320, 640, 1280, 1280), generation), ((32, 64, 64, 64), None)):
        with torch.device("meta"):
            unet = UNet2DConditionModel(cross_attention_dim=width, block_out_channels=channels)
        shapes = {name: module.weight.shape for name, module in unet.named_modules() if name.endswith("to_k")}
        state = {f"{name}.lora_A.weight": torch.zeros(1, into) for name, (_, into) in shapes.items()}
        state |= {f"{name}.lora_B.weight": torch.zeros(out, 1) for name, (out, _) in shapes.items()}
        assert lora_files.generation(lora_files.AdapterFile("", 1, 1.0, state)) == expected
    attention = {name: value for name, value in state.items() if "attn2" not in name}
    assert lora_files.generation(lora_files.AdapterFile("", 1, 1.0, attention)) is None


def test_more_metadata_leaves_tensors_and_equal_files_alone(saved):
    content = (saved[0] / lora.DIFFUSERS_FILE).read_bytes()
    made = {lora.with_metadata(content, {"b": "ü", "a": str(1), **more}) for more in ({}, {}, {})}
    assert len(made) == 1
    file = saved[0].parent / "more.safetensors"
    file.write_bytes(made.pop())
    with safe_open(str(file), "pt") as opened:
        assert opened.metadata()["b"] == "ü" and opened.metadata()["format"] == "pt"
    adapter = lora_files.read(file)
    assert (adapter.sha256, adapter.alpha) == (lora.digest(saved[1]), ALPHA)
    header = file.read_bytes()[8:]
    assert header.index(b'"a"') < header.index(b'"b"') < header.index(b'"format"')
    assert int.from_bytes(file.read_bytes()[:8], "little") % 8 == 0


def refused(path) -> str:
    with pytest.raises(BadAdapter) as caught:
        lora_files.read(path)
    text = str(caught.value)
    assert "\n" not in text and str(path) in text
    return text


def test_files_that_are_none(saved, tmp_path):
    assert "no such file or folder" in refused(tmp_path / "nothing")
    assert "holds no LoRA or several: 0 safetensors files" in refused(tmp_path)
    (tmp_path / "weights.bin").write_bytes(b"\x80\x02}q\x00.")
    assert "safetensors file, and no other is read" in refused(tmp_path / "weights.bin")
    whole = (saved[0] / lora.DIFFUSERS_FILE).read_bytes()
    for size in (0, 7, 100, len(whole) - 1):
        file = tmp_path / f"cut-{size}.safetensors"
        file.write_bytes(whole[:size])
        assert "no whole safetensors file" in refused(file) and "copy or download it again" in refused(file)
    assert ": 4 safetensors files; name" in refused(tmp_path)
    for tensors, held in (
        ({"conv_in.weight": torch.zeros(2, 2)}, "it holds conv_in.weight"),
        ({"lora_unet_x.alpha": torch.tensor(1.0)}, "it holds nothing"),
        ({}, "it holds nothing"),
    ):
        save_file(tensors, tmp_path / "other.safetensors")
        assert f"is no plain LoRA of a U-Net: {held}" in refused(tmp_path / "other.safetensors")


def without(tensors, part):
    doomed = next(name for name in tensors if part in name)
    return {name: tensor for name, tensor in tensors.items() if name != doomed}


def with_first(tensors, change, part="down"):
    first = next(name for name in tensors if part in name)
    return tensors | {first: change(tensors[first]).contiguous()}


KOHYA, DAMAGED = {"name": lora.KOHYA_FILE}, {"metadata": {lora_files.METADATA_KEY: "{"}}


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (lambda t: without(t, "lora.up"), {}, "is not whole: 'down_blocks.1"),
        (lambda t: without(t, "lora.down"), {}, "is not whole: 'down_blocks.1"),
        (lambda t: without(t, "lora_up"), KOHYA, "is not whole"),
        (lambda t: without(t, "lora_down"), KOHYA, "is not whole"),
        (lambda t: with_first(t, lambda x: x * float("nan")), {}, "not finite"),
        (lambda t: with_first(t, lambda x: x[0]), {}, "no LoRA's; copy or download it again"),
        (lambda t: with_first(t, lambda x: x[:1]), {}, "ranks [1, 2]"),
        (lambda t: t | {"unet.x.lora_magnitude_vector": torch.ones(3)}, {}, "holds unet.x.lora_magnitude_vector"),
        (lambda t: t | {"text_encoder.x.lora.down.weight": torch.ones(2, 3)}, {}, "text_encoder.x.lora.down.weight"),
        (lambda t: with_first(t, lambda _: torch.tensor(9.0), ".alpha"), KOHYA, "alphas [0.3, 9.0]"),
        (dict, {"use_rslora": True}, "uses use_rslora"),
        (dict, {"alpha_pattern": {"to_q": 3}}, "uses alpha_pattern"),
        (dict, {"r": 7}, "has ranks [2, 7]"),
        (dict, {"lora_alpha": None}, "its settings, or adapter_config.json, are damaged"),
        (dict, DAMAGED, "are damaged"),
        (dict, {"metadata": {lora_files.METADATA_KEY: "[" * 10**6}}, "are damaged"),
        (dict, {"r": float("inf")}, "are damaged"),
        (dict, {"lora_alpha": float("inf")}, "alpha (inf) are beyond what half precision holds, 65504: no picture"),
        (lambda t: with_first(t, lambda x: x.fill_(1e38)), {}, "are beyond what half precision holds"),
        (lambda t: {name: torch.full_like(x, 1e4) for name, x in t.items()}, {}, "are beyond what half"),
        (lambda t: with_first(t, lambda _: torch.tensor(1e30), ".alpha"), KOHYA, "alphas [0.3, 1e+30]"),
    ],
)
def test_loras_that_would_draw_something_else(changed, change, settings, message):
    assert message in refused(changed(change, **settings))


def test_a_lora_of_another_base_model_says_where_they_differ(saved, changed, ddpm, tiny_pipeline):
    with pytest.raises(BadAdapter) as caught:
        lora_files.attach(BaseModel(ddpm), lora_files.read(saved[0]))
    first = lora_files.read(saved[0]).modules[0]
    told = f"and the model is pixels without text: its {first} is [48, 48], in this model there is none"
    assert told in str(caught.value)
    wider = changed(lambda tensors: with_first(tensors, lambda x: torch.cat([x, x], 1)))
    with pytest.raises(BadAdapter, match=r"is \[48, 96\], in this model \[48, 48\]; name the base model"):
        lora_files.attach(BaseModel(tiny_pipeline), lora_files.read(wider))
    with pytest.raises(BadAdapter, match="another base model"):
        lora_files.merge(BaseModel(ddpm).unet, lora_files.read(saved[0]))
