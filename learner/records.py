"""What a run leaves behind in its directory: config, metrics, adapter files and contact sheets."""

from __future__ import annotations

import json
import os
import shutil
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image, ImageDraw

from diffusion.trajectory import Scores
from learner.config import Config, ConfigError

SHEET_COLUMNS = 8
SHEET_IMAGES = 32
GAP, LINE, CAPTION_LINES = 8, 12, 3  # pixels between pictures, pixels a caption line, lines


class RunDirectory:
    """The files of one run. Everything is written aside and renamed, so a reader never sees half a file."""

    def __init__(self, path: Path, config: Config) -> None:
        """
        Raises:
            ConfigError: the directory already holds a run, or cannot be made or written.
        """
        self.path = path
        self.metrics = path / "metrics.jsonl"
        if self.metrics.exists():
            raise ConfigError(f"run.dir: {path} already holds a run; choose another or remove it")
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._replace(path / "config.yaml", lambda f: f.write_text(yaml.safe_dump(config.model_dump(mode="json"))))
        except OSError as error:
            raise ConfigError(f"run.dir: cannot write {path}: {error}") from error

    def append(self, line: dict[str, Any]) -> None:
        """One epoch's line, on disk before this returns. Non-finite numbers become null."""
        clean = {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in line.items()}
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(clean) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def save_latest(self, version: int, save_lora: Callable[[Path], None]) -> Path:
        """Replace checkpoints/latest by the current adapter."""
        folder = self.path / "checkpoints"
        fresh, latest, old = folder / f".new-{version}", folder / "latest", folder / ".old"
        shutil.rmtree(fresh, ignore_errors=True)
        save_lora(fresh / "lora")
        (fresh / "version.json").write_text(json.dumps({"policy_version": version}) + "\n")
        shutil.rmtree(old, ignore_errors=True)
        if latest.exists():
            latest.rename(old)
        fresh.rename(latest)
        shutil.rmtree(old, ignore_errors=True)
        return latest

    def save_sheet(self, name: str, scores: Sequence[Scores]) -> Path:
        """Contact sheet NAME.png of the first evaluation images, each under its prompt and reward."""
        target = self.path / f"{name}.png"
        self._replace(target, lambda f: contact_sheet(scores).save(f, "PNG"))
        return target

    def save_evaluation(self, name: str, scores: Sequence[Scores]) -> None:
        """evaluation/NAME.json: prompt and reward of every fixed image, for paired comparisons."""
        folder = self.path / "evaluation"
        folder.mkdir(exist_ok=True)
        table = {
            "prompt": [prompt for part in scores for prompt in part.chunk.prompts],
            "reward": [float(value) for part in scores for value in part.rewards[:, -1]],
        }
        self._replace(folder / f"{name}.json", lambda f: f.write_text(json.dumps(table) + "\n"))

    @staticmethod
    def _replace(target: Path, write: Callable[[Path], Any]) -> None:
        aside = target.with_name(f".{target.name}.new")
        write(aside)
        aside.replace(target)


def contact_sheet(scores: Sequence[Scores], limit: int = SHEET_IMAGES) -> Image.Image:
    """The first `limit` images in rows of eight, at least 128 pixels wide, reward and prompt beneath."""
    pictures = [image for part in scores for image in part.images][:limit]  # type: ignore[union-attr]
    prompts = [prompt for part in scores for prompt in part.chunk.prompts][:limit]
    values = [float(value) for part in scores for value in part.rewards[:, -1]][:limit]
    side = max(128, min(256, pictures[0].shape[0]))
    width, height = side + GAP, side + GAP + CAPTION_LINES * LINE
    rows = -(-len(pictures) // SHEET_COLUMNS)
    sheet = Image.new("RGB", (SHEET_COLUMNS * width, rows * height), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (picture, prompt, value) in enumerate(zip(pictures, prompts, values, strict=True)):
        x, y = (i % SHEET_COLUMNS) * width + GAP // 2, (i // SHEET_COLUMNS) * height + GAP // 2
        sheet.paste(Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC), (x, y))
        caption = textwrap.wrap(f"{value:.2f}  {prompt}", side // 6, max_lines=CAPTION_LINES, placeholder=" ...")
        for line, text in enumerate(caption):
            pen.text((x, y + side + line * LINE), text, fill="black")
    return sheet
