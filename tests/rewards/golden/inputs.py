"""What recipes and tests feed to the two implementations: from seeds by numpy alone, so that no file need hold it."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent

# Tiny models, in the published layouts.
IMAGEREWARD_VISION = {"width": 32, "layers": 2, "heads": 2, "patch": 16, "image": 32}
MED_CONFIG = {
    "vocab_size": 40, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 36, "hidden_act": "gelu", "layer_norm_eps": 1e-12, "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1, "pad_token_id": 0, "type_vocab_size": 2, "encoder_width": 32,
    "add_cross_attention": True, "model_type": "bert",
}  # fmt: skip
PUBLISHED_MED_CONFIG = {
    **MED_CONFIG, "vocab_size": 30524, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "max_position_embeddings": 512, "encoder_width": 768,
}  # fmt: skip
HPS_SIZE = {
    "embedding": 16, "image": 28, "patch": 14, "vision_width": 32, "vision_layers": 2, "vision_heads": 2,
    "text_width": 24, "text_layers": 2, "text_heads": 2, "context": 77,
}  # fmt: skip
PICKSCORE_SEED, CLIP_SCORE_SEED = 8, 210  # with cosines above 0, but for one reported picture of the second
# PickScore's config.json, in what is not transformers' default.
PUBLISHED_PICKSCORE = {
    "projection_dim": 1024,
    "text_config": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "hidden_act": "gelu", "projection_dim": 1024, "bos_token_id": 0, "eos_token_id": 2,
    },
    "vision_config": {
        "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16,
        "patch_size": 14, "hidden_act": "gelu", "projection_dim": 1024,
    },
}  # fmt: skip
PUBLISHED_CLIP = {  # OpenAI's ViT-L/14, likewise
    "projection_dim": 768,
    "text_config": {
        "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "projection_dim": 768,
        "bos_token_id": 0, "eos_token_id": 2,
    },
    "vision_config": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "patch_size": 14, "projection_dim": 768,
    },
}  # fmt: skip
AESTHETIC_SIZE = {"embedding": 16, "image": 28, "patch": 14, "width": 128, "layers": 2}  # CLIP's heads are 64 wide

PROMPTS = ["A red Bird, on the sea!", "the the cat sings"]
TRICKY = [
    "A Photo of a CAT", "the cat's in the sea; it'll sing...", "", "   the \n\t sea  ", "don't  STOP!!! 2024, 3/4",
    "cat &amp; bird &lt;3 &quot;sea&quot;", "cat &amp;amp; bird", "<b>cat</b> &amp; bird", "a_b-c @home #1 100%",
    "l\u2019\u00c9t\u00e9 \u201cthe sea\u201d \u2014 na\u00efve", "caf\u00e9 &lsquo;cat&rsquo;",
    "\ufb01ne \ufb02ow o\ufb03ce \u0132sel \u0149 \ufb05", "\uff23\uff21\uff34\u3000\uff01 \uff76\uff9e",
    "cat\ufeff\x07 \x1b[31mred\x1b[0m bird", "e\u0301 cafe\u0301 \u00c5 \u212b", "\u65e5\u672c\u8a9e \u4e2d\u6587",
    "\u0440\u0443\u0441\u0441\u043a\u0438\u0439 \U0001f408", "\u039f\u0394\u039f\u03a3 \u0130stanbul",
    "the cat sings in the sea " * 20, "x" * 200, "&eacute;&nbsp;&hellip; &#39;cat&#39; &notanentity;",
    "cat\x85sea\x81", "a <|endoftext|> cat", "a cat <END_OF_TEXT> sea", "cat\u200bsea\xa0\xad \u2028 sea",
]  # fmt: skip
REPORTED = ["A Photo of a CAT", "the cat's in the sea; it'll sing...", "", "the cat sings in the sea " * 20, "red bird"]
WORDS = """
    [PAD] [UNK] [CLS] [SEP] [MASK] a the red blue bird cat sea sings on in of photo , ! . ' s t it ll c ##at ##s
    ##ing be 3 & ; - cafe stop
