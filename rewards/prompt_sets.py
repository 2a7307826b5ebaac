"""Prompt sets by name: short lists that are here, and DrawBench and HPDv2's four styles, which others wrote and which
are read from the HPDv2 dataset on the hub, through the hub client's own cache."""

import json
import re
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "configs" / "prompts"
LISTS = ("animals", "imagenet_classes", "quoted_words")  # files in FOLDER
STYLES = ("photo", "paintings", "anime", "concept-art")
DATASETS = ("zhwang/HPDv2", "ymhao/HPDv2")  # the second is a copy
SIZES = {"drawbench": 200, **dict.fromkeys(STYLES, 800)}  # prompts in each file of the datasets
NAMES = (*LISTS, "drawbench", *(f"hpdv2:{style}" for style in STYLES))


class PromptSetError(ValueError):
    """No set of that name, or one that cannot be read; the message says how to get it."""


class NotFromHub(PromptSetError):
    """The hub did not give a set that there is."""


def is_name(name: str) -> bool:
    """Whether this asks for a set, rather than for a file: misspelt styles of HPDv2 do."""
    return name in NAMES or name.startswith("hpdv2:")


def fetch(name: str) -> list[str]:
    """The prompts of `animals`, `drawbench`, `hpdv2:STYLE+STYLE...`, in their files' order. Raises PromptSetError."""
    if name in LISTS:
        return _read(FOLDER / f"{name}.txt", name)
    files = name.removeprefix("hpdv2:").split("+")
    if name != "drawbench" and not (is_name(name) and set(files) <= set(STYLES) and len(set(files)) == len(files)):
        several = "and several styles at once as hpdv2:photo+paintings"
        raise PromptSetError(f"{name!r} is no prompt set; there are {', '.join(NAMES)}, {several}")
    return [prompt for file in files for prompt in _read(_download(name, file), name)]


def made_up(name: str) -> list[str]:
    """As many prompts as a set of the hub has, to count with."""
    return [f"{file} {i}" for file in name.removeprefix("hpdv2:").split("+") for i in range(SIZES[file])]


def _download(name: str, file: str) -> Path:
    """Cached by the hub's client, which also asks the hub whether there is a newer one unless HF_HUB_OFFLINE is set."""
    from huggingface_hub import hf_hub_download

    reasons = []
    for dataset in DATASETS:
        try:
            return Path(hf_hub_download(dataset, f"benchmark/{file}.json", repo_type="dataset"))
        except Exception as error:  # of the hub's client, or its http library
            reasons.append(f"{dataset}: {type(error).__name__}")
    raise NotFromHub(
        f"{name} is neither in the hub's cache nor to be had from the hub ({', '.join(reasons)}); where there is a "
        f"network: `hf download {DATASETS[0]} benchmark/{file}.json --repo-type dataset --local-dir FOLDER` (from "
        f"https://huggingface.co/datasets/{DATASETS[0]}), then set prompts.path=FOLDER/benchmark/{file}.json; or give "
        "any prompts of yours with prompts.path=YOUR_FILE"
    )


def _read(path: Path, name: str) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
        prompts = json.loads(text) if path.suffix == ".json" else re.findall(r"^[^#\n].*", text, re.MULTILINE)
    except (OSError, ValueError) as error:
        raise PromptSetError(f"{name}: cannot read {path}: {error}; remove it, and it is fetched anew") from error
    if not isinstance(prompts, list) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise PromptSetError(f"{name}: {path} is not the list of prompts that was expected there")
    return prompts
