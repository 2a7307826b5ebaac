"""`python -m learner verify` on tiny models."""

from unittest.mock import Mock

import pytest
import torch
from tiny_models import WRITE

from commands import verify
from rewards import registry
from rewards.weights import BadWeights


@pytest.fixture(params=sorted(WRITE))
def reward(request, tmp_path):
    return registry.load(**WRITE[request.param](tmp_path))


def test_verify_tells_a_sound_reward_from_a_broken_one(reward, capsys):
    assert verify.report(reward.name, lambda: reward) == 0
    assert capsys.readouterr().out.startswith(f"{reward.name}: ok (scores of three test pictures: ")
    whole = type(reward).__call__
    broken = {
        "score differently a second time": lambda *given: whole(*given) + torch.rand(()),
        "alone scores": lambda self, images, prompts: whole(self, images, prompts) + len(images),
        "different pictures score alike": lambda self, images, prompts: 0 * whole(self, images, prompts),
        "not raise the score": lambda self, images, prompts: whole(self, 2 * images.detach() - images, prompts),
        "zero or not finite": lambda self, images, prompts: whole(self, images.detach(), prompts) + 0 * images.sum(),
        "scores [nan": lambda *given: whole(*given) * float("nan"),
    }
    for said, call in broken.items():
        wrong = object.__new__(type("Wrong", (type(reward),), {"__call__": call}))
        wrong.__dict__.update(reward.__dict__)
        assert verify.report(reward.name, lambda wrong=wrong: wrong) == 1, said
        assert said in capsys.readouterr().out
    with torch.no_grad():
        next(reward.network.parameters()).view(-1)[0] = float("inf")
    assert verify.report(reward.name, lambda: reward) == 1
    assert "weights that are not finite" in capsys.readouterr().out


def test_verify_says_what_is_wrong_with_weights_and_how_to_get_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert verify.main([]) == 2
    files = {
        "aesthetic": "aesthetic-model.pth",
        "clip_score": "config.json, model.safetensors, vocab.json, merges.txt",
        "hpsv2": "HPS_v2.1_compressed.pt",
        "imagereward": "ImageReward.pt",
        "pickscore": "model.safetensors",
    }
    wanted = [f"{name}: not verified: reward.weights: {file}" for name, file in files.items()]
    assert [line.split(" of https")[0] for line in capsys.readouterr().err.splitlines()] == wanted
    assert verify.main(["beauty"]) == 2
    assert "beauty, expected aesthetic, clip_score, hpsv2, imagereward, pickscore" in capsys.readouterr().err

    assert verify.report("hpsv2", Mock(side_effect=BadWeights("1 missing: logit_scale"))) == 1
    assert "hpsv2: FAILED: 1 missing: logit_scale" in capsys.readouterr().out