""".split()  # noqa: SIM905
MERGES = [
    "t h", "th e</w>", "c a", "ca t</w>", "i n", "in g", "ing s</w>", "i n</w>", "s e", "se a</w>", "r e", "re d</w>",
    "b i", "bi r", "bir d</w>", ". .", "c a</w>", "! !", "!! !</w>",
]  # fmt: skip


def rng(*key: object) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(repr(key).encode()))


def state(shapes: Mapping[str, Iterable[int]], seed: int) -> dict[str, np.ndarray]:
    """Random weights by key, float64 but exact in float32: layer norms about 1, the rest scaled so that values stay of
    order one.
    """
    made = {}
    for key, shape in shapes.items():
        shape = tuple(shape)
        if key.endswith("position_ids"):
            made[key] = np.arange(shape[-1], dtype=np.float64)[None]
            continue
        draw = rng(seed, key).standard_normal(shape)
        if re.search(r"(norm\w*|ln_\w+|LayerNorm)\.weight$", key):
            made[key] = 1 + 0.2 * draw
        elif len(shape) >= 2 and "embed" not in key:
            made[key] = draw / np.sqrt(np.prod(shape[1:]))
        else:
            made[key] = 0.3 * draw
    return {key: value.astype(np.float32).astype(np.float64) for key, value in made.items()}


def pixels(side: int, batch: int = 2) -> np.ndarray:
    """What a model sees after its preprocessing, [B, 3, S, S] float64."""
    return rng("pixels", side).standard_normal((batch, 3, side, side))


def pictures() -> list[np.ndarray]:
    """8-bit pictures [H, W, 3] of several shapes, small and large, with edges and noise."""
    made = []
    for height, width in ((61, 90), (101, 37), (20, 33), (64, 64), (17, 11)):
        draw = rng("picture", height, width)
        y, x = np.mgrid[:height, :width]
        waves = [np.sin(x * a + y * b) for a, b in draw.uniform(-0.7, 0.7, (3, 2))]
        made.append(np.clip(127 + 90 * np.stack(waves, -1) + 30 * draw.standard_normal((height, width, 3)), 0, 255))
    return [picture.round().astype(np.uint8) for picture in made]


def byte_letters() -> list[str]:
    """The letters that byte-level BPE writes bytes with, in vocabulary order."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in plain] + [chr(256 + i) for i in range(256 - len(plain))]


def bpe_vocabulary(begin: str, end: str, merges: Iterable[str] = MERGES) -> dict[str, int]:
    letters = byte_letters()
    words = [
        *letters,
        *(letter + "</w>" for letter in letters),
        *(merge.replace(" ", "") for merge in merges),
        begin,
        end,
    ]
    return {word: index for index, word in enumerate(words)}


def write_bpe(file: Path) -> Path:
    """MERGES as OpenCLIP's tokenizer reads them: gzip, a line to skip, no empty line."""
    file.write_bytes(gzip.compress("\n".join(["#version", *MERGES]).encode()))
    return file


def write_clip_tokenizer(folder: Path, merges: Iterable[str] = MERGES) -> Path:
    """As transformers' tokenizer reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(bpe_vocabulary("<|startoftext|>", "<|endoftext|>", merges)))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    return folder


def tiny_clip(activation: str) -> dict:
    """transformers' configuration of a CLIP of HPS_SIZE, with the end of texts that published ones name."""
    both = {"hidden_act": activation, "projection_dim": HPS_SIZE["embedding"], "num_hidden_layers": 2}
    towers = {}
    for tower in ("text", "vision"):
        width, heads = HPS_SIZE[f"{tower}_width"], HPS_SIZE[f"{tower}_heads"]
        sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": heads}
        towers[f"{tower}_config"] = both | sizes
    towers["text_config"] |= {
        "vocab_size": len(bpe_vocabulary("<start>", "<end>")),
        "bos_token_id": 0,
        "eos_token_id": 2,
    }
    towers["vision_config"] |= {"image_size": HPS_SIZE["image"], "patch_size": HPS_SIZE["patch"]}
    return towers | {"projection_dim": HPS_SIZE["embedding"]}


def write_bert_tokenizer(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return folder


def templates(shapes: Mapping[str, Iterable[int]]) -> dict[str, list]:
    """Key names and shapes with a layer's number left out: {"...blocks.#.norm1.weight": [24, [1024]]}."""
    made: dict[str, list] = {}
    for key, shape in shapes.items():
        template = re.sub(r"\b(blocks|layer|resblocks|encoder\.layers)\.\d+\.", r"\1.#.", key)
        count, known = made.get(template, (0, list(shape)))
        assert known == list(shape), key
        made[template] = [count + 1, known]
    return dict(sorted(made.items()))


def expand(made: Mapping[str, list]) -> dict[str, tuple[int, ...]]:
    """The opposite of `templates`."""
    return {
        template.replace("#", str(index)): tuple(shape)
        for template, (count, shape) in made.items()
        for index in range(count)
    }


def published_keys(name: str) -> dict[str, tuple[int, ...]]:
    return expand(json.loads((HERE / f"{name}_keys.json").read_text()))


def write_keys(name: str, shapes: Mapping[str, Iterable[int]]) -> None:
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in templates(shapes).items()]
    (HERE / f"{name}_keys.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def write(name: str, **arrays: object) -> None:
    file = HERE / f"{name}.npz"
    np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    print(f"{file.name}: {file.stat().st_size} bytes")


def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(HERE / f"{name}.npz") as held:
        return dict(held)
