"""A reward behind HTTP: pictures, prompts and metadata go to a judge at one or more URLs, its scores come back.
docs/remote_rewards.md has the protocol. What is tried again, and what is not, is in `Remote._judge`."""

import base64
import email.utils
import io
import itertools
import json
import math
import os
import threading
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from textwrap import shorten
from typing import Annotated, Any, Literal, NoReturn
from urllib.parse import urlsplit

import numpy as np
import requests
import tenacity
import torch
from PIL import Image
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, FiniteFloat, ValidationError
from torch import Tensor
from urllib3.exceptions import HTTPError, ReadTimeoutError

from diffusion.failures import DeadlineExceeded, ServiceFailed
from rewards import tokens

PROTOCOL = 1
FIRST_PAUSE, MOST_PAUSE = 0.5, 15.0  # seconds at most before the second try of a request, and before any
HEALTH_SECONDS = 5.0
MOST_BYTES = 1 << 20  # of an answer
CHARACTERS = 300  # of what a judge says
LEVEL = 1  # of PNG's compression: photographs hardly get smaller by more, and it would take longer than the judge


class JudgeRefused(ServiceFailed):
    """A judge that is not what, or where, the settings say: no such path, another token, a body that is too large."""


class JudgeSilent(ServiceFailed, DeadlineExceeded):
    """No judge gave scores before the deadline: down, too busy, too slow, or answering with something else."""


class _Again(Exception):
    """A try that failed, and why; another one may not."""


def _listed(urls: Any) -> Any:
    return [urls] if isinstance(urls, str) else urls


def _url(text: str) -> str:
    parts = urlsplit(text)
    if "@" in parts.netloc:
        raise ValueError("a URL with a user name or password; give a token by token_env or token_file")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment or parts.port == 0:
        raise ValueError("expected a URL like http://host:8000")
    return text.rstrip("/")


def _ordered(bounds: list[float]) -> list[float]:
    if bounds[0] >= bounds[1]:
        raise ValueError("expected [low, high], low below high")
    return bounds


Seconds = Annotated[FiniteFloat, Field(gt=0)]


