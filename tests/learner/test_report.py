"""The report: one file, nothing from elsewhere, and what it shows is in the records."""

import re
import shutil
import subprocess

import pytest

from learner import report
from learner.run import main


@pytest.fixture(scope="module")
def run(small_settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert main([*small_settings, "run.runner=inprocess", f"run.dir={folder}"]) == 0
    return folder


def test_it_is_whole_and_needs_nothing_else(run):
    text = (run / "report.html").read_text()
    assert text.count("<svg") == 5 and text.count('src="data:image/png;base64,') == 2
    loaded = re.findall(r'(?:src|href)="([^"]+)"', text)
    assert all(source.startswith(("data:", "#")) for source in loaded)
    assert "<script" not in text
    for word in ("2 of 2", "fixed images", "95 % interval", "Where an epoch", "lora:", "run.resume=never"):
        assert word in text


def test_it_can_be_made_anew_and_of_a_run_that_has_hardly_begun(run, tmp_path, capsys):
    before = (run / "report.html").read_text()
    assert report.main([str(run)]) == 0
    made = re.compile(r"page made [^<]+|id=\"[^\"]+\"|url\(#[^)]+\)|xlink:href=\"[^\"]+\"")
    assert made.sub("", (run / "report.html").read_text()) == made.sub("", before)
    begun = tmp_path / "begun"
    begun.mkdir()
    for name in ("run.json", "config.yaml"):
        shutil.copy(run / name, begun)
    assert report.main([str(begun)]) == 0
    assert "0 of 2" in (begun / "report.html").read_text()
    assert report.main([str(tmp_path / "nothing")]) == 2
    assert "nothing" in capsys.readouterr().err


def test_html_in_a_prompt_or_a_name_is_text(run, tmp_path):
    folder = tmp_path / "<b>run"
    shutil.copytree(run, folder, symlinks=True)
    (folder / "run.json").write_text((folder / "run.json").read_text().replace('"name": "run"', '"name": "<script>x"'))
    assert report.main([str(folder)]) == 0
    text = (folder / "report.html").read_text()
    assert "<script" not in text and "&lt;script&gt;x" in text


@pytest.mark.skipif(not shutil.which("chromium"), reason="Debian's chromium is not installed")
def test_a_browser_draws_it(run, tmp_path):
    picture = tmp_path / "page.png"
    subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
         f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,2000", f"--screenshot={picture}",
         f"file://{run}/report.html"], check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    from PIL import Image

    drawn = Image.open(picture).convert("L").resize((120, 200))
    assert len(set(drawn.getdata())) > 50  # curves, pictures, text: not an empty page
