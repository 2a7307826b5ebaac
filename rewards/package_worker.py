"""Serves a reward package's own code over HTTP, in the package's own environment: of this project it loads the server
alone (rewards/serving.py, score_request.py). commands/serve.py starts it."""

import importlib.util
import json
import os
import signal
import socket
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

KEPT: list[Any] = []  # a torch library's declarations go with it
TOKEN = "TRIBUTARY_REWARD_TOKEN"

# One call of a scorer: uint8 pictures [H, W, 3] and a prompt each -> as many floats.
Score = Callable[[list[Any], list[str]], list[float]]


def main() -> None:
    """Serve what the first argument says, JSON, on the socket that the second is the number of."""
    for number in (signal.SIGINT, signal.SIGTERM):  # before it serves, and once more when all is answered
        signal.signal(number, lambda number, frame: os._exit(128 + number))
    settings, listener = json.loads(sys.argv[1]), socket.socket(fileno=int(sys.argv[2]))
    _load("score_request")
    serving = _load("serving")
    package = MODELS[settings["name"]]

    def load() -> Any:
        score = package(settings["files"], settings["device"])
        return serving.Served(_refusing(score, serving.Refused), metadata=False, batch=settings["batch"])

    limits = serving.Limits(body=settings["body"])
    service = serving.Service(settings["name"], load, os.environ.get(TOKEN), merge=settings["merge"], limits=limits)
    try:
        service.run(listener)
    except Exception as error:  # files or a device that do not fit: the package may raise anything
        serving.say(f"{settings['name']}: {type(error).__name__}: {error}")
        os._exit(2)


def _load(name: str) -> Any:
    """A module of the server by its path: nothing else of this project can be imported."""
    spec = importlib.util.spec_from_file_location(f"rewards.{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    sys.modules[f"rewards.{name}"] = module
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


def _refusing(score: Score, refused: type[Exception]) -> Callable[..., list[float]]:
    def answer(pictures: list[Any], prompts: list[str], metadata: list[dict[str, Any]]) -> list[float]:
        import torch

        try:
            return score(pictures, prompts)
        except torch.OutOfMemoryError:  # not the pictures' fault
            raise
        except Exception as error:  # the packages' code, and what they call, may raise anything
            raise refused(f"{type(error).__name__}: {error}") from error

    return answer


def image_reward(files: dict[str, str], device: str) -> Score:
    torch = _torch()
    # Its own __init__ modules also import the fine-tuning code and two more scores: diffusers, datasets, CLIP.
    _without_init("ImageReward", "ImageReward.models")
    from ImageReward.ImageReward import ImageReward
    from ImageReward.models.BLIP import blip

    # It asks for "bert-base-uncased" by that name.
    tokenizer = blip.BertTokenizer
    blip.BertTokenizer = types.SimpleNamespace(from_pretrained=lambda _: tokenizer.from_pretrained(files["tokenizer"]))
    model = ImageReward(device=device, med_config=files["med_config"])
    state = torch.load(files["weights"], map_location="cpu", weights_only=True)
    faults = model.load_state_dict(state, strict=False)
    # Not strict, as in the package, but for buffers that torch makes anew alone.
    wrong = [key for key in (*faults.missing_keys, *faults.unexpected_keys) if not key.endswith("position_ids")]
    if wrong:
        raise ValueError(f"{files['weights']} does not fit image-reward's model: {len(wrong)} keys, such as {wrong[0]}")
    model = model.to(device).eval()
    words = {"padding": "max_length", "truncation": True, "max_length": 35, "return_tensors": "pt"}

    def score(images: Any, prompts: list[str]) -> Any:
        text = model.blip.tokenizer(prompts, **words).to(device)
        return model.score_gard(text.input_ids, text.attention_mask, images).squeeze(1)

    return _of_pictures(torch, device, model.preprocess, score)


def hps(files: dict[str, str], device: str) -> Score:
    """The body of hpsv2 1.2.0's `score()`, which reads the weights anew at every call, for a batch."""
    torch = _torch()
    _without_init("hpsv2")  # which imports a progress bar and the benchmark's code
    # A stray import in its factory, which needs Tk.
    sys.modules["turtle"] = types.ModuleType("turtle")
    sys.modules["turtle"].forward = None  # type: ignore[attr-defined]
    from hpsv2.src.open_clip import create_model_and_transforms, get_tokenizer

    # `score()` names a pretrained tag here, which downloads 4 GB only to replace them by the checkpoint.
    options = {"precision": "amp", "device": device, "light_augmentation": True, "output_dict": True}
    model, _, preprocess = create_model_and_transforms("ViT-H-14", None, **options)
    model.load_state_dict(torch.load(files["weights"], map_location="cpu", weights_only=True)["state_dict"])
    model, tokenizer = model.to(device).eval(), get_tokenizer("ViT-H-14")

    def score(images: Any, prompts: list[str]) -> Any:
        with torch.autocast("cuda", enabled=device.startswith("cuda")):
            out = model(images, tokenizer(prompts).to(device))
            return torch.diagonal(out["image_features"] @ out["text_features"].T)

    return _of_pictures(torch, device, preprocess, score)


MODELS: dict[str, Callable[..., Score]] = {"imagereward": image_reward, "hpsv2": hps}


def _torch() -> Any:
    """torch, with torchvision made importable beside a build of it that PyPI's torchvision does not fit."""
    import torch

    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        # A CPU torch cannot load its compiled operators, and its Python code wants these two declared. Its transforms,
        # which is all that is used, are plain torch.
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        KEPT.append(library := torch.library.Library("torchvision", "DEF"))
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401
    return torch


def _without_init(*names: str) -> None:
    """Make a package's modules importable without running its __init__.py."""
    for name in names:
        spec = importlib.util.find_spec(name)
        sys.modules[name] = module = types.ModuleType(name)
        module.__path__ = spec.submodule_search_locations  # type: ignore[union-attr, assignment]


def _of_pictures(torch: Any, device: str, preprocess: Callable[[Any], Any], score: Callable[..., Any]) -> Score:
    from PIL import Image

    def score_pictures(pictures: list[Any], prompts: list[str]) -> list[float]:
        with torch.no_grad():
            images = torch.stack([preprocess(Image.fromarray(picture)) for picture in pictures]).to(device)
            return score(images, prompts).float().cpu().tolist()

    return score_pictures


if __name__ == "__main__":
    main()
