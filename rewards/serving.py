"""A reward behind HTTP: pictures and prompts come as JSON, scores go back (docs/remote_rewards.md has the protocol).
Imports nothing of this project: the environment of a reward package loads this file, too (docs/adr/0030)."""

import asyncio
import base64
import contextlib
import hmac
import io
import json
import math
import socket
import sys
import traceback
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple

import numpy as np
import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from PIL import Image, PngImagePlugin  # noqa: F401 (the plugin: now, and not in a thread)
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.requests import ClientDisconnect

PROTOCOL = 1
MOST = 4000  # characters of a message

# Pictures, uint8 [H, W, 3] of one size, a prompt and the metadata of each -> as many scores.
Score = Callable[[list[np.ndarray], list[str], list[dict[str, Any]]], Sequence[float]]


class Refused(Exception):
    """The reward cannot score what it was given, and could not if it were asked again; says why."""


class Served(NamedTuple):
    """A reward that is loaded, and what it says of itself."""

    score: Score
    metadata: bool  # whether it makes use of it
    range: tuple[float, float] | None = None
    batch: int = 16  # pictures in one call, at most


@dataclass(frozen=True)
class Limits:
    """Beyond them a request is refused, for good (413) or for now (503)."""

    body: int = 64 * 2**20  # bytes of a request
    pictures: int = 1024  # of a request
    pixels: int = 256 * 2**20  # bytes of a request's pictures once they are unpacked
    held: int = 4 * 2**30  # bytes of all requests that are here
    requests: int = 2048  # that are here: being read, waiting or scored
    read_seconds: float = 60.0  # for a request to arrive
    wait_seconds: float = 300.0  # for its answer
    end_seconds: int = 7  # after a signal, for what is here to be answered


class _Ask(BaseModel):
    """What a request says. Strict: a number is no text."""

    model_config = ConfigDict(strict=True, extra="forbid")
    prompts: Annotated[list[str], Field(min_length=1)]
    metadata: list[dict[str, Any]] | None = None
    images: list[str] | None = None
    pixels: str | None = None
    shape: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=4, max_length=4)] | None = None


@dataclass(eq=False)
class _Request:
    name: str  # X-Request-Id
    pictures: list[np.ndarray]
    prompts: list[str]
    metadata: list[dict[str, Any]]
    answer: asyncio.Future[list[float]] | None = None
    scores: dict[int, float] = field(default_factory=dict)  # by picture


class _Part(NamedTuple):
    """Pictures of a request that are scored in one call: of one size, not more than the batch."""

    request: _Request
    rows: list[int]
    shape: tuple[int, ...]


