"""The report in a real browser: phone and desktop, light and dark. Nothing overflows, nothing is fetched, no complaint.

Debian's chromium is spoken to over two pipes (its DevTools protocol): no package is needed for that.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import io
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_up_run import made_up_run
from PIL import Image

from commands import report
from reports import html

CHROMIUM = shutil.which("chromium")
SECONDS = 60  # for an answer
# A phone zooms out to fit what is too wide, so innerWidth is no measure: what there is to read is the page's own width.
OVERFLOWING = """
[...document.querySelectorAll("body *")]
  .filter(e => !e.closest("svg") || e.tagName == "svg")
  .filter(e => e.getClientRects().length)
  .filter(e => e.getBoundingClientRect().right > WIDTH + 0.5 || e.getBoundingClientRect().left < -0.5)
  .map(e => e.tagName + "." + e.getAttribute("class") + ": " + e.textContent.trim().slice(0, 40))
"""


class Browser:
    """One page of a headless chromium. `events` are all that it has said unasked."""

    def __init__(self, profile: Path) -> None:
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()
        command = [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
            "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank",
        ]  # fmt: skip

        def onto_3_and_4() -> None:  # where chromium looks for them
            high = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (to_browser, from_browser)]  # they may be 3 and 4
            for number, end in zip((3, 4), high, strict=True):
                os.dup2(end, number)

        self._process = subprocess.Popen(
            command, preexec_fn=onto_3_and_4, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )  # fmt: skip
        os.close(to_browser)
        os.close(from_browser)
        self._buffer, self._number, self._session = b"", 0, None
        self.events: list[dict[str, Any]] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **given: Any) -> dict[str, Any]:
        """
        Raises:
            RuntimeError: the browser refuses.
            TimeoutError: it does not answer.
        """
        self._number += 1
        session = {"sessionId": self._session} if self._session else {}
        message = {"id": self._number, "method": method, "params": given, **session}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._message()
            if answer.get("id") != self._number:
                self.events.append(answer)
            elif "error" in answer:
                raise RuntimeError(f"{method}: {answer['error']}")
            else:
                return answer["result"]

    def wait_for(self, event: str) -> None:
        while not any(one.get("method") == event for one in self.events):
            self.events.append(self._message())

    def value(self, expression: str) -> Any:
        """Of a JavaScript expression in the page."""
        found = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def show(self, url: str, width: int, dark: bool, height: int = 900) -> None:
        """Open a page as on a screen of that width, in CSS pixels; the events are then its own alone."""
        phone = width < 600
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", media="screen", features=[scheme])
        self.events.clear()
        self.ask("Page.navigate", url=url)
        self.wait_for("Page.loadEventFired")

    def overflowing(self, width: int) -> list[str]:
        """Elements that reach out of a page of that width."""
        return self.value(OVERFLOWING.replace("WIDTH", str(width)))

    def screenshot(self, path: Path) -> Image.Image:
        """Of the whole page."""
        found = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        content = base64.b64decode(found["data"])
        path.write_bytes(content)
        return Image.open(io.BytesIO(content)).convert("RGB")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self._write)
        self._process.kill()
        self._process.wait(SECONDS)
        os.close(self._read)

    def _message(self) -> dict[str, Any]:
        deadline = time.monotonic() + SECONDS
        while b"\0" not in self._buffer:
            if not select.select([self._read], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError(f"no answer in {SECONDS} s")
            content = os.read(self._read, 1 << 20)
            if not content:
                raise RuntimeError("chromium is gone")
            self._buffer += content
        message, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(message)


def said(browser: Browser) -> list[str]:
    """Errors, warnings and whatever else the page wrote to the console."""
    names = "Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled"
    return [json.dumps(event["params"]) for event in browser.events if event.get("method") in names]


def fetched(browser: Browser) -> list[str]:
    """Addresses that the page asked for, but for what is in it and its own file."""
    requests = [event["params"] for event in browser.events if event.get("method") == "Network.requestWillBeSent"]
    addresses = [request["request"]["url"] for request in requests]
    return [address for address in addresses if not address.startswith(("data:", "file:"))]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """A long run with everything, one that has hardly begun, and one of a model without prompts."""
    folder = tmp_path_factory.mktemp("runs")
    found = {"long": made_up_run(folder / "a-run-with-a-long-name-2026-11-21-120000", 60)}
    found["begun"] = folder / "begun"
    found["begun"].mkdir()
    for name in ("run.json", "config.yaml"):
        shutil.copy(found["long"] / name, found["begun"])
    found["unconditional"] = made_up_run(folder / "unconditional", 4, ("prompts.path=null",))
    for path in found["unconditional"].glob("evaluation/epoch-*.json"):
        table = json.loads(path.read_text())
        path.write_text(json.dumps(table | {"prompt": [""] * len(table["prompt"])}))
    for run in found.values():
        assert report.main([str(run)]) == 0
    return found


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="Debian's chromium is not installed: the page is not looked at"),
]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280, 1920])
@pytest.mark.parametrize("which", ["long", "begun", "unconditional"])
def test_it_reads_on_a_phone_and_on_a_projector(browser, runs, tmp_path, which, width, scheme):
    browser.show((runs[which] / html.FILE).as_uri(), width, scheme == "dark")
    for closed in (True, False):
        if not closed:
            browser.value("document.querySelectorAll('details').forEach(one => one.open = true)")
        assert browser.value("[document.documentElement.scrollWidth, innerWidth]") == [width, width]
        assert browser.overflowing(width) == []
    broken = "[...document.images].filter(one => !one.complete || !one.naturalWidth).length"
    assert browser.value(broken) == 0
    assert (browser.value("document.images.length") > 30) == (which != "begun")
    assert browser.value("document.scripts.length") == 0
    small = "[...document.querySelectorAll('text')].map(one => one.getBoundingClientRect().height)"
    assert all(height > 9 for height in browser.value(small))  # what is beside an axis can be read
    picture = browser.screenshot(tmp_path / f"{which}-{width}-{scheme}.png")
    assert picture.width == width
    middle = np.median(np.asarray(picture)[::4, ::4])
    assert middle < 60 if scheme == "dark" else middle > 200
    assert len(picture.getcolors(1 << 24)) > 50  # text, lines, pictures: not an empty page
    assert said(browser) == [] and fetched(browser) == []


def test_these_checks_see_what_is_wrong(browser, tmp_path):
    page = tmp_path / "wrong.html"
    page.write_text(
        "<!doctype html><meta name=viewport content='width=device-width'><link rel=icon href='data:,'>"
        "<p>narrow</p><div style='width: 500px'>wide</div><img src='http://127.0.0.1:9/x.png'>"
        "<script>console.log('hello')</script>"
    )
    browser.show(page.as_uri(), 360, dark=False)
    assert browser.value("document.documentElement.scrollWidth") > 360
    assert [one.split(":")[0] for one in browser.overflowing(360)] == ["DIV.null"]
    assert any("hello" in one for one in said(browser)) and fetched(browser) == ["http://127.0.0.1:9/x.png"]
    with_policy = tmp_path / "policy.html"
    found = "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; img-src data:\">"
    with_policy.write_text(page.read_text().replace("<p>", f"{found}<p>"))
    browser.show(with_policy.as_uri(), 360, dark=False)
    assert any("Content Security Policy" in one for one in said(browser)) and not any(
        "hello" in one for one in said(browser)
    )
