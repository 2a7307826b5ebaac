"""Pictures beside each other: those that the run's own evaluation drew, and refusals in one line."""

import io
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from commands import generate
from diffusion import lora
from diffusion.base_model import BaseModel
from diffusion.open_model import open_base_model
from evaluation.adapters import drawing
from learner.config import Config, load_config
from learner.config.sections import LoraConfig
from reports import pictures as sheets


@pytest.fixture(scope="module")
def without_text(ddpm, tmp_path_factory):
    model, folder = BaseModel(ddpm), tmp_path_factory.mktemp("lora")
    model.attach_lora(2, 2, seed=0)
    lora.load(model.unet, lora.snapshot(model.unet, 0).flat + np.float32(0.1))
    lora.save_files(model.unet, folder)
    return ddpm, folder


OUT_OF_RANGE = {"--images": "0", "--seed": "-1", "--steps": "1", "--eta": "1.5", "--guidance": "0.5"}


def pictures(folder, label, prompt=1) -> np.ndarray:
    files = sorted(folder.glob(f"prompt-{prompt:02d}-image-*-{label}.png"))
    return np.stack([np.asarray(Image.open(file)) for file in files])


def evaluated(finished_run, epoch) -> tuple[list[str], np.ndarray]:
    table = pq.read_table(finished_run / f"evaluation/epoch-{epoch}.parquet", columns=["prompt", "thumbnail_png"])
    shown = [np.asarray(Image.open(io.BytesIO(content))) for content in table["thumbnail_png"].to_pylist()]
    return table["prompt"].to_pylist(), np.stack(shown)


def differ(first, second) -> int:
    return int(np.abs(first.astype(int) - second.astype(int)).max())


def draw(*arguments) -> int:
    return generate.main([str(argument) for argument in arguments])


def test_the_pictures_are_those_of_the_runs_evaluation(finished_run, tmp_path, capsys):
    prompts, after = evaluated(finished_run, "000001")
    _, before = evaluated(finished_run, "before")
    assert after.shape[1:] == (64, 64, 3) and len(set(prompts)) > 1
    out, different = tmp_path / "grid.png", list(dict.fromkeys(prompts))
    asked = [word for prompt in different for word in ("--prompt", prompt)]
    assert draw("--lora", finished_run, *asked, "--out", out, "--separate", tmp_path / "each") == 0
    assert capsys.readouterr().out == f"{out}\n"
    for row, prompt in enumerate(prompts):
        number = different.index(prompt) + 1
        base, tuned = (pictures(tmp_path / "each", label, number) for label in sheets.LABELS)
        assert len(base) == len(tuned) == 4
        # The image of that number has its noise; batches of other prompts may round the other way.
        assert differ(base[row], before[row]) <= 1 and differ(tuned[row], after[row]) <= 1
        assert differ(tuned[row], before[row]) > 5
    sheet = Image.open(out)
    assert sheet.getpixel((0, 0)) == sheet.getpixel((sheet.width - 1, sheet.height - 1)) == (255, 255, 255)


def test_the_sheet_shows_both_rows_where_they_belong():
    rng = np.random.default_rng(0)
    base, tuned = rng.integers(0, 255, (2, 3, 200, 200, 3), np.uint8)
    prompt = "a prompt that is much too long for one line of a sheet of three pictures " * 2
    sheet = np.asarray(sheets.comparison([prompt], [(base, tuned)], "seed 1"))

    def find(picture) -> tuple[int, int]:
        places = np.argwhere((sheet[:-199, :-199] == picture[0, 0]).all(-1))
        return next((y, x) for y, x in places if np.array_equal(sheet[y : y + 200, x : x + 200], picture))

    corners = [[find(picture) for picture in row] for row in (base, tuned)]
    for row in corners:
        assert len({y for y, _ in row}) == 1 and [x for _, x in row] == sorted({x for _, x in row})
    assert [x for _, x in corners[0]] == [x for _, x in corners[1]] and corners[0][0][0] + 200 < corners[1][0][0]
    margin = sheet[:, : corners[0][0][1]]
    for y, _ in (corners[0][0], corners[1][0]):
        assert (margin[y + 80 : y + 120] < 128).any()  # its label
    assert (sheet[:, -sheets.MARGIN :] == 255).all()  # nothing runs over
    assert (sheet[: corners[0][0][0]] < 128).any() and (sheet[corners[1][0][0] + 206 :] < 160).any()


