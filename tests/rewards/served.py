"""Asking a reward server."""

import base64
import io
import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from urllib.error import HTTPError

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


def text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def png(picture: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return text(file.getvalue())


def raw(pictures: np.ndarray, prompts: list[str], **more) -> dict:
    return {"pixels": text(pictures.tobytes()), "shape": list(pictures.shape), "prompts": prompts, **more}


def ask(url: str, body=None, token: str | None = None, path: str = "score") -> tuple[int, dict]:
    """Status, and the answer's JSON. A `body` that is no bytes is sent as JSON."""
    content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(f"{url}/{path}", content, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except HTTPError as error:
        return error.code, json.load(error)


def command(*arguments, cwd: Path, **environment) -> subprocess.Popen:
    """The server as a user starts it, with its log in stderr."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    line = [sys.executable, "-m", "rewards.serve", *arguments]
    return subprocess.Popen(line, cwd=cwd, env=environment, stderr=subprocess.PIPE, text=True)


def until(server: subprocess.Popen, word: str) -> str:
    """The first line of its log with `word`."""
    for text in server.stderr:
        if word in text:
            return text
    raise AssertionError(f"it ended without {word!r}")


def soon(happens) -> None:
    end = time.monotonic() + 60
    while not happens():
        assert time.monotonic() < end
        time.sleep(0.01)
