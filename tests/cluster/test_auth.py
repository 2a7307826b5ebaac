"""A cluster without a lock, and a token that others can read, are said loudly, once, with the remedy."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import auth
from cluster.session import nodes_at_hand
from learner.run import main


@pytest.fixture
def at(head, monkeypatch):
    """Our environment is that of someone who knows the head's token."""
    monkeypatch.setenv("RAY_ADDRESS", head.address)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", head.environment["RAY_AUTH_TOKEN_PATH"])
    return head


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.parametrize("head", ["disabled"], indirect=True)
def test_a_cluster_that_takes_any_token_is_found_open(at):
    said = auth.takes_any_token(at.address)
    assert f"the Ray cluster at {at.address} takes any token" in said and "RAY_AUTH_MODE=token" in said


@pytest.mark.ray
@pytest.mark.long
def test_a_locked_one_is_not(at):
    auth.require_answer(at.address)
    assert auth.takes_any_token(at.address) is None


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("head", ["disabled"], indirect=True)
def test_a_plan_says_it_in_one_line(at, small_settings, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "learner.run", *small_settings, f"run.dir={tmp_path / 'run'}", "--plan"],
        env=os.environ, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("learner.run:")]
    assert said.startswith("learner.run: warning: the Ray cluster at") and "takes any token" in said


def test_no_cluster_is_no_open_one(monkeypatch):
    monkeypatch.setattr(auth, "CONNECT_SECONDS", 0.5)
    assert auth.takes_any_token("127.0.0.1:1") is None and auth.takes_any_token("ray://127.0.0.1:1") is None


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A user without a token."""
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    return tmp_path


def mode(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_token_of_our_own_is_for_our_eyes_only(home):
    before = os.umask(0)
    try:
        auth.ensure_token()
    finally:
        os.umask(before)
    file = home / ".ray/auth_token"
    assert mode(file) == 0o600 and mode(file.parent) == 0o700 and len(file.read_text()) == 64
    token = file.read_text()
    auth.ensure_token()
    assert file.read_text() == token and auth.faults_here() == []


@pytest.mark.parametrize("given", [False, True])
def test_a_token_file_that_others_can_read_is_said_at_start(home, given, small_settings, monkeypatch, capsys):
    file = home / ("elsewhere" if given else ".ray/auth_token")
    file.parent.mkdir(exist_ok=True)
    file.write_text("c0ffee" * 10 + "abcd")
    file.chmod(0o640)
    if given:
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    warning = f"learner.run: warning: {file}: others can read the token in it; chmod 600 {file}"
    assert main([*small_settings, "--plan"]) == 0
    assert warning in capsys.readouterr().err.splitlines()
    file.chmod(0o600)
    assert main([*small_settings, "--plan"]) == 0
    assert "token" not in capsys.readouterr().err


def test_authentication_switched_off_is_said_and_no_token_made(home, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    said = []
    nodes_at_hand(1, said.append)
    assert len(said) == 1 and "RAY_AUTH_MODE=disabled" in said[0] and "unset it" in said[0]
    nodes_at_hand(1, said.append, local=True)  # no Ray, no token
    auth.ensure_token()
    assert len(said) == 1 and not (home / ".ray").exists()


def test_a_token_is_never_seen_half_written(home, monkeypatch):
    """By another run that starts at the same time: it is there whole, or not at all."""
    file, seen, real = home / ".ray/auth_token", [], os.link

    def link(aside, target):
        seen.append((file.exists(), len(Path(aside).read_text()), mode(Path(aside))))
        real(aside, target)

    monkeypatch.setattr(auth.os, "link", link)
    auth.ensure_token()
    assert seen == [(False, 64, 0o600)] and [path.name for path in file.parent.iterdir()] == ["auth_token"]


def test_of_two_tokens_made_at_once_the_first_is_kept(home, monkeypatch):
    file, real = home / ".ray/auth_token", os.link

    def link(aside, target):
        file.write_text("of another run")
        real(aside, target)

    monkeypatch.setattr(auth.os, "link", link)
    auth.ensure_token()
    assert file.read_text() == "of another run" and [path.name for path in file.parent.iterdir()] == ["auth_token"]