@pytest.mark.long
def test_wherever_the_lora_lies_it_is_the_same(finished_run, tmp_path, tiny_pipeline):
    elsewhere = shutil.copytree(finished_run / "checkpoints/step-000002/lora", tmp_path / "elsewhere")
    given = ("--base", tiny_pipeline, "--steps", "4", "--guidance", "3", "--eta", "1", "--seed", "5")
    drawn = []
    for i, (place, *more) in enumerate((
        (finished_run,), (finished_run / "checkpoints/latest",),
        (finished_run / "checkpoints/step-000002/lora" / lora.KOHYA_FILE,), (elsewhere, *given),
        (finished_run, "--step", "1"), (finished_run, "--seed", "6"), (finished_run, "--eta", "0.5"),
        (finished_run, "--guidance", "1"), (finished_run, "--steps", "5"),
    )):  # fmt: skip
        command = ["--lora", place, "--prompt", "a red ring", "--images", "1", "--separate", tmp_path / f"{i}", *more]
        assert draw(*command, "--out", tmp_path / "grid.png") == 0
        drawn.append(pictures(tmp_path / f"{i}", "tuned").tobytes())
    assert len(set(drawn[:4])) == 1 and len(set(drawn)) == 6
    both, ask = Image.open(tmp_path / "grid.png").height, ("--prompt", "a red ring", "--images", "1", *given)
    assert draw(*ask, "--out", tmp_path / "grid.png", "--separate", tmp_path / "alone") == 0  # the base model alone
    assert np.array_equal(pictures(tmp_path / "alone", "base"), pictures(tmp_path / "0", "base"))
    assert not list((tmp_path / "alone").glob("*tuned*")) and Image.open(tmp_path / "grid.png").height < both


def test_more_images_than_a_chunk_and_other_prompts_change_nothing(finished_run, tmp_path):
    for name, words in (("many", ("--prompt", "a pink cross", "--images", "5")), ("few", ("--images", "4"))):
        command = ["--lora", finished_run, *words, "--prompt", "a red ring", "--out", tmp_path / "g.png"]
        assert draw(*command, "--separate", tmp_path / name) == 0
    assert len({picture.tobytes() for picture in pictures(tmp_path / "many", "base", 2)}) == 5
    for label in sheets.LABELS:
        assert np.array_equal(pictures(tmp_path / "many", label, 2)[:4], pictures(tmp_path / "few", label))


def test_a_model_without_text(without_text, tmp_path, capsys, refused):
    base, folder = without_text
    command = ["--lora", folder, "--base", base, "--images", "2", "--steps", "4", "--separate", tmp_path / "each"]
    assert draw(*command, "--out", tmp_path / "grid.png") == 0
    assert differ(pictures(tmp_path / "each", "base"), pictures(tmp_path / "each", "tuned")) > 5
    assert "takes no text" in refused("generate", *command, "--out", tmp_path / "g.png", "--prompt", "a ring")
    shutil.copy(folder / lora.PEFT_FILES[1], tmp_path)  # without the settings beside it
    command = ["--lora", tmp_path, "--base", base, "--images", "1", "--steps", "4", "--out", tmp_path / "grid.png"]
    assert draw(*command) == 0
    assert "warning" in (said := capsys.readouterr().err) and "does not say its alpha" in said


def test_settings_of_a_run_of_the_demo_and_of_another_model():
    assert generate.settings(None, None, None, {}) == load_config()
    other = generate.settings(None, "someone/model", None, {"steps": 20})
    assert other.model.path == "someone/model" and other.sampler == Config().sampler.model_copy(update={"steps": 20})
    config = load_config(overrides=["sampler.guidance=2", "lora.rank=8"])
    given = generate.settings(config, "someone/model", 7, {"eta": 0.5})
    assert (given.sampler.guidance, given.sampler.eta, given.lora.rank, given.evaluation.seed) == (2, 0.5, 8, 7)


