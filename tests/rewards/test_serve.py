"""A reward behind HTTP, on free ports of this machine: right scores to the right request, and what is refused."""

import asyncio
import http.client
import io
import json
import math
import socket
import struct
import threading
import urllib.request
import zlib
from urllib.error import HTTPError

import aiohttp
import numpy as np
import pytest
import torch
from PIL import Image
from served import ask, png, raw, soon, text

from commands import serve
from rewards import contract, registry
from rewards.score_request import Limits
from rewards.serving import Service

RNG = np.random.default_rng(0)


@pytest.fixture
def start():
    """start(reward, batch=16, token=None, merge=True, **limits) -> the service, in a thread of its own, with `url`."""
    running = []

    def starter(reward, batch=16, token=None, merge=True, **limits) -> Service:
        reward = reward if hasattr(reward, "name") else registry.UserReward("judge", reward)
        listener = serve.listen("127.0.0.1", 0, token)
        load = limits.pop("load", lambda: serve.served(reward, "cpu", batch))
        service = Service("judge", load, token, merge=merge, limits=Limits(**limits))
        service.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        running.append((service, thread := threading.Thread(target=service.run, args=(listener,), daemon=True)))
        thread.start()
        return service

    yield starter
    for service, thread in running:
        service.end()
        thread.join(30)
        assert not thread.is_alive()


def ready(service: Service) -> str:
    soon(lambda: service.served)
    return service.url


def brightness(images, prompts):
    return images.mean((1, 2, 3))


def numbered(images, prompts):
    """Exact in float32: the picture's value, and the prompt's number."""
    return images[:, 0, 0, 0] * 255 + 256 * torch.tensor([float(prompt) for prompt in prompts])


def cubes(images, prompts):
    """Its last bits depend on the order in which it adds, and that on how the images lie in memory."""
    return images.pow(3).sum((1, 2, 3))


PICTURES = RNG.integers(0, 256, (4, 20, 28, 3), np.uint8)
PROMPTS = ["one", "two", "three", "four"]


@pytest.mark.parametrize("reward", [cubes, registry.load("jpeg_compressibility")])
def test_scores_are_those_of_the_same_process_to_the_bit(start, reward):
    url = ready(start(reward))
    images = torch.from_numpy(PICTURES).permute(0, 3, 1, 2).contiguous().float() / 255
    scores = contract.call(reward, images, PROMPTS).tolist()
    assert ask(url, raw(PICTURES, PROMPTS)) == (200, {"scores": scores})
    assert ask(url, {"images": [png(picture) for picture in PICTURES], "prompts": PROMPTS}) == (200, {"scores": scores})


def test_pictures_of_several_sizes_in_one_request(start):
    calls = []

    def reward(images, prompts):
        calls.append(tuple(images.shape))
        return numbered(images, prompts)

    url = ready(start(reward, batch=2))
    pictures = [np.full((4, 4 + i % 2, 3), i, np.uint8) for i in range(6)]
    status, answer = ask(url, {"images": [png(picture) for picture in pictures], "prompts": [*"012345"]})
    assert status == 200 and answer["scores"] == [257.0 * i for i in range(6)]
    assert sorted(calls) == [(1, 3, 4, 4), (1, 3, 4, 5), (2, 3, 4, 4), (2, 3, 4, 5)]


@pytest.mark.long
def test_a_thousand_requests_at_once_each_get_their_own_scores(start):
    batches = []

    def reward(images, prompts):
        batches.append(len(prompts))
        return numbered(images, prompts)

    url = ready(start(reward))

    async def one(session: aiohttp.ClientSession, i: int) -> tuple[int, list[float]]:
        count, side = 1 + i % 3, 8 + i % 2
        pictures = np.full((count, side, 8, 3), i % 256, np.uint8)
        body = raw(pictures, [str(i)] * count) if i % 5 else {"images": [png(pictures[0])] * count}
        async with session.post(f"{url}/score", json=body | {"prompts": [str(i + k) for k in range(count)]}) as answer:
            return answer.status, (await answer.json())["scores"]

    async def all_of_them() -> list:
        timeout = aiohttp.ClientTimeout(120)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
            return await asyncio.gather(*(one(session, i) for i in range(1000)))

    for i, answer in enumerate(asyncio.run(all_of_them())):
        assert answer == (200, [i % 256 + 256.0 * (i + k) for k in range(1 + i % 3)])
    assert sum(batches) == 1999 and max(batches) == 16  # scored once, and together


