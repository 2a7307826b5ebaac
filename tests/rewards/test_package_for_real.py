"""The packages' own code in environments built for it, served over HTTP, on random checkpoints in the published
layout: ImageReward's of full size, HPSv2's of fewer layers. Needs a package index, 4 GB of temporary disk and 5 GB of
memory."""

import gzip
import json
import signal
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import inputs
from PIL import Image
from served import ask, command, png, raw, until

from commands.build_package import BPE, build
from rewards import package_worker, registry
from rewards.package_environment import place

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

PROMPTS = ["a cat", "a red cube on a table", "a very long sentence " * 12, "été, 2 dogs!"]
# Run by the isolated interpreter: argv is the worker's file, the model, the checkpoint, and files as JSON.
MAKE = """
import importlib.util, json, sys, types
spec = importlib.util.spec_from_file_location("package_worker", sys.argv[1])
worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)
torch = worker._torch()
files = json.loads(sys.argv[4])
torch.manual_seed(0)
if sys.argv[2] == "imagereward":
    worker._without_init("ImageReward", "ImageReward.models")
    from ImageReward.ImageReward import ImageReward
    from ImageReward.models.BLIP import blip
    kept = blip.BertTokenizer
    blip.BertTokenizer = types.SimpleNamespace(from_pretrained=lambda _: kept.from_pretrained(files["tokenizer"]))
    model = ImageReward(med_config=files["med_config"])
else:
    worker._without_init("hpsv2")
    sys.modules["turtle"] = types.ModuleType("turtle")
    sys.modules["turtle"].forward = None
    from hpsv2.src.open_clip import create_model
    model = create_model("ViT-H-14", None)
with torch.no_grad():  # at their initial values pictures and prompts hardly matter
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and "embedding" not in name:
            weight.normal_(0, weight.shape[1] ** -0.5)
        elif weight.ndim == 1 and name.endswith("bias"):
            weight.normal_(0, 0.02)
state = model.state_dict()
torch.save(state if sys.argv[2] == "imagereward" else {"state_dict": state}, sys.argv[3])
"""


@pytest.fixture
def folder():
    with tempfile.TemporaryDirectory(prefix="packages-") as path:  # pytest keeps tmp_path: this holds gigabytes
        yield Path(path)


def imagereward(folder: Path) -> tuple[dict, dict]:
    """What package and native model take beside the checkpoint. Vocabulary of BERT's size and special tokens."""
    (folder / "med_config.json").write_text(json.dumps(inputs.PUBLISHED_MED_CONFIG))
    special = ["[PAD]", *(f"[unused{i}]" for i in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [chr(c) for c in range(33, 127)]
    known = [*special, *letters, *(f"##{letter}" for letter in letters), "cat", "red", "dog", "##s"]
    words = list(dict.fromkeys(known))
    words += [f"[filler{i}]" for i in range(30522 - len(words))]
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    files = {"med_config": str(folder / "med_config.json"), "tokenizer": str(folder / "tokenizer")}
    return files, files


def hpsv2(folder: Path) -> tuple[dict, dict]:
    """With fewer layers, and the tokenizer's vocabulary from open_clip_torch, for the native model."""
    [packages] = place("hpsv2").glob("lib/python*/site-packages")
    file = packages / "hpsv2/src/open_clip/model_configs/ViT-H-14.json"
    config = json.loads(file.read_text())
    config["vision_cfg"]["layers"] = config["text_cfg"]["layers"] = 4
    file.write_text(json.dumps(config))
    merges = gzip.decompress((packages / "open_clip" / BPE).read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    tokenizer = inputs.write_clip_tokenizer(folder / "tokenizer", merges)
    return {}, {"tokenizer": str(tokenizer), "size": {"vision_layers": 4, "text_layers": 4}}


def pictures() -> torch.Tensor:
    """[4, 3, 256, 320]: not square, so that resizing, cropping and padding show."""
    rng = np.random.default_rng(0)
    small = [Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)) for side in (2, 5, 16, 64)]
    large = [np.asarray(image.resize((320, 256), Image.Resampling.BICUBIC)) for image in small]
    return torch.from_numpy(np.stack(large)).permute(0, 3, 1, 2).float() / 255


@pytest.mark.parametrize("name", ["imagereward", "hpsv2"])
def test_a_package_scores_in_its_own_environment_and_as_the_native_model_does(name, folder, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    python, images, weights = build(name), pictures(), str(folder / "weights.pt")
    files, native_options = {"imagereward": imagereward, "hpsv2": hpsv2}[name](folder)
    make = [str(python), "-I", "-c", MAKE, package_worker.__file__, name, weights, json.dumps(files)]
    subprocess.run(make, check=True, timeout=600)
    rows = (images.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()
    line = [name, "--package", "--weights", weights, "--port", "0"]
    line += [word for file in files.items() for word in ("--option", "=".join(file))]
    with command(*line, cwd=folder, TRIBUTARY_REWARD_TOKEN="secret") as server:
        url = until(server, "http://").split()[2].rstrip(",")
        until(server, "ready")

        def score(body: dict) -> torch.Tensor:
            status, answer = ask(url, body, "secret")
            assert status == 200, answer
            return torch.tensor(answer["scores"])

        together = score(raw(rows, PROMPTS))
        of_files = score({"images": [png(picture) for picture in rows], "prompts": PROMPTS})
        apart = torch.cat([score(raw(rows[i : i + 1], PROMPTS[i : i + 1])) for i in range(4)])
        other = score(raw(rows, PROMPTS[::-1]))
        server.terminate()
        assert server.wait(60) == 128 + signal.SIGTERM
    assert together.shape == (4,) and together.isfinite().all() and together.std() > 1e-3
    assert torch.equal(together, of_files)
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)
    assert (together - other).abs().max() > 1e-3  # prompts matter
    native = registry.load(name, weights, **native_options)
    ours = native(images, PROMPTS)
    print(f"{name}: {together.tolist()} by the package, the native model is off by {(ours - together).abs().max():.1e}")
    torch.testing.assert_close(ours, together, atol=1e-4, rtol=1e-4)
    if name == "hpsv2":  # with the true vocabulary
        tokens = inputs.golden("hpsv2_true_tokens")["tokens"]
        assert native.tokens(inputs.TRICKY)[0].tolist() == tokens.tolist()