class Service:
    """Requests wait in a queue. One thread loads the reward, then scores what waits, pictures of one size together."""

    def __init__(
        self, name: str, load: Callable[[], Served], token: str | None = None, *, merge: bool = True,
        limits: Limits = Limits(),
    ) -> None:  # fmt: skip
        """`merge`: pictures of several requests are scored together. Without, a request's scores do not depend on what
        else is asked, not even in their last bits."""
        self.name, self.load, self.token, self.merge, self.limits = name, load, token, merge, limits
        self.served: Served | None = None  # once it is loaded
        self.end: Callable[[], None] = lambda: None
        self.fault: BaseException | None = None  # what ended the thread
        self._parts: list[_Part] = []
        self._more = asyncio.Event()
        self._here, self._held = 0, 0  # requests, and their bytes
        self._metrics = registry = CollectorRegistry()
        self._answers = Counter("tributary_reward_requests", "Answers by status.", ["status"], registry=registry)
        self._images = Counter("tributary_reward_images", "Pictures scored.", registry=registry)
        self._seconds = Histogram("tributary_reward_seconds", "Of one call of the reward.", registry=registry)
        Gauge("tributary_reward_queue", "Requests here.", registry=registry).set_function(lambda: self._here)
        self.app = FastAPI(openapi_url=None, lifespan=self._live, dependencies=[Depends(self._authorize)])
        self.app.add_api_route("/score", self._score, methods=["POST"])
        self.app.add_api_route("/health", self._health)
        self.app.add_api_route("/metrics", self._show_metrics)
        self.app.add_exception_handler(AnyHTTPException, self._refuse)

    def run(self, listener: socket.socket) -> None:
        """Until a signal, which is raised again once all is answered. Raises what the reward could not be loaded
        for."""
        kinds: dict[str, Any] = {"loop": "asyncio", "http": "h11", "ws": "none", "lifespan": "on"}
        quiet: dict[str, Any] = {"log_level": "error", "access_log": False, "proxy_headers": False}
        config = uvicorn.Config(self.app, **kinds, **quiet, timeout_graceful_shutdown=self.limits.end_seconds)
        server = uvicorn.Server(config)
        self.end = lambda: setattr(server, "should_exit", True)
        say(f"{self.name}: http://{_host(listener)}, loading")
        server.run([listener])
        if self.fault:
            raise self.fault

    @contextlib.asynccontextmanager
    async def _live(self, app: FastAPI) -> AsyncIterator[None]:
        worker = asyncio.create_task(self._work())
        worker.add_done_callback(self._note_end)
        try:
            yield
        finally:
            worker.cancel()
            answers = [sample for metric in self._answers.collect() for sample in metric.samples]
            count = sum(sample.value for sample in answers if sample.name.endswith("_total"))
            say(f"{self.name}: ends; {count:.0f} requests answered")

    def _note_end(self, worker: asyncio.Task[None]) -> None:
        if not worker.cancelled():
            self.fault = worker.exception()
            self.end()

    def _authorize(self, request: Request) -> None:
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(token.strip().encode(), (self.token or "").encode())
        if self.token and not (kind.lower() == "bearer" and same):
            raise HTTPException(401, "wrong or missing token", {"WWW-Authenticate": "Bearer"})

    async def _refuse(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, AnyHTTPException)
        return self._answer({"error": error.detail}, error.status_code, error.headers)

    def _answer(self, content: Any, status: int = 200, headers: Any = None) -> Response:
        self._answers.labels(status).inc()
        return JSONResponse(content, status, headers)

    async def _health(self) -> Response:
        _, metadata, limits, batch = self._loaded()
        content = {"reward": self.name, "protocol": PROTOCOL, "range": limits, "batch": batch, "metadata": metadata}
        return self._answer(content)

    async def _show_metrics(self) -> Response:
        return Response(generate_latest(self._metrics), media_type="text/plain; version=0.0.4")

    async def _score(self, request: Request) -> Response:
        self._here += 1
        held = 0
        try:
            body = await self._read(request)
            self._loaded()
            self._held += (held := len(body))
            asked = await asyncio.to_thread(parse, body, self.limits)
            asked.name = line(request.headers.get("x-request-id", "without a name"), 64)
            del body
            unpacked = sum(picture.nbytes for picture in asked.pictures)
            self._held += unpacked - held
            held = unpacked
            if self._full:
                raise _later("too many requests are here")
            scores = await self._wait(asked, request)
        finally:
            self._here -= 1
            self._held -= held
        return self._answer({"scores": [score if math.isfinite(score) else None for score in scores]})

    def _loaded(self) -> Served:
        if self.served is None:
            raise _later("the reward is still being loaded")
        return self.served

    @property
    def _full(self) -> bool:
        return self._here > self.limits.requests or self._held > self.limits.held

    async def _read(self, request: Request) -> bytes:
        """Counted as it comes, whatever its header says. What is refused is read on and dropped: to a client that is
        still sending, an answer and a closed connection look like a network that failed."""
        parts, size, fault = list[bytes](), 0, None
        try:
            async with asyncio.timeout(self.limits.read_seconds):
                async for part in request.stream():
                    size += len(part)
                    if size > self.limits.body:
                        fault = HTTPException(413, f"the body is over {self.limits.body} bytes: ask for fewer pictures")
                    elif not fault:
                        parts.append(part)
                        self._held += len(part)
                        fault = _later("too many requests are here") if self._full else None
                    if size > 8 * self.limits.body:
                        break
        except TimeoutError:
            fault = HTTPException(408, f"the body did not arrive within {self.limits.read_seconds:g} s")
        except ClientDisconnect:
            fault = HTTPException(499, "the client is gone")
        finally:
            self._held -= sum(map(len, parts))
        if fault:
            raise fault
        return b"".join(parts)

    async def _wait(self, asked: _Request, request: Request) -> list[float]:
        """Until all its pictures are scored, the client is gone, or it took too long."""
        sizes: dict[tuple[int, ...], list[int]] = {}
        for row, picture in enumerate(asked.pictures):
            sizes.setdefault(picture.shape, []).append(row)
        asked.answer, batch = asyncio.get_running_loop().create_future(), self._loaded().batch
        for shape, rows in sizes.items():
            starts = range(0, len(rows), batch)
            self._parts += [_Part(asked, rows[start : start + batch], shape) for start in starts]
        self._more.set()
        gone = asyncio.ensure_future(request.receive())  # the body is read: only the client's end is left to come
        try:
            waited: set[asyncio.Future[Any]] = {gone, asked.answer}
            await asyncio.wait(waited, timeout=self.limits.wait_seconds, return_when=asyncio.FIRST_COMPLETED)
            if asked.answer.done():
                return asked.answer.result()
        except Refused as error:
            raise HTTPException(422, line(str(error))) from error
        except Exception as error:
            raise HTTPException(500, line(f"{type(error).__name__}: {error}")) from error
        finally:
            gone.cancel()
            asked.answer.cancel()  # what is left of it is not scored
        if gone.done():
            raise HTTPException(499, "the client is gone")
        raise _later(f"not scored within {self.limits.wait_seconds:g} s")

    async def _work(self) -> None:
        loop, thread = asyncio.get_running_loop(), ThreadPoolExecutor(1, "reward")
        self.served = await loop.run_in_executor(thread, self.load)
        say(f"{self.name}: ready")
        while True:
            if not (parts := self._next()):
                self._more.clear()
                await self._more.wait()
                continue
            with self._seconds.time():
                outcomes = await loop.run_in_executor(thread, self._outcomes, parts)
            for part, outcome in zip(parts, outcomes, strict=True):
                self._deliver(part, outcome)

    def _next(self) -> list[_Part]:
        """The oldest part, and others that fit into its batch; these are no longer waiting."""
        self._parts = [part for part in self._parts if part.request.answer and not part.request.answer.done()]
        chosen, room = self._parts[:1], self._loaded().batch - sum(len(part.rows) for part in self._parts[:1])
        for part in self._parts[1:] if self.merge else ():
            if not room:
                break
            if part.shape == chosen[0].shape and len(part.rows) <= room:
                chosen.append(part)
                room -= len(part.rows)
        taken = set(map(id, chosen))
        self._parts = [part for part in self._parts if id(part) not in taken]
        return chosen

    def _outcomes(self, parts: list[_Part]) -> list[list[float] | Exception]:
        """The scores of each part. If the reward raises, each is scored alone: one may be at fault, not all."""
        rows = [(part.request, row) for part in parts for row in part.rows]
        try:
            pictures = [request.pictures[row] for request, row in rows]
            prompts = [request.prompts[row] for request, row in rows]
            scores = self._loaded().score(pictures, prompts, [request.metadata[row] for request, row in rows])
            if len(scores) != len(rows):
                raise Refused(f"{len(scores)} scores for {len(rows)} pictures")
            left = iter(map(float, scores))
            return [[next(left) for _ in part.rows] for part in parts]
        except Exception as error:  # a reward's code may raise anything
            return [error] if len(parts) == 1 else [outcome for part in parts for outcome in self._outcomes([part])]

    def _deliver(self, part: _Part, outcome: list[float] | Exception) -> None:
        answer, asked = part.request.answer, part.request
        if isinstance(outcome, Exception):
            kind = "" if isinstance(outcome, Refused) else f"{type(outcome).__name__}: "
            say(f"{self.name}: request {asked.name}: {kind}{outcome}")
            if kind:  # not the request's fault
                traceback.print_exception(outcome)
        if answer is None or answer.done():
            return
        if isinstance(outcome, Exception):
            answer.set_exception(outcome)
            return
        self._images.inc(len(part.rows))
        asked.scores |= zip(part.rows, outcome, strict=True)
        if len(asked.scores) == len(asked.pictures):
            answer.set_result([asked.scores[row] for row in range(len(asked.pictures))])


