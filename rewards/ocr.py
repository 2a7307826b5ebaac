"""Text in pictures: what is read in one against what its prompt asks for, 1 - min(edit distance, n) / n with n the
length of the text asked for, as in Flow-GRPO (arXiv 2505.05470, visual text rendering). Case and white space do not
count. Read by PP-OCRv4 as rapidocr-onnxruntime carries it: an extra, `pip install -e '.[ocr]'`.
"""

import os
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rewards.contract import Columns
from rewards.registry import UnknownReward

COLUMN = "text"  # of the prompt file
# Words are looked for in a picture enlarged until its shorter side has the second, above the first the third. In small
# ones more is read so than at the reader's own 736 (of 120 words at 64 pixels 103, not 100), in a fifth of the time.
SIDES = 256, 320, 736
# No single quotes: they are apostrophes too ('90s, the boys' club). Nor a straight one after a digit or letter: 5".
QUOTED = re.compile(r'(?<![0-9A-Za-z])"([^"]+)"|“([^“”]+)”|„([^„“”]+)[“”]|«([^«»]+)»|「([^「」]+)」')
SAME = str.maketrans("‘’“”–—", "''\"\"--")  # the reader knows those of a keyboard


class Ocr:
    """Reads upright lines; a word of which the reader is less than half sure is not read."""

    name = "ocr"
    differentiable = False
    image_only = True  # an unfinished picture shows no text, and a reading takes 0.1 s of a core
    range = (0.0, 1.0)
    batch = 32  # it reads one after the other: more would only lengthen the search for the fitting batch on a GPU

    def __init__(self) -> None:
        """Raises UnknownReward where the reader cannot be imported."""
        try:
            import cv2
            from rapidfuzz.distance import Levenshtein
            from rapidocr_onnxruntime import RapidOCR
        except ImportError as error:  # also a library of the system, which the message names
            remedy = "`pip install -c constraints.txt -e '.[ocr]'` in the clone of this repository"
            if "libGL" in str(error):
                remedy = "`apt-get install libgl1`, or opencv-python-headless in place of opencv-python"
            raise UnknownReward(f"reward.name: ocr needs what is not installed here ({error}): {remedy}") from error
        # Results and other processes on the machine depend on it: run.cpu_threads, as torch has it.
        threads = min(torch.get_num_threads(), os.cpu_count() or 1)
        cv2.setNumThreads(threads)
        self.reader = RapidOCR(intra_op_num_threads=threads, inter_op_num_threads=1)
        self.distance = Levenshtein.distance

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raises ValueError, as scoring does, for a prompt that asks for no text. Those of a file have its columns."""
        for prompt in prompts:
            asked_for(prompt, getattr(prompt, "metadata", {}))

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Columns] = ()) -> Tensor:
        pixels = (images.detach().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        rows = zip(pixels, prompts, metadata or [{}] * len(prompts), strict=True)
        scores = [self.score(self.read(picture), asked_for(prompt, columns)) for picture, prompt, columns in rows]
        return torch.tensor(scores, dtype=torch.float32)

    def score(self, found: str, asked: str) -> float:
        """In [0, 1], of two texts."""
        target = _plain(asked)
        return 1 - min(self.distance(_plain(found), target), len(target)) / len(target)

    def read(self, picture: np.ndarray) -> str:
        """Of a picture [H, W, 3] uint8: its words, by lines from the top, in each from the left."""
        bgr, (small, side, larger) = np.ascontiguousarray(picture[..., ::-1]), SIDES
        self.reader.text_det.limit_side_len = side if min(bgr.shape[:2]) <= small else larger
        found, _ = self.reader(bgr, use_cls=False)  # that classifier turns text that stands on its head
        if not found:
            return ""
        boxes, texts, _ = zip(*found, strict=True)
        return " ".join(_in_order(np.array(boxes), texts))


def asked_for(prompt: str, columns: Columns) -> str:
    """The metadata `text` where there is one, else all that stands between double quotes, in its order. Raises
    ValueError where neither holds anything to read."""
    text: Any = columns.get(COLUMN)
    if text is None or text == "":
        text = " ".join(part for groups in QUOTED.findall(prompt) for part in groups if part)
    if not isinstance(text, str | int | float) or not _plain(str(text)):
        raise ValueError(
            f"prompt {prompt!r} asks for no text that ocr could look for: put it between double quotes, as in "
            f'a sign that says "OPEN", or into a column {COLUMN!r} of the prompt file (prompts.path)'
        )
    return str(text)


def _plain(text: str) -> str:
    """Case-folded, without white space, full-width letters and typographic signs as the keyboard's."""
    return "".join(unicodedata.normalize("NFKC", text).translate(SAME).casefold().split())


def _in_order(boxes: np.ndarray, texts: Sequence[str]) -> list[str]:
    """`texts` of boxes [n, 4, 2] (corners from the upper left, clockwise; x, y), read line by line. Two stand in one
    line where their middles, along the text's common slope, are less than half of the greater height apart."""
    slope_y, slope_x = (boxes[:, 1, axis] - boxes[:, 0, axis] for axis in (1, 0))
    upright = boxes[..., 1] - slope_y.sum() / slope_x.sum() * boxes[..., 0]  # y as if no line slanted
    middle, height, lines = upright.mean(1), np.ptp(upright, 1), list[list[int]]()
    for i in np.argsort(middle, kind="stable").tolist():
        if lines and middle[i] - middle[lines[-1][-1]] < max(height[i], height[lines[-1][-1]]) / 2:
            lines[-1].append(i)
        else:
            lines.append([i])
    return [texts[i] for line in lines for i in sorted(line, key=lambda i: boxes[i, :, 0].min())]
