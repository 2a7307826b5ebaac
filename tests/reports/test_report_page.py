"""The report in a real browser: phone and desktop, light and dark. Nothing overflows, nothing is fetched, no complaint.
A page of our own holds the report in frames as wide as the screens, looks into them, and is printed by chromium."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest
from made_up_run import made_up_run

from commands import report
from reports import html

CHROMIUM = shutil.which("chromium")
WIDTHS = (360, 1280, 1920)  # a phone, a laptop, a projector
LOOK = """<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,">FRAMES<pre></pre><script>
function look(frame) {
  const page = frame.contentDocument, all = selector => [...page.querySelectorAll(selector)];
  const box = element => element.getBoundingClientRect(), wide = frame.clientWidth, overflowing = [];
  for (const open of [false, true]) {
    all("details").forEach(element => element.open = open);
    overflowing.push(page.documentElement.scrollWidth - wide, ...all("body *")
      .filter(element => (!element.closest("svg") || element.tagName == "svg") && element.getClientRects().length)
      .filter(element => box(element).right > wide + 0.5 || box(element).left < -0.5)
      .map(element => element.tagName));
  }
  return {
    overflowing, images: page.images.length, scripts: page.scripts.length, words: page.body.innerText.length,
    broken: [...page.images].filter(image => !image.complete || !image.naturalWidth).length,
    smallest: Math.min(...all("text").map(element => box(element).height)),
    paper: frame.contentWindow.getComputedStyle(page.body).backgroundColor,
    fetched: frame.contentWindow.performance.getEntriesByType("resource").map(entry => entry.name)
      .filter(name => !name.startsWith("data:")),
  };
}
onload = () => {
  document.querySelector("pre").textContent = JSON.stringify([...document.querySelectorAll("iframe")].map(look));
};
</script>"""


def look(folder: Path, pages: list[Path], dark: bool = False) -> tuple[list[dict], str]:
    """What each page looks like at each width, and all that the browser complained of."""
    frame = '<iframe src="{}" style="width: {}px; height: 900px; border: 0"></iframe>'
    frames = "".join(frame.format(page.as_uri(), width) for page in pages for width in WIDTHS)
    (folder / "look.html").write_text(LOOK.replace("FRAMES", frames))
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
        "--disable-background-networking", "--allow-file-access-from-files", f"--user-data-dir={folder / 'profile'}",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--enable-logging=stderr",
        "--window-size=2000,1000", "--timeout=30000", "--dump-dom", (folder / "look.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    seen = re.search(r"<pre>(.*?)</pre>", done.stdout, re.DOTALL)
    return json.loads(unescape(seen[1])), "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """A long run with everything, one that has hardly begun, and one of a model without prompts."""
    folder = tmp_path_factory.mktemp("runs")
    long = made_up_run(folder / "a-run-with-a-long-name-2026-11-21-120000", 60)
    begun = folder / "begun"
    begun.mkdir()
    for name in ("run.json", "config.yaml"):
        shutil.copy(long / name, begun)
    unconditional = made_up_run(folder / "unconditional", 4, ("prompts.path=null",))
    for path in unconditional.glob("evaluation/epoch-*.json"):
        table = json.loads(path.read_text())
        path.write_text(json.dumps(table | {"prompt": [""] * len(table["prompt"])}))
    for run in (long, begun, unconditional):
        assert report.main([str(run)]) == 0
    return {"long": long, "begun": begun, "unconditional": unconditional}


pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not CHROMIUM, reason="Debian's chromium is not installed: the page is not looked at"),
]


@pytest.mark.parametrize("dark", [False, True])
def test_it_reads_on_a_phone_and_on_a_projector(runs, tmp_path, dark):
    seen, complaints = look(tmp_path, [run / html.FILE for run in runs.values()], dark)
    assert complaints == ""
    for i, page in enumerate(seen):
        begun = list(runs)[i // len(WIDTHS)] == "begun"
        assert page["overflowing"] == [0, 0] and page["broken"] == page["scripts"] == 0 and page["fetched"] == []
        assert (page["images"] > 30) != begun and page["words"] > 1000
        assert begun or page["smallest"] > 9  # what is beside an axis can be read
        assert page["paper"] == ("rgb(17, 20, 24)" if dark else "rgb(246, 246, 243)")


def test_these_checks_see_what_is_wrong(tmp_path):
    (tmp_path / "wrong.html").write_text(
        "<!doctype html><link rel=icon href='data:,'><p>narrow</p><div style='width: 500px'>wide</div>"
        "<img src='http://127.0.0.1:9/x.png'><script>console.log('hello')</script>"
    )
    (narrow, *_), complaints = look(tmp_path, [tmp_path / "wrong.html"])
    assert narrow["overflowing"] == [148, "DIV", 148, "DIV"] and narrow["broken"] == narrow["scripts"] == 1
    assert narrow["fetched"] == ["http://127.0.0.1:9/x.png"] and "hello" in complaints