def parse(body: bytes, limits: Limits) -> _Request:
    """Raises HTTPException 400 or 413. Nothing is unpacked before its size is known."""
    try:
        ask = _Ask.model_validate(json.loads(body, parse_constant=_no_constant))
    except ValidationError as error:
        first = error.errors()[0]
        raise HTTPException(400, line(f"{'.'.join(map(str, first['loc'])) or 'body'}: {first['msg']}")) from error
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, line(f"the body is not JSON: {error}")) from error
    count = len(ask.prompts)
    if (ask.images is None) == (ask.pixels is None) or (ask.pixels is None) != (ask.shape is None):
        raise HTTPException(400, "expected either images, or pixels and shape")
    there = len(ask.images) if ask.images is not None else (ask.shape or [0])[0]
    if there != count or len(ask.metadata or ask.prompts) != count:
        of_metadata = "none" if ask.metadata is None else len(ask.metadata)
        raise HTTPException(400, f"{there} pictures, {count} prompts and {of_metadata} of metadata, expected as many")
    if count > limits.pictures:
        raise HTTPException(413, f"{count} pictures, at most {limits.pictures} in a request")
    pictures = _unpack(ask.images, limits) if ask.images is not None else _raw(ask, limits)
    return _Request("", pictures, ask.prompts, ask.metadata or [{} for _ in ask.prompts])


