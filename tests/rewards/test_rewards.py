"""Rewards by name, and a user's own."""

import io
import sys

import numpy as np
import pytest
import torch
from brightness import clean, scorer
from PIL import Image

from commands import score
from models.shapes import world
from models.shapes.world import Scene, Thing, draw, parse
from rewards import registry
from rewards.scorer import BadReward

THINGS = ("small red circle", "small blue circle", "small red star", "large red circle")


def as_images(*pictures: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255


@pytest.mark.parametrize(("name", "sign"), [("jpeg_incompressibility", 1), ("jpeg_compressibility", -1)])
def test_jpeg_reward_is_the_file_size_in_kilobytes(name, sign):
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (64, 48, 3)).astype(np.uint8), np.zeros((64, 48, 3), np.uint8)]
    reward = registry.load(name)
    scores = reward(as_images(*pictures), ["", ""])
    for picture, value in zip(pictures, scores, strict=True):
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "JPEG", quality=95)
        assert value.item() == pytest.approx(sign * len(buffer.getvalue()) / 1000)
    assert reward.name == name and not reward.differentiable and scores.dtype == torch.float32


@pytest.mark.parametrize("name", ["shapes_alignment", "shapes_alignment_soft"])
@pytest.mark.parametrize(
    "prompts",
    [
        [f"a {thing} on a white background" for thing in THINGS] + ["a small red circle on a black background"],
        [f"a red star at the {place}" for place in ("right", "left", "top", "bottom")],
    ],
)
def test_alignment_prefers_what_the_prompt_says(name, prompts):
    picture = draw(parse(prompts[0]), np.random.default_rng(0))
    right, *wrong = registry.load(name)(as_images(*[picture] * len(prompts)), prompts).tolist()
    assert right > 0.8 and max(wrong) < right - 0.1


def test_alignment_is_graded_near_the_top_and_reads_two_objects_and_accuracy_is_strict():
    rng = np.random.default_rng(0)
    scene = Scene((Thing("red", "circle"), Thing("blue", "square")), "sand")
    picture = draw(scene, rng)
    blurred = np.asarray(Image.fromarray(picture).resize((12, 12)).resize((64, 64)))
    swapped = draw(Scene(scene.things[::-1], "sand"), rng)
    images = as_images(picture, blurred, swapped)
    best, worse, wrong = registry.load("shapes_alignment")(images, [scene.caption()] * 3).tolist()
    assert 1 > best > worse > wrong
    prompts = ["a red circle on a white background", "a blue square on a black background"]
    images = as_images(*(draw(parse(prompt), np.random.default_rng(0)) for prompt in prompts))
    reward = registry.load("shapes_accuracy")
    assert reward(images, prompts).tolist() == [1.0, 1.0] and reward(images, prompts[::-1]).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", ["shapes_alignment", "shapes_alignment_soft", "shapes_accuracy"])
def test_an_open_prompt_scores_as_its_best_answer(name):
    """Also where no answer is good: a blurred drawing, an empty picture."""
    picture = draw(parse("a pink star at the right on a sand background"), np.random.default_rng(0))
    blurred = np.asarray(Image.fromarray(picture).resize((12, 12)).resize((64, 64)))
    images, reward = as_images(picture, blurred, np.full_like(picture, 245)), registry.load(name)

    def scores(prompt: str) -> torch.Tensor:
        return reward(images, [prompt] * len(images))

    for place in ("", " at the right", " at the left"):
        colours, shapes = ("red", "pink", "purple", "orange"), ("star", "circle", "triangle")
        for left_open, answers in {
            f"a star{place}": [f"a {colour} star{place}" for colour in colours],
            f"a pink shape{place}": [f"a pink {shape}{place}" for shape in world.SHAPES],
            f"a shape{place}": [f"a {colour} {shape}{place}" for colour in world.COLOURS for shape in shapes],
            f"star{place}": [f"a star{place} on a {ground} background" for ground in world.BACKGROUNDS],
        }.items():
            best, found = torch.stack([scores(answer) for answer in answers]).max(0).values, scores(left_open)
            assert (found[0] - best[0]).abs() < 0.01 and (found >= best - 1e-6).all(), left_open
    assert scores("a shape")[0] > 0.8 and scores("a shape")[2] < 0.2
    assert scores("a ring")[0] < 0.75 and scores("a red shape")[0] < 0.85
    pair = draw(parse("a pink star and a blue ring on a gray background"), np.random.default_rng(0))
    right, wrong = reward(as_images(pair, pair), ["a star and a blue shape", "a ring and a red shape"]).tolist()
    assert right > 0.8 and wrong < right - 0.1


