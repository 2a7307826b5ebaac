"""A reward behind HTTP: pictures and prompts come as JSON, scores go back (docs/remote_rewards.md has the protocol).
Imports nothing of this project but score_request.py: a reward package's own environment loads both (docs/adr/0030)."""

import asyncio
import contextlib
import hmac
import math
import socket
import sys
import traceback
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.requests import ClientDisconnect

from rewards.score_request import Asked, Limits, line, parse

PROTOCOL = 1
IDLE_SECONDS = 60.0  # between two looks for work where nobody asks

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


@dataclass(eq=False)
class _Waiting:
    """A request that is read."""

    name: str  # X-Request-Id
    asked: Asked
    answer: asyncio.Future[list[float]]
    scores: dict[int, float] = field(default_factory=dict)  # by picture


class _Part(NamedTuple):
    """Pictures of a request that are scored in one call: of one size, not more than the batch."""

    request: _Waiting
    rows: list[int]
    shape: tuple[int, ...]


class Service:
    """Requests wait in a queue. One thread loads the reward, then scores what waits, pictures of one size together."""

    def __init__(
        self, name: str, load: Callable[[], Served], token: str | None = None, *, merge: bool = True,
        limits: Limits | None = None,
    ) -> None:  # fmt: skip
        """`merge`: pictures of several requests are scored together. Without, a request's scores do not depend on what
        else is asked, not even in their last bits."""
        self.name, self.load, self.token, self.merge, self.limits = name, load, token, merge, limits or Limits()
        self.served: Served | None = None  # once it is loaded
        self.end: Callable[[], None] = lambda: None
        self.fault: BaseException | None = None  # what ended the thread
        self._parts: list[_Part] = []
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
        self._woken = asyncio.get_running_loop().create_future()  # done: there is work
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

    async def _authorize(self, request: Request) -> None:
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
        ends = limits and [end if math.isfinite(end) else None for end in limits]
        content = {"reward": self.name, "protocol": PROTOCOL, "range": ends, "batch": batch, "metadata": metadata}
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
            fault = _later(f"the body did not arrive within {self.limits.read_seconds:g} s")
        except ClientDisconnect:
            fault = HTTPException(499, "the client is gone")
        finally:
            self._held -= sum(map(len, parts))
        if fault:
            raise fault
        return b"".join(parts)

    async def _wait(self, asked: Asked, request: Request) -> list[float]:
        """Until all its pictures are scored, the client is gone, or it took too long."""
        name, answer = request.headers.get("x-request-id", "without a name"), asyncio.Future[list[float]]()
        waiting, batch = _Waiting(line(name, 64), asked, answer), self._loaded().batch
        sizes: dict[tuple[int, ...], list[int]] = {}
        for row, picture in enumerate(asked.pictures):
            sizes.setdefault(picture.shape, []).append(row)
        for shape, rows in sizes.items():
            starts = range(0, len(rows), batch)
            self._parts += [_Part(waiting, rows[start : start + batch], shape) for start in starts]
        if not self._woken.done():
            self._woken.set_result(None)
        gone = asyncio.ensure_future(request.receive())  # the body is read: only the client's end is left to come
        try:
            waited: set[asyncio.Future[Any]] = {gone, answer}
            await asyncio.wait(waited, timeout=self.limits.wait_seconds, return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                return await answer
        except Refused as error:
            raise HTTPException(422, line(str(error))) from error
        except Exception as error:
            raise HTTPException(500, line(f"{type(error).__name__}: {error}")) from error
        finally:
            gone.cancel()
            answer.cancel()  # what is left of it is not scored
        if gone.done():
            raise HTTPException(499, "the client is gone")
        raise _later(f"not scored within {self.limits.wait_seconds:g} s")

    async def _work(self) -> None:
        loop, thread = asyncio.get_running_loop(), ThreadPoolExecutor(1, "reward")
        self.served = await loop.run_in_executor(thread, self.load)
        say(f"{self.name}: ready")
        while True:
            if not (parts := self._next()):
                self._woken = loop.create_future()
                await asyncio.wait({self._woken}, timeout=IDLE_SECONDS)
                continue
            with self._seconds.time():
                outcomes = await loop.run_in_executor(thread, self._outcomes, parts)
            for part, outcome in zip(parts, outcomes, strict=True):
                self._deliver(part, outcome)

    def _next(self) -> list[_Part]:
        """The oldest part, and others that fit into its batch; these are no longer waiting."""
        self._parts = [part for part in self._parts if not part.request.answer.done()]
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
        rows = [(part.request.asked, row) for part in parts for row in part.rows]
        columns = zip(*((of.pictures[row], of.prompts[row], of.metadata[row]) for of, row in rows), strict=True)
        try:
            scores = self._loaded().score(*map(list, columns))
            if len(scores) != len(rows):
                raise Refused(f"{len(scores)} scores for {len(rows)} pictures")
            left = iter(map(float, scores))
            return [[next(left) for _ in part.rows] for part in parts]
        except Exception as error:  # a reward's code may raise anything
            return [error] if len(parts) == 1 else [outcome for part in parts for outcome in self._outcomes([part])]

    def _deliver(self, part: _Part, outcome: list[float] | Exception) -> None:
        request = part.request
        if isinstance(outcome, Exception):
            kind = "" if isinstance(outcome, Refused) else f"{type(outcome).__name__}: "
            say(f"{self.name}: request {request.name}: {kind}{outcome}")
            if kind:  # not the request's fault
                with contextlib.suppress(OSError):
                    traceback.print_exception(outcome)
        if request.answer.done():
            return
        if isinstance(outcome, Exception):
            request.answer.set_exception(outcome)
            return
        self._images.inc(len(part.rows))
        request.scores |= zip(part.rows, outcome, strict=True)
        if len(request.scores) == len(request.asked.pictures):
            request.answer.set_result([request.scores[row] for row in sorted(request.scores)])


def _later(why: str) -> HTTPException:
    """The same may be asked again, after a second."""
    return HTTPException(503, why, {"Retry-After": "1"})


def _host(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def say(text: str) -> None:
    """A line in the log; without anybody who reads it the server goes on."""
    with contextlib.suppress(OSError):
        print(line(f"rewards.serve: {text}"), file=sys.stderr, flush=True)
