"""A judge behind HTTP, by the standard library's server alone, and the same reward as a function. In a test's thread it
answers each request as the test has planned; as a process, `python judge.py PORT FOLDER`, it misbehaves at random."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import random
import signal
import socket
import struct
import sys
import threading
import time
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from PIL import Image

HEALTH = {"reward": "shade", "range": None, "batch": None, "metadata": True, "protocol": 1}


def shade(pixels: np.ndarray, prompt: str, row: dict) -> float:
    """[H, W, 3] uint8 -> its brightness, seen through the prompt and its metadata."""
    return float(np.float32(pixels[..., 0].mean() / 255 - pixels[..., 1].mean() / 510 + len(prompt) / 100)) + float(
        row.get("bonus", 0)
    )


def in_process(images, prompts):
    """The judge's reward as a user's own function: of the same 8-bit pixels."""
    pixels = images.mul(255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    return [shade(picture, prompt, {}) for picture, prompt in zip(pixels, prompts, strict=True)]


def pictures(body: dict) -> np.ndarray:
    if "pixels" in body:
        return np.frombuffer(base64.b64decode(body["pixels"]), np.uint8).reshape(body["shape"])
    return np.stack([np.asarray(Image.open(io.BytesIO(base64.b64decode(image)))) for image in body["images"]])


def scores(body: dict) -> list[float]:
    seen, rows = pictures(body), body.get("metadata") or [{}] * len(body["prompts"])
    return [shade(*each) for each in zip(seen, body["prompts"], rows, strict=True)]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.server.judge.connections.append(self.connection)

    def log_message(self, *_) -> None: ...

    def do_GET(self) -> None:
        self.server.judge.answer(self, None)

    def do_POST(self) -> None:
        self.server.judge.answer(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def send(self, status: int, body: object = b"", **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def reset(self) -> None:
        """The connection ends without an answer."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request, client_address) -> None: ...  # a client that left


class Judge:
    """`plan` has, for each request to come, what to do instead of scoring: an answer's status, body and headers, or a
    function of (handler, request); `always` what to do with all that come later. `seen` has (path, headers, body)."""

    def __init__(self, token: str | None = None, port: int = 0) -> None:
        self.token, self.plan, self.always, self.seen, self.lock = token, deque(), None, [], threading.Lock()
        self.at_work, self.most_at_work, self.connections = 0, 0, []
        self.server = Server(("127.0.0.1", port), Handler)
        self.server.judge = self
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        for connection in self.connections:  # those that are kept open
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def answer(self, handler: Handler, body: dict | None) -> None:
        with self.lock:
            self.seen.append((handler.path, dict(handler.headers), body))
            act = self.plan.popleft() if self.plan else self.always
            self.at_work += 1
            self.most_at_work = max(self.most_at_work, self.at_work)
        with contextlib.suppress(OSError):
            if self.token and handler.headers.get("Authorization") != f"Bearer {self.token}":
                handler.send(401, {"error": "who are you?"})
            elif callable(act):
                act(handler, body)
            elif act is not None:
                handler.send(act[0], act[1], **(act[2] if len(act) > 2 else {}))
            elif handler.path == "/health" and body is None:
                handler.send(200, HEALTH)
            elif handler.path == "/score" and body is not None:
                handler.send(200, {"scores": scores(body)})
            else:
                handler.send(404)
        with self.lock:
            self.at_work -= 1


def misbehave(judge: Judge, folder: Path, generator: random.Random) -> None:
    """Every fault leaves its witness in `folder`: 503 and 429 at random, one hang, one answer of garbage. `scored` has
    a line a request that was answered in full; the process dies of the one after DIES_AFTER."""
    limit = int(os.environ.get("DIES_AFTER", "1000000"))

    def act(handler: Handler, body: dict | None) -> None:
        with judge.lock:
            draw, number = generator.random(), len(judge.seen)
            once = next((name for name in ("hung", "garbage") if not (folder / name).exists()), None)
            kind = once if once and number > 3 and body else ("busy" if draw < 0.15 else "slow" if draw < 0.3 else "")
            if body is None:
                kind = ""
            if kind:
                (folder / kind).touch()
        if kind == "hung":
            time.sleep(600)
        elif kind == "garbage":
            handler.send(200, b"<html>it works</html>")
        elif kind:
            handler.send(503 if kind == "busy" else 429, {"error": kind}, Retry_After="0.05")
        elif body is None:
            handler.send(200, HEALTH)
        else:
            with judge.lock:
                if (scored := len((folder / "scored").read_text().splitlines())) >= limit:
                    (folder / "killed").touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                with (folder / "scored").open("a") as file:
                    file.write(f"{scored} {handler.headers['X-Request-Id']} {len(body['prompts'])}\n")
            handler.send(200, {"scores": scores(body)})

    judge.always = act


if __name__ == "__main__":
    at = Path(sys.argv[2])
    (at / "scored").touch()
    one = Judge(port=int(sys.argv[1]), token=os.environ.get("TRIBUTARY_REWARD_TOKEN"))
    misbehave(one, at, random.Random(5))
    (at / "up").touch()
    threading.Event().wait()