def test_unknown_names_options_weights_and_prompts_are_refused():
    for name in ("shapes_alignment", "shapes_alignment_soft", "shapes_accuracy"):
        with pytest.raises(ValueError, match="a dog"):
            registry.load(name)(torch.zeros(1, 3, 64, 64), ["a dog"])
        with pytest.raises(ValueError, match="a dog"):
            registry.check(name, None, {}, ["a red circle", "a dog"])
    for name, said in (
        ("beauty", "jpeg_compressibility"), ("aestetic", r"did you mean aesthetic\?"),
        ("no_such_module:f", "looked in the current directory"),
        ("mine.py", r"which function in it\? mine.py:FUNCTION"), ("mine:", "expected module:callable"),
        ("/elsewhere/mine.py:f", "set PYTHONPATH=/elsewhere before the command, and reward.name=mine:f"),
    ):  # fmt: skip
        with pytest.raises(registry.UnknownReward, match=said):
            registry.load(name)
    with pytest.raises(ValueError, match="weights"):
        registry.load("jpeg_compressibility", "x")
    with pytest.raises(ValueError, match="jpeg"):
        registry.load("jpeg_compressibility", colour=3)
    for options in ({"name": "x"}, {"device": "cuda"}, {1: 2}, {"a b": 1}):  # that no reward can have
        with pytest.raises(ValueError, match=r"reward\.options: .* cannot be one; name, weights"):
            registry.check("jpeg_compressibility", None, options, [])