def _raw(ask: _Ask, limits: Limits) -> list[np.ndarray]:
    shape, pixels = ask.shape or [], _decoded(ask.pixels or "", "pixels")
    if shape[3] != 3:
        raise HTTPException(400, f"shape: {shape}, expected [B, H, W, 3]")
    _require_size(math.prod(shape), limits)
    if len(pixels) != math.prod(shape):
        raise HTTPException(400, f"pixels: {len(pixels)} bytes for shape {shape}, expected {math.prod(shape)}")
    return list(np.frombuffer(pixels, np.uint8).reshape(shape))


def _unpack(images: list[str], limits: Limits) -> list[np.ndarray]:
    pictures, size = [], 0
    for i, text in enumerate(images):
        content = _decoded(text, f"images.{i}")
        try:
            with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
                size += 3 * image.width * image.height
                _require_size(size, limits)
                if image.mode != "RGB":
                    raise HTTPException(400, f"images.{i}: its mode is {image.mode}, expected RGB")
                pictures.append(np.asarray(image))
        except HTTPException:
            raise
        except Image.DecompressionBombError as error:
            raise HTTPException(413, f"images.{i}: {error}") from error
        except Exception as error:  # of the decoder, whatever the bytes make it raise
            raise HTTPException(400, line(f"images.{i}: no PNG that can be read: {error}")) from error
    return pictures


def _decoded(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise HTTPException(400, f"{where}: not base64: {error}") from error


def _require_size(size: int, limits: Limits) -> None:
    if size > limits.pixels:
        raise HTTPException(413, f"pictures of over {limits.pixels} bytes: ask for fewer, or smaller ones")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _later(why: str) -> HTTPException:
    """The same may be asked again, after a second."""
    return HTTPException(503, why, {"Retry-After": "1"})


def _host(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def line(text: str, most: int = MOST) -> str:
    """`text` in one line that a terminal takes for text."""
    return "".join(letter if letter.isprintable() else " " for letter in " ".join(text[:most].split()))


def say(text: str) -> None:
    """A line in the log; without anybody who reads it the server goes on."""
    with contextlib.suppress(OSError):
        print(line(f"rewards.serve: {text}"), file=sys.stderr, flush=True)