def test_without_merging_no_two_requests_are_scored_together(start):
    sizes, begun, go = [], threading.Event(), threading.Event()

    def reward(images, prompts):
        sizes.append(len(images))
        begun.set()
        assert go.wait(60)
        return brightness(images, prompts)

    service = start(reward, merge=False)
    bodies = [raw(PICTURES[:count], PROMPTS[:count]) for count in (1, 2, 3)]
    threads = [threading.Thread(target=ask, args=(ready(service), body)) for body in bodies]
    threads[0].start()
    assert begun.wait(60)
    for thread in threads[1:]:
        thread.start()
    soon(lambda: service._here == 3 and len(service._parts) == 2)
    go.set()
    for thread in threads:
        thread.join(60)
    assert sorted(sizes) == [1, 2, 3]


def test_metadata_reaches_a_users_reward(start):
    def reward(images, prompts, metadata):
        return [float(len(row["parts"])) for row in metadata]

    url = ready(start(reward))
    assert ask(url, path="health")[1]["metadata"] is True
    body = raw(PICTURES, PROMPTS, metadata=[{"parts": ["x"] * i} for i in range(4)])
    assert ask(url, body) == (200, {"scores": [0.0, 1.0, 2.0, 3.0]})
    status, answer = ask(url, raw(PICTURES, PROMPTS))
    assert status == 422 and "no column 'parts'" in answer["error"]


def test_health_metrics_and_scores_that_are_no_numbers(start):
    class Reward:
        range, batch = (-math.inf, 1), 4

        def __call__(self, images, prompts):
            return torch.tensor([math.nan, float(prompts[0]), -math.inf, -1.0])

    url = ready(start(Reward()))
    said = {"reward": "judge", "range": [None, 1], "batch": 4, "metadata": False, "protocol": 1}
    assert ask(url, path="health") == (200, said)
    assert ask(url, raw(PICTURES, ["0.5"] * 4)) == (200, {"scores": [None, 0.5, None, -1.0]})
    status, answer = ask(url, raw(PICTURES, ["1.5"] * 4))
    assert status == 422 and "outside of its range, -inf to 1" in answer["error"]
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    assert 'tributary_reward_requests_total{status="200"} 2.0' in lines and "tributary_reward_queue 0.0" in lines
    assert {"tributary_reward_images_total 4.0", "tributary_reward_seconds_count 2.0"} <= set(lines)
    assert ask(url, path="nothing")[0] == 404 and ask(url, path="score")[0] == 405