OWN = """
import torch

def brightness(images, prompts):
    return images.mean((1, 2, 3))

class Scaled:
    differentiable = True
    def __init__(self, by):
        self.by = 1 * by
    def __call__(self, images, prompts):
        return self.by * images.mean((1, 2, 3))

def wrong(images, prompts):
    return 0.0

class Way(torch.autograd.Function):
    @staticmethod
    def forward(context, scores):
        return scores * 1
    @staticmethod
    def backward(context, gradient):
        return gradient / torch.zeros(7)

class NoWayBack(torch.nn.Module):
    differentiable = True
    def forward(self, images, prompts):
        return Way.apply(images.mean((1, 2, 3)))

@torch.no_grad()
def table(images, prompts):
    return torch.tensor([{"first": 1.0}[prompt] for prompt in prompts])

number = 3

def returns(what, images):
    return {"pair": (images.mean((1, 2, 3)), {}), "nothing": None, "meta": torch.empty(len(images), device="meta")}[what]

class Returns:
    def __init__(self, what):
        self.what = what
    def __call__(self, images, prompts):
        return returns(self.what, images)

class Mute(Exception):
    def __str__(self):
        raise ValueError("no words")

class Raises:
    def __init__(self, kind):
        self.raised = {"exit": SystemExit(0), "generator": GeneratorExit(), "mute": Mute(), "long": ValueError("x" * 10**6)}[kind]
    def __call__(self, images, prompts):
        import my_helper
        raise my_helper.passed_on(self.raised)

def careless(images, prompts):
    torch.set_num_threads(torch.get_num_threads() + 1)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("medium")
    torch.set_grad_enabled(False)
    return images.mean((1, 2, 3))
"""  # noqa: E501


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "my_reward.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_helper.py").write_text("def passed_on(error):\n    raise error\n")
    for name in ("my_reward", "my_helper"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path / "my_reward.py"


def test_a_users_own_reward(own):
    images = torch.full((2, 3, 4, 4), 0.5)
    assert registry.load("my_reward:brightness")(images, ["", ""]).tolist() == [0.5, 0.5]
    scaled = registry.load("my_reward:Scaled", by=4)
    assert scaled.differentiable and scaled(images, ["", ""]).tolist() == [2, 2]
    with pytest.raises(ValueError, match=r"shape .*as in \.mean\(\(1, 2, 3\)\)"):
        registry.load("my_reward:wrong")(images, ["", ""])
    said_of = {
        "number": "expected a function",
        "brightnes": r"did you mean brightness\?",
        "nosuch": "it has .*brightness",
    }
    for name, said in said_of.items():
        with pytest.raises(registry.UnknownReward, match=said):
            registry.check(f"my_reward:{name}", None, {}, [])
    for written in ("my_reward.py:brightness", "./my_reward.py:brightness"):
        assert registry.load(written)(images, ["", ""]).tolist() == [0.5, 0.5]


def test_what_a_users_own_reward_raises_is_shown_with_the_lines_of_its_file(own, tmp_path, capsys):
    line = next(number for number, text in enumerate(OWN.splitlines(), 1) if "first" in text)
    said = rf"KeyError: 'second' \(at {own}:{line} in table: return torch\.tensor\("
    with pytest.raises(BadReward, match=said) as caught:
        scorer(registry.load("my_reward:table")).score(clean())
    assert str(caught.value).count(".py:") == str(caught.value).count(f"{own}:")  # neither ours nor torch's
    terms = [{"name": "jpeg_compressibility", "weight": 1}, {"name": "my_reward:table", "weight": 1}]
    with pytest.raises(BadReward, match=rf"weighted_sum failed.*{said}"):
        scorer(registry.load("weighted_sum", terms=terms)).score(clean())
    with pytest.raises(BadReward, match=rf"gradient of reward my_reward:NoWayBack failed.*\(at {own}:\d+ in backward"):
        scorer(registry.load("my_reward:NoWayBack"), gradients=True).score(clean())
    with pytest.raises(registry.UnknownReward, match=rf"cannot be made: TypeError: .*\(at {own}:\d+ in __init__"):
        registry.load("my_reward:Scaled", by={})
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    assert score.main(["--reward", "my_reward:table", str(tmp_path / "picture.png")]) == 2
    assert f"picture.png: KeyError: '' (at {own}:{line} in table" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("def f(images, prompts)\n    pass\n", r"SyntaxError: expected ':' .*\(at FILE:1: def f\(images, prompts\)\)"),
        ("x = 1\nx['a']\n", r"TypeError: .*\(at FILE:2 in <module>: x\['a'\]\)"),
        ("import sys\nsys.exit(0)\n", r"SystemExit: 0 \(at FILE:2 in <module>: sys\.exit\(0\)\)"),
        ("import torch\ntorch.set_default_dtype(torch.float64)\nf = print\n", None),
    ],
)
def test_whatever_a_module_does_when_it_is_imported(code, said, tmp_path, monkeypatch):
    file = tmp_path / "own_at_import.py"
    file.write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_at_import", raising=False)
    if said:
        with pytest.raises(registry.UnknownReward, match=rf"cannot import .*: {said.replace('FILE', str(file))}"):
            registry.check("own_at_import:f", None, {}, [])
    else:
        registry.check("own_at_import:f", None, {}, [])
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("kind", ["exit", "generator", "mute", "long"])
def test_whatever_a_reward_raises_is_its_own_failure_with_the_lines_of_all_its_authors_files(kind, own):
    with pytest.raises(BadReward, match=r"my_helper\.py:2 in passed_on: raise error\) \(reward\.on_bad") as caught:
        scorer(registry.load("my_reward:Raises", kind=kind)).score(clean())
    assert f"{own}:" in str(caught.value) and len(str(caught.value)) < 3000


@pytest.mark.parametrize("what", ["pair", "nothing", "meta"])
def test_what_is_no_scores_is_said_to_be_none(what, own):
    with pytest.raises(BadReward, match=r"it returned a (tuple|NoneType|Tensor), expected a tensor of 5 scores"):
        scorer(registry.load("my_reward:Returns", what=what)).score(clean())


def test_a_rewards_global_settings_of_torch_end_with_it(own):
    read = (
        torch.get_num_threads, torch.get_default_dtype, torch.get_default_device, torch.is_grad_enabled,
        torch.are_deterministic_algorithms_enabled, torch.get_float32_matmul_precision,
    )  # fmt: skip
    before = [get() for get in read]
    scorer(registry.load("my_reward:careless")).score(clean())
    assert [get() for get in read] == before
