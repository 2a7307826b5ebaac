"""A reward behind HTTP before its first call: options, token, health of its judges."""

import pytest
import requests
from judge import HEALTH
from remote_calls import TOKEN, expected, hang, scored

from diffusion.failures import ServiceFailed
from rewards import registry, remote, tokens
from rewards.remote import JudgeRefused, Remote

pytestmark = pytest.mark.usefixtures("quick")


def test_a_token_comes_from_the_variable_or_the_file(judge, monkeypatch, tmp_path):
    judge.token = TOKEN
    monkeypatch.setenv(tokens.VARIABLE, TOKEN)
    assert scored(judge) == expected()
    monkeypatch.setenv("JUDGES", TOKEN)
    monkeypatch.setenv(tokens.VARIABLE, "another")
    assert scored(judge, token_env="JUDGES") == expected()
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    assert scored(judge, token_file=str(tmp_path / "token")) == expected()
    with pytest.raises(JudgeRefused, match="the token of the variable TRIBUTARY_REWARD_TOKEN is not its own"):
        scored(judge)


def test_no_message_has_the_token_not_even_if_the_judge_says_it(once, judge, monkeypatch):
    monkeypatch.setenv(tokens.VARIABLE, TOKEN)
    for status in (400, 403, 500, 200):
        judge.always = lambda handler, body, status=status: handler.send(
            status, {"error": f"got {handler.headers['Authorization']}"}
        )
        with pytest.raises((ValueError, ServiceFailed)) as raised:
            scored(judge)
        assert TOKEN not in str(raised.value) and "[token]" in str(raised.value)
    assert TOKEN not in repr(tokens.carried({"urls": judge.url})) and TOKEN not in str(
        vars(Remote(urls=judge.url)).get("options")
    )


@pytest.mark.parametrize("text", ["", "two words", "a\nline", "\u00fcmlaut", "x\r\nX-Other: 1"])
def test_what_can_be_no_token_is_refused_without_being_said(text, monkeypatch, tmp_path):
    monkeypatch.setenv(tokens.VARIABLE, text)
    (tmp_path / "token").write_text(f"{text} {text}")
    for where, options in (("token_env: the variable", {}), ("token_file: ", {"token_file": str(tmp_path / "token")})):
        with pytest.raises(
            ValueError, match=rf"reward\.options\.{where}.* holds no token: expected printable"
        ) as raised:
            Remote(urls="http://judge", **options)
        assert not text or text not in str(raised.value)
    with pytest.raises(ValueError, match=r"token_file: .*/none cannot be read here: No such file"):
        Remote(urls="http://judge", token_file=str(tmp_path / "none"))


def test_tokens_go_to_actors_by_the_variables_that_options_terms_and_held_out_rewards_name(monkeypatch):
    for name in (tokens.VARIABLE, "ONE", "TWO", "THREE"):
        monkeypatch.setenv(name, f"token-of-{name}")
    term = {"name": "remote", "weight": 1.0, "options": {"urls": ["http://a"], "token_env": "ONE"}}
    held_out = ["hpsv2", {"name": "remote", "options": {"urls": "http://b"}}]
    found = tokens.carried({"terms": [{"name": "hpsv2", "weight": 1.0}, term]}, held_out)
    assert set(found) == {"ONE", tokens.VARIABLE}
    monkeypatch.delenv("ONE")
    tokens.put(found)
    assert tokens.read("ONE", None) == "token-of-ONE"
    assert (
        tokens.carried({"colours": {"red": 1}}, ()) == {} == tokens.carried({"urls": "http://a", "token_env": "NONE"})
    )