def test_a_reward_that_raises_fails_its_own_request_alone_and_is_said_with_the_lines(
    start, tmp_path, capsys, monkeypatch
):
    (tmp_path / "picky.py").write_text("import time\ndef judge(images, prompts):\n    if 'slow' in prompts:\n"
        "        time.sleep(1)\n    return [{'a': 1.0, 'slow': 2.0}[prompt] for prompt in prompts]\n")  # fmt: skip
    monkeypatch.syspath_prepend(tmp_path)
    service = start(registry.load("picky:judge"))
    answers, picture = {}, PICTURES[:1]

    def wait_for(prompt: str) -> None:
        answers[prompt, len(answers)] = ask(service.url, raw(picture, [prompt]))

    ready(service)
    threads = [threading.Thread(target=wait_for, args=(prompt,)) for prompt in ("slow", "a", "wrong", "a")]
    threads[0].start()
    soon(lambda: service._here and not service._parts)  # it is being scored: the others wait, then go together
    for thread in threads[1:]:
        thread.start()
    for thread in threads:
        thread.join(60)
    of = {
        prompt: [answer for (asked, _), answer in answers.items() if asked == prompt]
        for prompt in ("slow", "a", "wrong")
    }
    assert of["slow"] == [(200, {"scores": [2.0]})] and of["a"] == [(200, {"scores": [1.0]})] * 2
    [(status, answer)] = of["wrong"]
    assert status == 422 and "KeyError: 'wrong' (at " in answer["error"] and "picky.py:5 in judge" in answer["error"]
    logged = capsys.readouterr().err
    assert "KeyError: 'wrong'" in logged and "Traceback" not in logged


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def bomb(width: int, height: int) -> str:
    """A small file that says it is a large picture."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return text(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10**6))))


def jpeg() -> str:
    file = io.BytesIO()
    Image.fromarray(PICTURES[0]).save(file, "JPEG")
    return text(file.getvalue())


ONE, PICTURE = ["one"], png(PICTURES[0])
EVIL = b"cos\nsystem\n(S'touch {}'\ntR."  # a pickle that would run a command
WRONG = [
    (b"\x80\x04K\x01.", 400, "not JSON"),
    (b"[" * 100_000, 400, "not JSON"),
    (b'{"prompts": ["one"], "metadata": [{"x": NaN}]}', 400, "NaN is no number"),
    ([], 400, "body: "),
    ({"images": [PICTURE], "prompts": ONE, "more": 1}, 400, "more: Extra"),
    ({"images": [PICTURE], "prompts": [1]}, 400, "prompts.0: "),
    ({"images": [], "prompts": []}, 400, "prompts: "),
    ({"prompts": ONE}, 400, "either images, or pixels and shape"),
    ({"images": [PICTURE], "prompts": ["one", "two"]}, 400, "1 pictures, 2 prompts and none of metadata"),
    ({"images": [PICTURE], "prompts": ONE, "metadata": ["x"]}, 400, "metadata.0: "),
    ({"images": [PICTURE], "prompts": ONE, "metadata": [{}, {}]}, 400, "2 of metadata"),
    ({"images": ["not base64!"], "prompts": ONE}, 400, "images.0: not base64"),
    ({"images": [text(b"no picture")], "prompts": ONE}, 400, "images.0: no PNG"),
    ({"images": [PICTURE[:200]], "prompts": ONE}, 400, "images.0: no PNG"),
    ({"images": [jpeg()], "prompts": ONE}, 400, "images.0: no PNG"),
    ({"images": [png(PICTURES[0, :, :, 0])], "prompts": ONE}, 400, "its mode is L, expected RGB"),
    ({"images": [bomb(10_000, 10_000)], "prompts": ONE}, 413, "pictures of over"),
    ({"images": [bomb(60_000, 60_000)], "prompts": ONE}, 413, "images.0: "),
    ({"images": [bomb(1_000, 1_000)] * 3, "prompts": ["x"] * 3}, 400, "images.0: no PNG"),
    ({"images": [PICTURE] * 9, "prompts": ["x"] * 9}, 413, "9 pictures, at most 8"),
    ({"pixels": text(bytes(47)), "shape": [1, 4, 4, 3], "prompts": ONE}, 400, "47 bytes for shape"),
    ({"pixels": text(bytes(16)), "shape": [1, 4, 4, 1], "prompts": ONE}, 400, "expected [B, H, W, 3]"),
    ({"pixels": text(bytes(3)), "shape": [1, 99_999, 9_999, 3], "prompts": ONE}, 413, "pictures of over"),
    ({"pixels": "", "shape": [1, 0, 4, 3], "prompts": ONE}, 400, "shape.1: "),
]


def test_what_is_wrong_is_refused_in_one_line_and_the_server_lives_on(start, tmp_path):
    url, witness = ready(start(brightness, pictures=8, body=2**20)), tmp_path / "ran"
    evil = EVIL.replace(b"{}", str(witness).encode())
    for body, status, said in [
        *WRONG, (evil, 400, "not JSON"), ({"images": [text(evil)], "prompts": ONE}, 400, "images.0: no PNG"),
    ]:  # fmt: skip
        answer = ask(url, body)
        assert answer[0] == status and said in answer[1]["error"] and "\n" not in answer[1]["error"], (said, answer)
    assert not witness.exists()
    assert ask(url, raw(PICTURES, PROMPTS))[0] == 200


def test_a_body_is_counted_whatever_its_header_says(start):
    service = start(brightness, body=100_000)
    port, body = int(ready(service).rpartition(":")[2]), bytes(700_000)

    def status(chunked: bool) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        parts = (body[i : i + 10_000] for i in range(0, len(body), 10_000))
        connection.request("POST", "/score", parts if chunked else body, encode_chunked=chunked,
                           headers={"Transfer-Encoding": "chunked"} if chunked else {})  # fmt: skip
        answer = connection.getresponse()
        assert "over 100000 bytes" in json.load(answer)["error"]
        return answer.status

    assert status(chunked=False) == status(chunked=True) == 413
    assert service._held == 0 and ask(service.url, raw(PICTURES, PROMPTS))[0] == 200


def test_a_wrong_token_is_refused_everywhere_before_anything_is_read(start):
    url, body = ready(start(brightness, token="secret", body=10)), raw(PICTURES, PROMPTS)
    for token in (None, "wrong", "secre", "secrett", "sécret", ""):
        for path in ("score", "health", "metrics"):
            assert ask(url, body if path == "score" else None, token and token.encode().decode("latin-1"), path) == (
                401, {"error": "wrong or missing token"},
            )  # fmt: skip
    assert ask(url, body, "secret")[0] == 413 and ask(url, None, "secret", "health")[0] == 200


def test_deadlines_on_reading_and_waiting_and_a_full_queue(start):
    go, begun = threading.Event(), threading.Event()

    def reward(images, prompts):
        begun.set()
        assert go.wait(60)
        return brightness(images, prompts)

    service = start(reward, requests=2, read_seconds=0.5, wait_seconds=1.0)
    url, body = ready(service), raw(PICTURES, PROMPTS)
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=60) as slow:
        slow.sendall(b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nonly this")
        assert slow.recv(1000).startswith(b"HTTP/1.1 503 ")
    first, answers = threading.Thread(target=lambda: answers.append(ask(url, body))), []
    first.start()
    assert begun.wait(60)
    second = threading.Thread(target=lambda: answers.append(ask(url, body)))
    second.start()
    soon(lambda: service._here == 2)
    with pytest.raises(HTTPError) as refused:
        urllib.request.urlopen(f"{url}/score", b"is not even looked at", timeout=60)
    assert refused.value.code == 503 and refused.value.headers["Retry-After"] == "1"
    first.join(60)
    second.join(60)
    assert [(status, answer["error"]) for status, answer in answers] == [(503, "not scored within 1 s")] * 2
    go.set()
    soon(lambda: ask(url, body)[0] == 200)
    assert service._here == 0 and service._held == 0 and not service._parts


def test_pictures_that_do_not_fit_into_memory_now_may_come_later(start):
    url = ready(start(brightness, held=10**6))
    large = {"images": [png(np.zeros((1000, 1000, 3), np.uint8))], "prompts": ONE}  # a small file
    assert ask(url, large)[0] == 503 and ask(url, raw(PICTURES, PROMPTS))[0] == 200


def test_what_a_client_has_given_up_is_not_scored(start):
    go, begun, seen = threading.Event(), threading.Event(), []

    def reward(images, prompts):
        seen.extend(prompts)
        begun.set()
        assert go.wait(60)
        return brightness(images, prompts)

    service = start(reward, batch=1)
    url = ready(service)
    first = threading.Thread(target=ask, args=(url, raw(PICTURES[:1], ["first"])))
    first.start()
    assert begun.wait(60)
    content = json.dumps(raw(PICTURES[:1], ["given up"])).encode()
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=60) as gone:
        gone.sendall(b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(content), content))
        soon(lambda: service._parts)
    soon(lambda: service._here == 1)
    go.set()
    first.join(60)
    assert ask(url, raw(PICTURES[:1], ["last"]))[0] == 200 and seen == ["first", "last"]


def test_memory_that_runs_out_is_not_the_requests_fault(start, capsys):
    def reward(images, prompts):
        raise torch.OutOfMemoryError("no more")

    url = ready(start(reward))
    assert ask(url, raw(PICTURES, PROMPTS)) == (500, {"error": "OutOfMemoryError: no more"})
    assert "Traceback" in capsys.readouterr().err


def test_before_the_reward_is_loaded_503_and_one_that_cannot_be_loaded_ends_the_server(start):
    go = threading.Event()

    def load():
        assert go.wait(60)
        return serve.served(registry.UserReward("late", brightness), "cpu", 4)

    service = start(None, load=load)
    assert ask(service.url, raw(PICTURES, PROMPTS))[0] == ask(service.url, path="health")[0] == 503
    go.set()
    assert ask(ready(service), raw(PICTURES, PROMPTS))[0] == 200

    def broken():
        raise ValueError("no such weights")

    with pytest.raises(ValueError, match="no such weights"):
        Service("broken", broken).run(serve.listen("127.0.0.1", 0, None))
