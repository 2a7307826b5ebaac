"""Sums of rewards: the weights, the raw parts, and what is refused."""

import pytest
import torch
from tiny_models import write_aesthetic, write_hpsv2

from rewards import registry
from rewards.weights import WeightsNotFound

IMAGES = torch.rand(2, 3, 40, 30, generator=torch.Generator().manual_seed(0))
PROMPTS = ["the cat", "a red bird"]
SHAPES = {"name": "shapes_alignment_soft", "weight": 2}
JPEG = {"name": "jpeg_incompressibility", "weight": -0.5}
ACTS = (
    lambda terms: registry.load("weighted_sum", terms=terms),
    lambda terms: registry.check("weighted_sum", None, {"terms": terms}, []),
)


def test_the_sum_of_weights_times_raw_parts_and_its_gradient(tmp_path):
    tiny_terms = []
    for write, weight in ((write_aesthetic, 0.25), (write_hpsv2, -3)):
        settings = write(tmp_path)
        name, weights = settings.pop("name"), settings.pop("weights")
        tiny_terms.append({"name": name, "weight": weight, "weights": weights, "options": settings})
    reward = registry.load("weighted_sum", terms=tiny_terms)
    assert reward.name == "weighted_sum" and reward.differentiable
    images = IMAGES.clone().requires_grad_()
    parts, total = reward.parts(images, PROMPTS), reward(images, PROMPTS)
    assert list(parts) == ["aesthetic", "hpsv2"] and all(part.shape == (2,) for part in parts.values())
    torch.testing.assert_close(total, 0.25 * parts["aesthetic"] - 3 * parts["hpsv2"])
    for term in tiny_terms:
        alone = registry.load(term["name"], term["weights"], **term["options"])
        assert torch.equal(parts[term["name"]], alone(images, PROMPTS))
    gradient = torch.autograd.grad(total.sum(), images, retain_graph=True)[0]
    pieces = [torch.autograd.grad(parts[name].sum(), images)[0] for name in parts]
    torch.testing.assert_close(gradient, 0.25 * pieces[0] - 3 * pieces[1])


def test_equal_names_are_told_apart_and_a_sum_is_differentiable_when_every_term_is():
    reward = registry.load("weighted_sum", terms=[JPEG, {**JPEG, "weight": 1}, JPEG])
    parts = reward.parts(IMAGES, PROMPTS)
    assert list(parts) == ["jpeg_incompressibility", "jpeg_incompressibility_2", "jpeg_incompressibility_3"]
    torch.testing.assert_close(reward(IMAGES, PROMPTS), 0 * parts["jpeg_incompressibility"])

    assert registry.load("weighted_sum", terms=[SHAPES]).differentiable
    assert not registry.load("weighted_sum", terms=[SHAPES, JPEG]).differentiable
    registry.check("weighted_sum", None, {"terms": [SHAPES]}, ["a red circle"], "nabla_db")
    registry.check("weighted_sum", None, {"terms": [SHAPES, JPEG]}, ["a red circle"])
    with pytest.raises(ValueError, match="a cat"):  # a prompt that a term refuses
        registry.check("weighted_sum", None, {"terms": [JPEG, SHAPES]}, ["a cat"])
    said = r"terms\[1\] \(jpeg_incompressibility\): objective.kind: .* not differentiable"
    with pytest.raises(ValueError, match=said):
        registry.check("weighted_sum", None, {"terms": [SHAPES, JPEG]}, ["a red circle"], "nabla_db")


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize(
    ("terms", "message"),
    [
        (None, "terms: expected a list"), ([], "terms: expected a list"), ("hpsv2", "terms: expected a list"),
        (["hpsv2"], r"terms\[0\]: Input should be a valid dictionary .*a term has name, weight, weights, options"),
        ([JPEG, {"weight": 1}], r"terms\[1\]\.name: Field required"),
        ([{**JPEG, "colour": 1}], r"terms\[0\]\.colour: Extra inputs are not permitted, got 1; a term has name"),
        ([{"name": "hpsv2"}], r"terms\[0\]\.weight: Field required"),
        ([{**JPEG, "weight": float("nan")}], r"weight: Input should be a finite number, got nan"),
        ([{**JPEG, "weight": True}], r"weight: Input should be a valid number, got True"),
        ([{**JPEG, "options": [1]}], r"options: Input should be a valid dictionary, got \[1\]"),
        ([{**JPEG, "options": {"name": 1}}], r"terms\[0\]\.options: .*'name' cannot be one"),
        ([{**JPEG, "options": {"colour": 1}}], r"terms\[0\] \(jpeg_incompressibility\): reward\.options: .*colour"),
        ([{**JPEG, "weights": 3}], r"terms\[0\]\.weights: Input should be a valid string, got 3"),
        ([{**JPEG, "weights": "x"}], r"terms\[0\] \(jpeg_incompressibility\): reward\.weights: .* takes none"),
        ([{"name": "weighted_sum", "weight": 1}], "a sum of sums"),
    ],
)  # fmt: skip
def test_bad_terms_are_refused(terms, message, act):
    with pytest.raises(ValueError, match=message):
        act(terms)


def test_failures_of_a_term_keep_their_kind():
    for term, kind, said in (
        ({"name": "beauty", "weight": 1}, registry.UnknownReward, r"terms\[0\] \(beauty\): .*unknown reward 'beauty'"),
        ({"name": "hpsv2", "weight": 1, "weights": "gone.pt"}, WeightsNotFound, r"terms\[0\] \(hpsv2\): .* gone\.pt"),
    ):
        for act in ACTS:
            with pytest.raises(kind, match=said):
                act([term])
    with pytest.raises(ValueError, match=r"reward\.options: weighted_sum: .*'colour'"):
        registry.check("weighted_sum", None, {"terms": [JPEG], "colour": 1}, [])
    with pytest.raises(ValueError, match="weights"):
        registry.check("weighted_sum", "x", {"terms": [JPEG]}, [])


def test_scores_are_raw_however_the_learner_is_to_standardise_them():
    terms, prompts = [SHAPES, JPEG], ["a red circle", "a blue ring"]
    plain = registry.load("weighted_sum", terms=terms)(IMAGES, prompts)
    for how in ("none", "prompt", "epoch"):
        assert torch.equal(registry.load("weighted_sum", terms=terms, normalise=how)(IMAGES, prompts), plain)
    for act in (registry.load, lambda name, **options: registry.check(name, None, options, [])):
        for how in ("Prompt", None, ["prompt"]):
            with pytest.raises(ValueError, match=r"reward\.options\.normalise: expected none, prompt, epoch, got"):
                act("weighted_sum", terms=[JPEG], normalise=how)
