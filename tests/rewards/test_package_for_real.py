"""The packages' own code in environments built for it, on random checkpoints of full size in the published layout.

Needs a package index, some 6 GB of disk in the temporary directory and 9 GB of memory.
"""

import gzip
import json
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from commands.build_package import BPE, build
from rewards import package_worker, registry
from rewards.package import PackageReward

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

PROMPTS = ["a cat", "a red cube on a table", "a very long sentence " * 12, "été, 2 dogs!"]
MED_CONFIG = {
    "architectures": ["BertModel"], "attention_probs_dropout_prob": 0.1, "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1, "hidden_size": 768, "initializer_range": 0.02, "intermediate_size": 3072,
    "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "model_type": "bert", "num_attention_heads": 12,
    "num_hidden_layers": 12, "pad_token_id": 0, "add_type_embeddings": False, "vocab_size": 30524,
    "encoder_width": 1024, "add_cross_attention": True,
}  # fmt: skip

# Run by the isolated interpreter: argv is the worker's file, the model, the checkpoint, and files as JSON.
MAKE = """
import importlib.util, json, sys, types
spec = importlib.util.spec_from_file_location("package_worker", sys.argv[1])
worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)
torch = worker._torch(2)
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
print(len(state))
"""


@pytest.fixture(scope="module")
def folder():
    """Not tmp_path, which pytest keeps: this holds gigabytes."""
    path = Path(tempfile.mkdtemp(prefix="packages-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture(params=["imagereward", "hpsv2"])
def made(request, folder):
    """(name, weights, options): an environment built from its lock file, and a checkpoint beside its companions."""
    name = request.param
    place = folder / name
    python = build(name, place / "environment")
    files = {}
    if name == "imagereward":
        (place / "med_config.json").write_text(json.dumps(MED_CONFIG))
        word_pieces(place / "tokenizer")
        files = {"med_config": str(place / "med_config.json"), "tokenizer": str(place / "tokenizer")}
    weights = place / ("ImageReward.pt" if name == "imagereward" else "HPS_v2.1_compressed.pt")
    command = [str(python), "-I", "-c", MAKE, package_worker.__file__, name, str(weights), json.dumps(files)]
    keys = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600).stdout.split()[-1]
    assert int(keys) == {"imagereward": 625, "hpsv2": 686}[name]  # as published
    yield name, weights, {"python": str(python), **files, **({"version": "v2.1"} if name == "hpsv2" else {})}
    shutil.rmtree(place)  # one at a time


def word_pieces(folder: Path) -> None:
    """A vocabulary of BERT's size and special tokens, without its words."""
    special = ["[PAD]", *(f"[unused{i}]" for i in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [chr(c) for c in range(33, 127)]
    known = special + letters + [f"##{letter}" for letter in letters] + ["cat", "red", "table", "dog", "##s"]
    words = list(dict.fromkeys(known))
    words += [f"[filler{i}]" for i in range(30522 - len(words))]
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")


def clip_tokenizer(environment: Path, folder: Path) -> Path:
    """transformers' files of the tokenizer that hpsv2 reads from open_clip_torch's vocabulary."""
    [source] = environment.glob(f"lib/python*/site-packages/open_clip/{BPE}")
    merges = gzip.decompress(source.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(c) for c in shown] + [chr(256 + n) for n in range(256 - len(shown))]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    return folder


def pictures() -> torch.Tensor:
    """[4, 3, 256, 320]: not square, so that resizing, cropping and padding show."""
    rng = np.random.default_rng(0)
    small = [Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)) for side in (2, 5, 16, 64)]
    large = [np.asarray(image.resize((320, 256), Image.Resampling.BICUBIC)) for image in small]
    return torch.from_numpy(np.stack(large)).permute(0, 3, 1, 2).float() / 255


def native(name: str, weights: Path, options: dict[str, str]) -> registry.Reward:
    """COMPARISON WITH THE NATIVE MODELS: the reward of the same name that needs no package, on the same checkpoint."""
    if name == "hpsv2":
        tokenizer = clip_tokenizer(Path(options["python"]).parents[1], weights.parent / "tokenizer")
        own = {"version": "v2.1", "tokenizer": str(tokenizer)}
    else:
        own = {key: options[key] for key in ("tokenizer", "med_config")}
    try:
        return registry.load(name, weights=str(weights), **own)
    except (registry.UnknownReward, ValueError) as error:
        if name in registry.NAMES:
            raise
        pytest.skip(f"the package scores; no native {name} to compare with yet: {error}")


def test_a_package_scores_in_its_own_environment_and_as_the_native_model_does(made):
    name, weights, options = made
    images = pictures()
    reward = PackageReward(name, str(weights), **options)
    try:
        together = reward(images, PROMPTS)
        apart = torch.cat([reward(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(4)])
        other = reward(images, PROMPTS[::-1])
    finally:
        reward.close()
    assert together.shape == (4,) and together.isfinite().all() and together.std() > 1e-3
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)
    assert (together - other).abs().max() > 1e-3  # prompts matter
    ours = native(name, weights, options)(images, PROMPTS).cpu()
    print(f"{name}: {together.tolist()} by the package, the native model is off by {(ours - together).abs().max():.1e}")
    torch.testing.assert_close(ours, together, atol=1e-4, rtol=1e-4)
