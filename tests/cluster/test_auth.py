"""A cluster without a lock, and a token that others can read, are said loudly, once, with the remedy."""

import os
import subprocess
import sys

import pytest

from cluster import auth
from cluster.session import nodes_at_hand


@pytest.fixture
def at(head, monkeypatch):
    """Our environment is that of someone who knows the head's token."""
    monkeypatch.setenv("RAY_ADDRESS", head.address)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", head.environment["RAY_AUTH_TOKEN_PATH"])
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    return head


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.parametrize("head", ["disabled"], indirect=True)
def test_a_cluster_that_takes_any_token_is_found_open_and_a_plan_says_it_in_one_line(at, small_settings, tmp_path):
    said = auth.takes_any_token(at.address)
    assert f"the Ray cluster at {at.address} takes any token" in said and "RAY_AUTH_MODE=token" in said
    command = [sys.executable, "-m", "learner.run", *small_settings, f"run.dir={tmp_path / 'run'}", "--plan"]
    plan = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=200)
    assert plan.returncode == 0, plan.stderr
    (line,) = [line for line in plan.stderr.splitlines() if line.startswith("learner.run:")]
    assert line == f"learner.run: warning: {said}"


@pytest.mark.ray
@pytest.mark.long
def test_a_locked_one_is_not(at):
    auth.require_answer(at.address)
    assert auth.takes_any_token(at.address) is None


def test_no_cluster_is_no_open_one(monkeypatch):
    monkeypatch.setattr(auth, "CONNECT_SECONDS", 0.5)
    assert auth.takes_any_token("127.0.0.1:1") is None and auth.takes_any_token("ray://127.0.0.1:1") is None


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A user without a token."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", "")  # so that what is made is forgotten
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    return tmp_path


def test_a_token_is_made_for_this_process_alone_and_that_of_the_user_kept(home, monkeypatch):
    auth.ensure_token()
    token = os.environ["RAY_AUTH_TOKEN"]
    auth.ensure_token()
    assert len(token) == 64 and os.environ["RAY_AUTH_TOKEN"] == token and not (home / ".ray").exists()
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    (home / ".ray").mkdir()
    (home / ".ray/auth_token").write_text("c0ffee")
    auth.ensure_token()
    assert "RAY_AUTH_TOKEN" not in os.environ


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_token_file_that_others_can_read_is_said(home, elsewhere, monkeypatch):
    file = home / ("elsewhere" if elsewhere else ".ray/auth_token")
    file.parent.mkdir(exist_ok=True)
    file.write_text("c0ffee" * 10 + "abcd")
    file.chmod(0o640)
    if elsewhere:
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    assert auth.faults_here() == [f"{file}: others can read the token in it; chmod 600 {file}"]
    file.chmod(0o600)
    assert auth.faults_here() == []


def test_authentication_switched_off_is_said_at_start_and_no_token_made(home, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    said = []
    nodes_at_hand(1, said.append)
    assert len(said) == 1 and "RAY_AUTH_MODE=disabled" in said[0] and "unset it" in said[0]
    nodes_at_hand(1, said.append, local=True)  # no Ray, no token
    auth.ensure_token()
    assert len(said) == 1 and "RAY_AUTH_TOKEN" not in os.environ


@pytest.mark.parametrize("home_is", ["nobody's", "closed"])
def test_a_home_that_is_not_there_or_cannot_be_looked_into_is_as_one_without_a_token(home_is, home, monkeypatch):
    """Neither ends a run in a traceback: a container's user may have no home, and pathlib raises for both."""
    if home_is == "nobody's":
        monkeypatch.delenv("HOME")
        monkeypatch.setattr(os.path, "expanduser", str)  # as it answers where nobody knows the user
    else:
        monkeypatch.setattr(os, "stat", lambda *a, **b: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    auth.ensure_token()
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64 and not auth.faults_here()
    monkeypatch.undo()