WRONG = {
    "urls": ({}, "remote needs the URL of a judge"),
    "urls ": ({"urls": []}, "at least 1"),
    "urls.0": ({"urls": "ftp://judge"}, "expected a URL like http://host:8000, got 'ftp://judge'"),
    "urls.1": ({"urls": ["http://judge", "judge:8000"]}, "expected a URL like"),
    "urls.0 ": ({"urls": "http://judge/?key=1"}, "expected a URL like"),
    "urls.0  ": ({"urls": "http://judge:99999"}, "out of range"),
    "urls.0   ": ({"urls": "http://me:hidden@judge"}, "a URL with a user name or password; give a token by token_env"),
    "batch": ({"urls": "http://judge", "batch": 0}, "greater than or equal to 1, got 0"),
    "batch ": ({"urls": "http://judge", "batch": "4"}, "valid integer, got '4'"),
    "in_flight": ({"urls": "http://judge", "in_flight": 1000}, "less than or equal to 256"),
    "format": ({"urls": "http://judge", "format": "jpeg"}, "'png' or 'raw', got 'jpeg'"),
    "seconds": ({"urls": "http://judge", "seconds": 0}, "greater than 0"),
    "request_seconds": ({"urls": "http://judge", "request_seconds": float("inf")}, "finite"),
    "token_env": ({"urls": "http://judge", "token_env": "a b"}, "match pattern"),
    "token": ({"urls": "http://judge", "token": "hidden"}, "no such option; it has urls, batch, in_flight"),
    "range": ({"urls": "http://judge", "range": [1, 0]}, "low below high"),
    "range ": ({"urls": "http://judge", "range": [1]}, "at least 2"),
    "inner_states": ({"urls": "http://judge", "inner_states": "yes"}, "valid boolean"),
}


@pytest.mark.parametrize("place", WRONG)
def test_a_wrong_option_is_one_line_that_names_it(place):
    options, said = WRONG[place]
    with pytest.raises(ValueError, match=said) as raised:
        registry.check("remote", None, options, ["a dog"])
    assert str(raised.value).startswith(f"reward.options.{place.strip()}: ")
    assert "\n" not in str(raised.value) and "hidden" not in str(raised.value)


def test_a_remote_reward_is_for_images_alone_unless_it_is_said():
    assert Remote(urls="http://judge").image_only and not Remote(urls="http://judge", inner_states=True).image_only
    with pytest.raises(ValueError, match="remote is not differentiable"):
        registry.check("remote", None, {"urls": "http://127.0.0.1:1"}, ["a dog"], "nabla_db")


def test_before_a_run_every_judge_is_asked_whether_it_can_score(judge, other, monkeypatch):
    def check(*urls):
        Remote(urls=[*urls]).check_health()

    check(judge.url, other.url)
    assert [path for path, _, _ in judge.seen + other.seen] == ["/health"] * 2
    judge.token = TOKEN
    monkeypatch.setenv(tokens.VARIABLE, "another")
    with pytest.raises(JudgeRefused, match="the token of the variable TRIBUTARY_REWARD_TOKEN is not its own") as raised:
        check(judge.url, other.url)
    assert other.url not in str(raised.value) and "another" not in str(raised.value)
    other.close()
    with pytest.raises(JudgeRefused, match=r"does not answer \(ConnectionRefusedError: .*\); start the judge there"):
        check(other.url)
    with pytest.raises(JudgeRefused, match=f"{judge.url}/health: 401 .*; .*{other.url} does not answer"):
        check(judge.url, other.url)
    for act, said in (
        ((404, b""), "health: 404 Not Found; .*names the URL below which"),
        ((503, {"error": "loading"}), r"is not ready \(503 Service Unavailable: loading\); wait until GET"),
        ((302, b"", {"Location": "http://elsewhere"}), "redirects are not followed"),
        ((200, b"hello"), "answers without a protocol: hello"),
        ((200, HEALTH | {"protocol": 2}), "speaks protocol 2, not 1"),
    ):
        judge.token, judge.always = None, act
        with pytest.raises(JudgeRefused, match=said) as raised:
            check(judge.url)
        assert "\n" not in str(raised.value)
    judge.always = hang
    monkeypatch.setattr(remote, "HEALTH_SECONDS", 0.3)
    with pytest.raises(JudgeRefused, match=r"does not answer \(no whole answer within 0\.3 s"):
        check(judge.url)


def test_an_unknown_host_is_told_from_a_silent_one(monkeypatch):
    def nowhere(*_, **__):
        raise requests.ConnectionError("wrapped") from OSError("Name or service not known")

    monkeypatch.setattr(requests.Session, "request", nowhere)
    with pytest.raises(JudgeRefused, match=r"http://judge does not answer \(OSError: Name or service not known\)"):
        Remote(urls="http://judge").check_health()
