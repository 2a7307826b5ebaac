"""The two ends together: `reward.name=remote` asks `python -m rewards.serve`."""

import re

import pytest
import served
import torch
from remote_calls import PROMPTS, TOKEN, images

from rewards import registry, tokens
from rewards.contract import call
from rewards.remote import JudgeRefused, Remote
from rewards.trial import try_reward

OWN = """
class Bonus:
    columns = ("bonus",)

    def __call__(self, images, prompts, metadata):
        if "a wish" in prompts:
            raise RuntimeError("no wishes here")
        scores = images.mean((1, 2, 3)) + images.new_tensor([row["bonus"] for row in metadata])
        scores[[prompt == "" for prompt in prompts]] = float("nan")
        return scores
"""


@pytest.fixture
def serve(tmp_path):
    """serve(name): the URL of a server with a token, which ends with the test."""
    servers = []

    def start(name: str) -> str:
        (tmp_path / "token").write_text(TOKEN)
        server = served.command(name, "--port", "0", "--token-file", tmp_path / "token", cwd=tmp_path)
        servers.append(server)
        return re.search(r"http://127\.0\.0\.1:\d+", served.until(server, "http://"))[0]

    yield start
    for server in servers:
        server.kill()
        server.wait(30)


@pytest.mark.long
@pytest.mark.parametrize("form", ["png", "raw"])
def test_scores_are_those_in_process_and_faults_come_home(form, serve, tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.setenv(tokens.VARIABLE, TOKEN)
    reward = Remote(urls=serve("own:Bonus"), format=form, batch=2, columns=["bonus"])
    rows = [{"bonus": 0.5 * i} for i in range(5)]
    pixels = images().mul(255).round().div(255)
    want = pixels.mean((1, 2, 3)) + torch.tensor([row["bonus"] for row in rows])
    found = call(reward, images(), PROMPTS, rows)
    assert found[2].isnan() and torch.allclose(found[[0, 1, 3, 4]], want[[0, 1, 3, 4]], atol=1e-6)
    with pytest.raises(ValueError, match=r"refuses: 422 .*no wishes here"):
        call(reward, images(1), ["a wish"], rows[:1])
    with pytest.raises(registry.BadReward, match="needs a column 'bonus', which 2 of 2 prompts do not have"):
        try_reward(reward, PROMPTS[:2], [{}, {}], 8, "cpu")
    monkeypatch.setenv(tokens.VARIABLE, "another")
    with pytest.raises(JudgeRefused, match=r"401 .*; the token of the variable TRIBUTARY_REWARD_TOKEN is not its own"):
        Remote(urls=reward.options.urls).check_health()


@pytest.mark.long
def test_one_of_our_own_gives_the_same_bits(serve, monkeypatch):
    monkeypatch.setenv(tokens.VARIABLE, TOKEN)
    reward = Remote(urls=serve("jpeg_compressibility"), batch=2)
    assert reward(images(), PROMPTS).tolist() == registry.load("jpeg_compressibility")(images(), PROMPTS).tolist()
    reward.check_health()  # the first call has waited until it was loaded