class Options(BaseModel, extra="forbid", strict=True):
    """reward.options of `remote`."""

    urls: Annotated[list[Annotated[str, AfterValidator(_url)]], Field(min_length=1), BeforeValidator(_listed)]
    batch: int = Field(4, ge=1)  # images a request
    in_flight: int = Field(16, ge=1, le=256)  # requests at once, of a reward actor
    format: Literal["png", "raw"] = "png"
    request_seconds: Seconds = 60.0  # of one try
    seconds: Seconds = 300.0  # of one call, all its requests and their tries
    token_env: str = Field(tokens.VARIABLE, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    token_file: str | None = None
    range: Annotated[list[FiniteFloat], Field(min_length=2, max_length=2), AfterValidator(_ordered)] | None = None
    columns: list[str] | None = None  # metadata that the judge needs, and gets; None: it gets all that there is
    inner_states: bool = False  # also predictions at inner states are judged


def read_options(options: dict[str, Any]) -> Options:
    """Raises ValueError, one line, which names the option."""
    try:
        return Options.model_validate(options)
    except ValidationError as error:
        fault = error.errors()[0]
        place, said = ".".join(map(str, ("reward.options", *fault["loc"]))), fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden":
            said = f"remote has no such option; it has {', '.join(Options.model_fields)}"
        elif fault["type"] == "missing":
            said = "remote needs the URL of a judge, or a list of them"
        elif "password" not in said:
            said += f", got {fault['input']!r}"
        raise ValueError(f"{place}: {said}") from error


@dataclass
class _Request:
    """Some of a call's images on their way to a judge, whichever takes them."""

    pixels: np.ndarray  # [b, H, W, 3] uint8
    texts: dict[str, Any]  # prompts, and metadata where there are some
    first: int  # the place in `urls` of the first try
    deadline: float  # of time.monotonic, of the whole call
    over: threading.Event  # nobody waits for the call any more
    number: str = field(default_factory=lambda: uuid.uuid4().hex)  # the same for every try
    tries: int = 0
    pauses: list[float] = field(default_factory=list)  # seconds that each failed try's answer asked to wait
    cause: str = "no answer"  # of the last failed try


class Remote:
    """Scores by a judge behind HTTP. Thread-safe: calls at the same time share the requests in flight."""

    name, differentiable = "remote", False

    def __init__(self, **options: Any) -> None:
        """`options`: those of `Options`. Raises ValueError, which names the one that is wrong."""
        self.options = read_options(options)
        self.image_only = not self.options.inner_states
        self.columns = tuple(self.options.columns or ())
        self.range = tuple(self.options.range) if self.options.range else None
        self._token = tokens.read(self.options.token_env, self.options.token_file)
        self._threads = ThreadPoolExecutor(self.options.in_flight, "remote")
        self._own, self._turn = threading.local(), itertools.count()

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]] | None = None
    ) -> Tensor:
        """images [B, 3, H, W] in [0, 1], B prompts, B dicts -> [B] float32 on the images' device, NaN where the judge
        has null. Raises ValueError where the judge refuses a picture or prompt, JudgeRefused, JudgeSilent."""
        batch, deadline, over = self.options.batch, time.monotonic() + self.options.seconds, threading.Event()
        pixels = images.detach().float().clamp(0, 1).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        rows = [{key: row[key] for key in self.columns or row} for row in metadata or ()]
        given = {"prompts": list(prompts)} | ({"metadata": rows} if any(rows) else {})
        if any(len(texts) != len(pixels) for texts in given.values()):
            raise ValueError(f"expected as many prompts and metadata as the {len(pixels)} images")
        pieces = [slice(start, start + batch) for start in range(0, len(pixels), batch)]
        asked = [
            _Request(pixels[at], {key: texts[at] for key, texts in given.items()}, next(self._turn), deadline, over)
            for at in pieces
        ]
        answers = [self._threads.submit(self._scores, request) for request in asked]
        try:
            done, _ = wait(answers, max(0.0, deadline - time.monotonic()), FIRST_EXCEPTION)
            for answer in (answer for answer in answers if answer in done):
                answer.result(0)  # raises what its request did
            for request, answer in zip(asked, answers, strict=True):
                if answer not in done:
                    self._give_up(request)
        finally:
            over.set()
            for answer in answers:
                answer.cancel()
        scores = [score for answer in answers for score in answer.result(0)]
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    def check_health(self) -> None:
        """Asks every judge whether it can score. Raises JudgeRefused, which names all that cannot and the remedies."""
        asked = {self._threads.submit(self._fault, url): url for url in self.options.urls}
        done, _ = wait(asked, 2 * HEALTH_SECONDS)
        found = [ask.result(0) if ask in done else f"{url} does not answer" for ask, url in asked.items()]
        faults = [fault for fault in found if fault]
        if faults:
            raise JudgeRefused("; ".join(f"reward.options.urls: {fault}" for fault in faults))

    def _scores(self, request: _Request) -> list[float]:
        """Those of one request, tried again and again until the deadline. Raises as `__call__`."""
        body = self._body(request)
        backoff = tenacity.wait_random_exponential(multiplier=FIRST_PAUSE, max=MOST_PAUSE)
        again = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_Again),
            wait=lambda state: self._pause(request, backoff(state)),
            stop=tenacity.stop_any(
                tenacity.stop_before_delay(max(0.0, request.deadline - time.monotonic())),
                tenacity.stop_when_event_set(request.over),
            ),
            sleep=tenacity.sleep_using_event(request.over),
            reraise=True,
        )
        try:
            return again(self._try, request, body)
        except _Again:
            self._give_up(request)

    def _pause(self, request: _Request, backoff: float) -> float:
        """Seconds before the next try: none while there is a judge that has not failed in this round."""
        judges = len(self.options.urls)
        return 0.0 if request.tries % judges else max(backoff, min(request.pauses[-judges:]))

    def _give_up(self, request: _Request) -> NoReturn:
        urls, seconds = ", ".join(self.options.urls), self.options.seconds
        raise JudgeSilent(
            f"reward remote: no scores from {urls} for {len(request.pixels)} images within reward.options.seconds="
            f"{seconds:g} s, {request.tries} tries; the last: {request.cause}; see that the judge is up and quick "
            f"enough (GET {self.options.urls[0]}/health), or raise reward.options.seconds"
        )

    def _try(self, request: _Request, body: bytes) -> list[float]:
        url = self.options.urls[(request.first + request.tries) % len(self.options.urls)]
        request.tries += 1
        request.pauses.append(0.0)
        try:
            return self._judge(request, url, body)
        except _Again as error:
            request.cause = f"{url}: {error}"
            raise

    def _judge(self, request: _Request, url: str, body: bytes) -> list[float]:
        """One try at one judge. Raises _Again for what may pass, ValueError where this request is wrong, JudgeRefused
        where every request would be."""
        seconds = min(self.options.request_seconds, request.deadline - time.monotonic())
        headers = {"Content-Type": "application/json", "X-Request-Id": request.number}
        response, text = self._ask("POST", f"{url}/score", seconds, data=body, headers=headers)
        status, said = response.status_code, self._said(response, text)
        if status == 200:
            return self._read(text, len(request.pixels))
        if status == 429 or status >= 500:
            request.pauses[-1] = _retry_after(response.headers.get("Retry-After", ""))
            asks = f" (asks to wait {request.pauses[-1]:g} s)" if request.pauses[-1] else ""
            raise _Again(f"{said}{asks}")
        if status in (400, 422):
            raise ValueError(f"the judge at {url} refuses: {said}")
        raise JudgeRefused(f"reward remote: {url}: {said}; {self._remedy(status)}")

    def _ask(self, verb: str, url: str, seconds: float, **what: Any) -> tuple[requests.Response, bytes]:
        """The answer and its body. Raises _Again where there is none, or none in time."""
        end = time.monotonic() + seconds
        if seconds <= 0:
            raise _Again("no time left")
        body, once = bytearray(), {"timeout": seconds, "stream": True, "allow_redirects": False}  # the token stays
        try:
            with self._session.request(verb, url, **once, **what) as response:
                while piece := response.raw.read1(1 << 14):  # what is there: `iter_content` would wait for all of it
                    body += piece
                    if len(body) > MOST_BYTES:
                        raise _Again(f"an answer of more than {MOST_BYTES} bytes")
                    if time.monotonic() > end:
                        raise requests.Timeout
                return response, bytes(body)
        except (requests.Timeout, ReadTimeoutError) as error:
            raise _Again(f"no whole answer within {seconds:.3g} s") from error
        except (requests.RequestException, HTTPError) as error:
            raise _Again(_innermost(error)) from error

    @property
    def _session(self) -> requests.Session:
        """This thread's. Of the environment only the certificates count: a proxy would see the token, and of ~/.netrc
        requests would make another one."""
        if not hasattr(self._own, "session"):
            self._own.session = session = requests.Session()
            session.trust_env = False
            session.verify = os.environ.get("REQUESTS_CA_BUNDLE") or True
            session.headers.update({"Accept-Encoding": "identity", "User-Agent": "tributary"})
            if self._token:
                session.headers["Authorization"] = f"Bearer {self._token}"
        return self._own.session

    def _body(self, request: _Request) -> bytes:
        if self.options.format == "raw":
            shape = list(request.pixels.shape)
            pictures: dict[str, Any] = {"pixels": _base64(request.pixels.tobytes()), "shape": shape}
        else:
            pictures = {"images": [_base64(_png(picture)) for picture in request.pixels]}
        return json.dumps(pictures | request.texts, allow_nan=False).encode()

    def _read(self, text: bytes, count: int) -> list[float]:
        """The scores in a judge's answer. Raises _Again for garbage."""
        try:
            answer = json.loads(text, parse_constant=lambda word: word)  # NaN is no JSON
            scores = answer["scores"]
        except (ValueError, RecursionError, KeyError, TypeError):
            raise _Again(f"an answer without scores: {self._short(text)}") from None
        if not isinstance(scores, list) or len(scores) != count:
            found = f"{len(scores)} scores" if isinstance(scores, list) else type(scores).__name__
            raise _Again(f"{found} for {count} images")
        low, high = self.range or (-float(np.finfo(np.float32).max), float(np.finfo(np.float32).max))
        for score in scores:
            number = isinstance(score, int | float) and not isinstance(score, bool)
            if score is not None and not (number and low <= score <= high):
                raise _Again(f"a score of {self._short(repr(score).encode())}, outside [{low:g}, {high:g}]")
        return [math.nan if score is None else float(score) for score in scores]

    def _fault(self, url: str) -> str | None:
        """What is wrong with the judge at `url`, and the remedy."""
        try:
            response, text = self._ask("GET", f"{url}/health", HEALTH_SECONDS)
        except _Again as error:
            return f"{url} does not answer ({error}); start the judge there, or name where it is"
        status = response.status_code
        if status in (429, 503):
            return f"{url} is not ready ({self._said(response, text)}); wait until GET {url}/health answers 200"
        if status != 200:
            return f"{url}/health: {self._said(response, text)}; {self._remedy(status)}"
        try:
            spoken = json.loads(text)["protocol"]
        except (ValueError, RecursionError, KeyError, TypeError):
            return f"{url}/health answers without a protocol: {self._short(text)}; {self._remedy(404)}"
        return None if spoken == PROTOCOL else f"{url} speaks protocol {spoken!r:.20}, not {PROTOCOL}"

    def _remedy(self, status: int) -> str:
        if status in (401, 403):
            place = self.options.token_file or f"the variable {self.options.token_env}"
            sent = f"the token of {place} is not its own" if self._token else f"no token was sent: {place} is not set"
            return f"{sent}; put the judge's token there (reward.options.token_env, token_file)"
        if status == 413:
            return "set a smaller reward.options.batch, or raise the judge's limit"
        if 300 <= status < 400:
            return (
                "redirects are not followed, the token must not travel; name the judge's own URL in reward.options.urls"
            )
        return "reward.options.urls names the URL below which /score and /health are (docs/remote_rewards.md)"

    def _said(self, response: requests.Response, text: bytes) -> str:
        """Status, and what the judge has to say."""
        try:
            text = str(json.loads(text)["error"]).encode()
        except (ValueError, RecursionError, KeyError, TypeError):
            text = b"" if b"<html" in text.lower() else text
        words = self._short(text)
        return f"{response.status_code} {response.reason or ''}".strip() + (f": {words}" if words else "")

    def _short(self, text: bytes) -> str:
        """One line, without the token: a judge may send back what it was sent."""
        words = text[: 10 * CHARACTERS].decode(errors="replace")
        words = words.replace(self._token, "[token]") if self._token else words
        return shorten("".join(each if each.isprintable() else " " for each in words), CHARACTERS, placeholder=" ...")


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _png(picture: np.ndarray) -> bytes:
    Image.fromarray(picture).save(file := io.BytesIO(), "PNG", compress_level=LEVEL)
    return file.getvalue()


def _innermost(error: BaseException) -> str:
    """The reason at the root of what the HTTP libraries wrap around it."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    return f"{type(error).__name__}: {shorten(str(error), CHARACTERS)}".rstrip(": ")


def _retry_after(text: str) -> float:
    """Seconds, of a number of them or a date; 0 where it is neither."""
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
        except ValueError:
            return 0.0
    return seconds if 0 < seconds < math.inf else 0.0