def test_what_cannot_be_drawn_is_refused(finished_run, without_text, tmp_path, refused):
    grid, prompt = ("--out", tmp_path / "grid.png"), ("--prompt", "a ring")
    damaged = tmp_path / "cut.safetensors"
    damaged.write_bytes((finished_run / "checkpoints/latest/lora" / lora.DIFFUSERS_FILE).read_bytes()[:-100])
    for arguments, message in (
        (("--lora", tmp_path / "nothing", *prompt, *grid), "no such file or folder"),
        (("--lora", f"memory://{tmp_path.name}/nothing", *prompt, *grid), "there is no run.json"),
        (("--lora", damaged, *prompt, *grid), "no whole safetensors file"),
        (("--lora", without_text[1], "--base", finished_run, *grid), "no model_index.json"),
        (("--lora", without_text[1], *prompt, *grid), "LoRA of another base model"),
        (("--lora", finished_run, "--base", without_text[0], *grid), "LoRA of another base model"),
        (("--lora", finished_run, "--base", "/gone/model", *prompt, *grid), "no such folder: /gone/model"),
        (("--lora", finished_run, "--step", "7", *prompt, *grid), "there are 0, 1, 2"),
        (("--lora", damaged, "--step", "7", *prompt, *grid), "--step"),
        (("--lora", finished_run, *prompt, "--out", tmp_path / "grid.jpg"), "is no .png file"),
        (("--lora", finished_run, *prompt, "--out", damaged / "grid.png"), f"grid.png: {damaged} is a file"),
        (("--lora", finished_run, *prompt, *grid, "--separate", damaged), "cut.safetensors is a file"),
        ((*prompt, *grid, "--step", "1"), "--step: of which run?"),
        (("--lora", finished_run, *grid), "--prompt: what shall be drawn"),
        *((("--lora", finished_run, *prompt, *grid, option, value), option) for option, value in OUT_OF_RANGE.items()),
    ):
        assert message in refused("generate", *arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.safetensors"]


MADE_FOR = {
    "tiny_pipeline": "Stable Diffusion 1.x, 2.x",
    "tiny_sdxl": "Stable Diffusion XL",
    "tiny_sd3": "Stable Diffusion 3, 3.5",
    "tiny_flux": "FLUX.1",
}
KOHYA = {  # a module of each, as kohya's scripts name it
    "input_blocks_4_1_transformer_blocks_0_attn1_to_q": "Stable Diffusion XL",
    "joint_blocks_0_context_block_attn_qkv": "Stable Diffusion 3, 3.5",
    "double_blocks_0_img_attn_qkv": "FLUX.1",
}


@pytest.fixture(scope="module")
def loras(request, tmp_path_factory):
    """A LoRA's file for each kind of model, and kohya's: whose each is."""
    folder, found = tmp_path_factory.mktemp("loras"), {}
    for name, words in MADE_FOR.items():
        model = open_base_model(request.getfixturevalue(name), text_tokens=8)
        model.attach_lora(1, 1, seed=0)
        lora.save_files(model.unet, folder / name)
        found[folder / name / lora.DIFFUSERS_FILE] = words
    for name, words in KOHYA.items():
        parts = {"lora_down": torch.ones(1, 8), "lora_up": torch.ones(8, 1)}
        tensors = {f"lora_unet_{name}.{part}.weight": tensor for part, tensor in parts.items()}
        save_file(tensors | {f"lora_unet_{name}.alpha": torch.tensor(1.0)}, folder / f"{name}.safetensors")
        found[folder / f"{name}.safetensors"] = words
    return found


@pytest.mark.parametrize(("verb", "model"), [*(("generate", model) for model in MADE_FOR), ("evaluate", "tiny_sd3")])
def test_a_lora_of_another_kind_of_model_is_told_whose_it_is(verb, model, loras, request, tmp_path, refused):
    base = request.getfixturevalue(model)
    drawn = ["--prompt", "a ring", "--steps", "4", "--out", tmp_path / "grid.png", "--lora"]
    judged = [
        "sampler.steps=4",
        "sampler.chunk_size=4",
        "model.text_tokens=8",
        "objective.clean_prediction=guided",
        "--images",
        "4",
    ]
    mine = MADE_FOR[model]
    for file, words in loras.items():
        if words == mine and file.parent.name == model:
            continue
        line = refused(verb, *(drawn if verb == "generate" else judged), file, "--base", base)
        told = f"made for {words}, and the model is {mine}: " if words != mine else "its "
        assert f"{file} is a LoRA of another base model: {told}" in line
        assert ("save_lora_weights write it in the names read here" in line) == (words == mine)
    assert not list(tmp_path.iterdir())


def test_noise_ends_with_the_runs_window(tiny_pipeline, tmp_path):
    """As the sampler of such a run draws; another number of steps would have another window."""
    settings = "sampler.steps=4", "objective.last_transition=train", f"model.path={tiny_pipeline}"
    window = load_config(overrides=[*settings, "sampler.noise=window", "objective.window=[0, 1]"])
    config = generate.settings(window, None, 3, {})
    assert config.rollout_settings().noise_steps == 2
    (ours,), (all_noise,) = (
        generate.draw(each, None, ["a red circle"], 2)[0]
        for each in (config, generate.settings(load_config(overrides=settings), None, 3, {}))
    )
    judged = drawing(config, ["a ring"], config.evaluation, LoraConfig(rank=1, alpha=1))
    assert judged.noise_steps == 2 and judged.rollout_settings().noise_steps == 2
    (again,) = generate.draw(judged, None, ["a red circle"], 2)[0]
    assert np.array_equal(ours, again) and differ(ours, all_noise) > 5
    with pytest.raises(ValueError, match="--steps: the run has noise in the first 2 of 4 steps alone"):
        generate.settings(window, None, None, {"steps": 8})
