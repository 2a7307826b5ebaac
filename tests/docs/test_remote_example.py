"""docs/remote_rewards.md's judge and client, as a reader runs them; and the options that its table names."""

import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from learner.config import ROOT
from rewards.remote import Options, Remote

PAGE = (ROOT / "docs/remote_rewards.md").read_text(encoding="utf-8")


@pytest.fixture
def examples(tmp_path) -> list[Path]:
    """judge.py, on a port that is free, and client.py."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)
    files = [tmp_path / "judge.py", tmp_path / "client.py"]
    for file, block in zip(files, blocks, strict=True):
        file.write_text(block.replace("8000", str(port)), encoding="utf-8")
    (tmp_path / "port").write_text(str(port))
    return files


def test_the_judge_and_the_client_of_the_page_run(examples, tmp_path):
    server, client = examples
    url = f"http://127.0.0.1:{(tmp_path / 'port').read_text()}"
    process = subprocess.Popen([sys.executable, server], stderr=subprocess.DEVNULL)
    try:
        reward = Remote(urls=url, seconds=60, batch=1)
        images = torch.stack([torch.full((3, 8, 8), shade) for shade in (0.0, 0.2, 1.0)])
        assert reward(images, ["a dog"] * 3).tolist() == pytest.approx([0, 0.2, 1])  # which waits for the judge
        reward.check_health()
        for _ in range(2):  # a fault of the request is no fault of the judge
            with pytest.raises(ValueError, match=r"422 .*KeyError"):
                Remote(urls=url, format="raw")(images, ["a dog"] * 3)
        Image.new("RGB", (4, 4), (51, 51, 51)).save(tmp_path / "grey.png")
        command = [sys.executable, client, url, "a dog", str(tmp_path / "grey.png")]
        said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
        assert said.split()[1] == "0.2"
    finally:
        process.kill()
        process.wait(30)
    assert all(len(file.read_text().splitlines()) < 35 for file in examples)


def test_the_page_has_every_option_with_its_default():
    rows = dict(re.findall(r"^\| `(\w+)` \|([^|]*)\|", PAGE, re.M))
    assert set(rows) == set(Options.model_fields)
    for name, field in Options.model_fields.items():
        default = "" if field.is_required() or field.default is None else field.default
        said = {"all": "", "false": "False"}.get(rows[name].strip(), rows[name].strip())
        assert said == (f"{default:g}" if isinstance(default, float) else str(default)), name
