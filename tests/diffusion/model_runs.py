"""What a run over a base model of any kind must do."""

from pathlib import Path

from commands.export import main as export
from diffusion import lora
from learner.config import read_config
from learner.run import main
from reports import model_card


def goes_on_to_the_bit(settings: list[str], folder: Path) -> Path:
    """A run's folder, after one that was cut after its first epoch has given the same LoRA file."""
    whole, cut = folder / "whole", folder / "cut"
    assert main([*settings, f"run.dir={whole}"]) == 0
    assert main([*settings, f"run.dir={cut}", "train.epochs=1"]) == 0
    assert main([*settings, f"run.dir={cut}"]) == 0
    one, other = (run / "checkpoints/latest/lora" / lora.DIFFUSERS_FILE for run in (whole, cut))
    assert one.read_bytes() == other.read_bytes()
    return whole


def draws_by_its_card(run: Path, model: str, folder: Path) -> str:
    """The code of the card of the run's export, which has drawn a picture with plain diffusers."""
    assert export([str(run), "--format", "diffusers", "--out", str(folder / "out")]) == 0
    config, _ = read_config(run / "config.yaml", [])
    code = model_card.usage(config, "diffusers", model, str(folder / "out"))
    exec(code.replace("save(", f"save({str(folder)!r} + '/' + "), {})
    assert (folder / "image.png").is_file()
    return code
