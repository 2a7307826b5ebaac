"""A reward behind HTTP, against a judge on another port that does what the test says."""

import email.utils
import threading
import time

import pytest
import tenacity
import torch
from judge import in_process, pictures, shade
from remote_calls import PROMPTS, TOKEN, expected, hang, images, scored

from diffusion.failures import DeadlineExceeded, RunFailure, ServiceFailed
from rewards import registry, remote, tokens
from rewards.contract import call
from rewards.own_code import named_failure
from rewards.remote import JudgeRefused, JudgeSilent, Remote
from rewards.trial import try_reward
from rewards.weighted_sum import WeightedSum

pytestmark = pytest.mark.usefixtures("quick")


@pytest.mark.parametrize("form", ["png", "raw"])
@pytest.mark.parametrize("batch", [1, 2, 5, 9])
def test_every_picture_arrives_as_it_is_with_its_prompt_and_metadata(form, batch, judge):
    rows = [{"bonus": i, "words": [{"deep": None}]} for i in range(5)]
    reward = Remote(urls=judge.url + "/", format=form, batch=batch)
    found = reward(images(), PROMPTS, metadata=rows)
    want = [score + i for i, score in enumerate(in_process(images(), PROMPTS))]
    assert found.dtype == torch.float32 and found.tolist() == torch.tensor(want, dtype=torch.float32).tolist()
    exact = {prompt: (pixels, row) for prompt, pixels, row in zip(PROMPTS, images(), rows, strict=True)}
    assert sum(len(body["prompts"]) for _, _, body in judge.seen) == 5 and len(judge.seen) == -(-5 // batch)
    for path, headers, body in judge.seen:
        assert path == "/score" and headers["Content-Type"] == "application/json" and "Authorization" not in headers
        for pixels, prompt, row in zip(pictures(body), body["prompts"], body["metadata"], strict=True):
            assert (torch.from_numpy(pixels.copy()) == exact[prompt][0].mul(255).round().permute(1, 2, 0)).all()
            assert row == exact[prompt][1]
    assert shade(pixels, prompt, row) != 0


def test_without_metadata_none_is_sent_and_null_is_a_bad_trajectory(judge):
    judge.plan.append((200, {"scores": [1, None, 2.5], "more": "is let be"}))
    found = Remote(urls=judge.url)(images(3), PROMPTS[:3], metadata=[{}, {}, {}])
    assert found[[0, 2]].tolist() == [1, 2.5] and found[1].isnan() and "metadata" not in judge.seen[0][2]
    with pytest.raises(ValueError, match="as many prompts and metadata as the 2 images"):
        Remote(urls=judge.url)(images(2), PROMPTS)


def test_columns_that_are_named_are_needed_and_no_others_travel(judge):
    reward = Remote(urls=judge.url, columns=["bonus"])
    rows = [{"bonus": 1, "secret": "hidden"}, {"bonus": 2}]
    call(reward, images(2), PROMPTS[:2], rows)
    assert judge.seen[0][2]["metadata"] == [{"bonus": 1}, {"bonus": 2}] and reward.columns == ("bonus",)
    with pytest.raises(registry.BadReward, match="reward remote needs a column 'bonus', which 1 of 2 prompts do not"):
        try_reward(reward, PROMPTS[:2], [rows[0], {"other": 1}], 8, "cpu")
    Remote(urls=judge.url)(images(2), PROMPTS[:2], metadata=rows)
    assert judge.seen[-1][2]["metadata"] == rows


def test_it_is_tried_before_a_run_and_its_judge_asked_first(judge):
    term = {"name": "remote", "weight": 1.0, "options": {"urls": judge.url}}
    for reward in (Remote(urls=judge.url), WeightedSum([{"name": "jpeg_compressibility", "weight": 1.0}, term])):
        judge.seen.clear()
        try_reward(reward, PROMPTS[:2], [], 8, "cpu")
        assert [path for path, _, _ in judge.seen] == ["/health", "/score"]
        judge.plan.append((503, {"error": "loading"}))
        with pytest.raises(JudgeRefused, match="is not ready"):
            try_reward(reward, PROMPTS[:2], [], 8, "cpu")


def reset(handler, body):
    handler.reset()


def cut(handler, body):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"scores"')
    handler.close_connection = True


PASSING = {
    "500": (500, b"boom"),
    "502, a page": (502, b"<html>Bad Gateway</html>"),
    "503": (503, {"error": "starting"}),
    "429": (429, {"error": "queue is full"}),
    "reset": reset,
    "cut short": cut,
    "no JSON": (200, b"<html>it works</html>"),
    "empty": (200, b""),
    "no scores": (200, {"score": [1.0]}),
    "a list": (200, [1.0]),
    "one number": (200, {"scores": 1.0}),
    "too many": (200, {"scores": [1.0, 2.0]}),
    "too few": (200, {"scores": []}),
    "a word": (200, {"scores": ["1.0"]}),
    "a truth": (200, {"scores": [True]}),
    "NaN": (200, b'{"scores": [NaN]}'),
    "Infinity": (200, b'{"scores": [-Infinity]}'),
    "more than float32": (200, {"scores": [1e39]}),
    "a huge number": (200, b'{"scores": [' + b"9" * 4000 + b"]}"),
    "deep": (200, b"[" * 100_000),
    "huge": (200, {"scores": [1.0], "more": "a" * remote.MOST_BYTES}),
}


@pytest.mark.parametrize("act", PASSING.values(), ids=PASSING)
def test_what_may_pass_is_tried_again_as_the_same_request(act, judge):
    judge.plan += [act, act]
    assert scored(judge) == expected()
    first, second, third = ({**headers, "body": body} for _, headers, body in judge.seen)
    assert first == second == third and len(first["X-Request-Id"]) == 32


def test_out_of_its_range_a_score_is_garbage(judge):
    judge.plan += [(200, {"scores": [1.01]}), (200, {"scores": [-0.01]}), (200, {"scores": [1]})]
    assert scored(judge, range=[0, 1]) == [1.0] and len(judge.seen) == 3
    assert Remote(urls=judge.url, range=[0, 1]).range == (0, 1)


@pytest.mark.parametrize(
    ("status", "kind", "said"),
    [
        (400, ValueError, "refuses: 400 Bad Request: why not"),
        (422, ValueError, "refuses: 422 Unprocessable .*: why not"),
        (401, JudgeRefused, "401 Unauthorized: why not; no token was sent: the variable TRIBUTARY_REWARD_TOKEN is not"),
        (403, JudgeRefused, "no token was sent"),
        (404, JudgeRefused, "names the URL below which /score and /health are"),
        (405, JudgeRefused, "405 Method Not Allowed"),
        (408, JudgeRefused, "408 Request Timeout"),
        (413, JudgeRefused, r"set a smaller reward\.options\.batch"),
        (204, JudgeRefused, "204 No Content"),
    ],
)
def test_what_cannot_pass_is_asked_once(status, kind, said, judge):
    judge.always = (status, {"error": "why\nnot"} if status != 204 else b"")
    with pytest.raises(kind, match=said) as raised:
        scored(judge)
    assert len(judge.seen) == 1 and "\n" not in str(raised.value)
    assert isinstance(raised.value, RunFailure) == (kind is JudgeRefused)


def test_one_request_that_is_refused_ends_the_call(judge):
    """Those that wait are not sent any more."""

    free = threading.Event()

    def hold(handler, body):
        if body["prompts"] == ["a red circle"]:
            return handler.send(422, {"error": "no circles"})
        free.wait(30)
        handler.send(503)

    judge.always = hold
    with pytest.raises(ValueError, match="no circles"):
        Remote(urls=judge.url, batch=1, in_flight=2)(images(), PROMPTS)
    assert len(judge.seen) <= 3  # the other one in flight, and what takes the free place before the call has ended
    free.set()


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed_lest_the_token_travel(status, judge, other, monkeypatch):
    monkeypatch.setenv(tokens.VARIABLE, TOKEN)
    judge.always = (status, b"", {"Location": f"{other.url}/score"})
    with pytest.raises(JudgeRefused, match="redirects are not followed"):
        scored(judge)
    assert len(judge.seen) == 1 and other.seen == []


def test_neither_a_proxy_nor_netrc_of_the_environment_is_used(judge, other, monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password mine\n")
    for name, value in {"HTTP_PROXY": other.url, "http_proxy": other.url, "NETRC": str(tmp_path / "netrc")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(tokens.VARIABLE, TOKEN)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    assert scored(judge) == expected() and other.seen == []
    assert judge.seen[0][1]["Authorization"] == f"Bearer {TOKEN}"


@pytest.mark.parametrize("date", [False, True])
def test_a_judge_that_asks_for_time_is_given_it(date, judge, monkeypatch):
    """What the pause would be is looked at; nobody waits."""
    paused = []
    monkeypatch.setattr(tenacity, "sleep_using_event", lambda event: paused.append)
    wish = email.utils.formatdate(time.time() + 7.5, usegmt=True) if date else "7"
    judge.plan += [(503, b"", {"Retry_After": wish}), (429, b"", {"Retry_After": "soon"}), (429, b"", {})]
    assert scored(judge) == expected()
    assert 5 < paused[0] <= 7.5 and all(pause <= remote.MOST_PAUSE for pause in paused[1:]) and len(paused) == 3


def test_a_judge_that_asks_for_more_time_than_there_is_ends_the_call_at_once(judge):
    judge.always = (503, {"error": "loading"}, {"Retry_After": "3600"})
    with pytest.raises(JudgeSilent, match=r"1 tries; the last: .*503 .*: loading \(asks to wait 3600 s\)"):
        scored(judge)


def test_pauses_grow_and_are_drawn(judge, monkeypatch):
    highest = []
    monkeypatch.setattr(remote, "MOST_PAUSE", 0.016)
    monkeypatch.setattr(tenacity.wait.random, "uniform", lambda low, high: highest.append(high) or 0.0)
    judge.plan += [(503, b"")] * 6
    assert scored(judge) == expected() and highest == [0.001, 0.002, 0.004, 0.008, 0.016, 0.016]


def trickle(handler, body):
    """Never silent for long, and right in the end."""
    handler.send_response(200)
    handler.send_header("Content-Length", "114")
    handler.end_headers()
    for _ in range(100):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)
    handler.wfile.write(b'{"scores":[9]}')


@pytest.mark.parametrize("act", [hang, trickle])
def test_a_try_that_takes_too_long_is_given_up_for_another(act, judge):
    judge.plan.append(act)
    assert scored(judge, request_seconds=0.3) == expected() and len(judge.seen) >= 2


@pytest.mark.parametrize("act", [hang, trickle, (503, {"error": "starting"}), reset])
def test_no_scores_by_the_deadline_is_one_line_that_names_judge_cause_and_remedy(act, judge):
    judge.always = act
    with pytest.raises(DeadlineExceeded) as raised:
        scored(judge, 3, seconds=0.5, batch=2)
    said = str(raised.value)
    assert said.startswith(f"reward remote: no scores from {judge.url} for ") and "\n" not in said
    assert "within reward.options.seconds=0.5 s" in said and "; the last: " in said
    assert f"GET {judge.url}/health" in said and "or raise reward.options.seconds" in said
    assert isinstance(raised.value, JudgeSilent)


def test_requests_in_flight_are_bounded_whoever_calls(judge):
    three = threading.Barrier(3)

    def together(handler, body):
        three.wait(30)
        handler.send(200, {"scores": [0.0]})

    judge.always, reward = together, Remote(urls=judge.url, batch=1, in_flight=3)
    callers = [threading.Thread(target=reward, args=(images(), PROMPTS)) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(30)
    assert judge.most_at_work == 3 and len(judge.seen) == 15


def test_requests_spread_over_judges_and_go_to_another_where_one_fails(judge, other):
    reward = Remote(urls=[judge.url, other.url], batch=1, in_flight=1)
    assert reward(images(), PROMPTS).tolist() == expected(5) and {len(judge.seen), len(other.seen)} == {2, 3}
    assert len({headers["X-Request-Id"] for _, headers, _ in judge.seen + other.seen}) == 5
    judge.close()
    before = len(other.seen)
    assert reward(images(), PROMPTS).tolist() == expected(5) and len(other.seen) == before + 5


def test_while_another_judge_is_left_there_is_no_pause(judge, other, monkeypatch):
    paused = []
    monkeypatch.setattr(tenacity, "sleep_using_event", lambda event: paused.append)
    judge.plan += [(503, b"", {"Retry_After": "9"})] * 2
    other.plan += [(503, b"", {"Retry_After": "5"}), reset]
    assert Remote(urls=[judge.url, other.url])(images(1), PROMPTS[:1]).tolist() == expected()
    assert paused[0] == 0 and paused[1] == 5 and paused[2] == 0 and paused[3] <= remote.MOST_PAUSE


def test_a_judge_at_fault_is_no_fault_of_the_picture(once, judge):
    """It ends the run as itself; what the judge refuses is the picture's, which quarantine sets aside."""
    for act, kind in (((401, b""), JudgeRefused), ((500, b""), JudgeSilent)):
        judge.always = act
        with pytest.raises(kind) as raised, named_failure(registry.BadReward, "reward remote failed"):
            scored(judge)
        assert isinstance(raised.value, ServiceFailed)
    judge.always = (422, {"error": "all black"})
    with (
        pytest.raises(registry.BadReward, match=r"reward remote failed: ValueError: .*422 .*: all black"),
        named_failure(registry.BadReward, "reward remote failed"),
    ):
        scored(judge)
