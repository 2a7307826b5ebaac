"""A made-up run's files, with all that a report may show."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from diffusion.trajectory import Chunk, Scores
from learner.config import config_yaml, load_config
from records.run_folder import BEFORE, SCHEMA, Records
from records.storage import Storage
from reports import summary
from reports.pictures import contact_sheet, png

NASTY = "<script>alert(1)</script> & \"quotes' in a prompt"
LONG = "an-unbroken-word-" * 12
PROMPTS = (NASTY, "a red circle", "a blue square", LONG, "", "a green ring", "a pink cross", "a seventh", "an eighth")
LABEL = "other_<reward>_of_a_long_name_without_a_break"
COLLAPSE = "diversity fell to 40% of <b>the base</b> model's"


def name_of(epoch: int) -> str:
    return "epoch-before" if epoch == BEFORE else f"epoch-{epoch:06d}"


def picture(seed: int, side: int) -> np.ndarray:
    """[side, side, 3] uint8: one flat colour, told from others."""
    return np.full((side, side, 3), (40 * seed % 256, 90 * seed % 256, 170 * seed % 256), np.uint8)


def line_of(epoch: int, epochs: int, evaluated: bool) -> dict:
    progress = (epoch + 1) / epochs
    line = {
        "epoch": epoch, "step": 2 * (epoch + 1), "time": 1.8e9 + epoch, "policy_version": epoch + 1, "beta": 30.0,
        "loss": 1 / (1 + progress), "flow_loss": None, "clipped": 0.25, "kl": 0.01, "grad_norm": 2.5,
        "reward_mean": 0.5 + 0.2 * progress, "reward_std": 0.1, "reward_mean/sharp & bright": 3 + progress,
        "reward_share/sharp & bright": 0.7, f"reward_share/{LABEL}": 0.3 if epoch else None,
        "staleness_mean": 0.5, "staleness_max": 1.0, "seconds": 10.0, "sample_seconds": 2.0, "score_seconds": 3.0,
        "train_seconds": 4.0, "trajectories": 30, "quarantined": 1, "lost_trajectories": 2 * (epoch == 0),
        "eval_reward_mean": None, "updates": [], f"reward_mean/{LABEL}": 0.1,
    }  # fmt: skip
    if evaluated:
        line |= {
            "evaluate_seconds": 1.5, "eval_reward_mean": 0.5 + 0.1 * progress, "eval_vendi": 12.5, "eval_distance": 0.3,
            "eval_reward_mean/held out": 5 - progress, "collapse": COLLAPSE if progress == 1 else None,
        }  # fmt: skip
    return line


def save_trajectories(folder: Path, epoch: int, rewards: list[float | None], thumbnails: bool = True) -> None:
    rows = [dict.fromkeys(SCHEMA) | {"run_id": "r", "epoch": epoch, "policy_version": epoch} for _ in rewards]
    for i, (row, reward) in enumerate(zip(rows, rewards, strict=True)):
        row |= {"trajectory_id": i, "prompt": PROMPTS[i % 7 % 5], "reward": reward}
        row["thumbnail_png"] = png(Image.fromarray(picture(i, 16))) if thumbnails else None
        row["bad"] = "the reward is NaN" if reward is None else None
    (folder / "trajectories").mkdir(exist_ok=True)
    table = pa.Table.from_pylist(rows, schema=pa.schema(SCHEMA))
    pq.write_table(table, folder / f"trajectories/{name_of(epoch)}.parquet")


def save_evaluation(folder: Path, epoch: int, rewards: list, held_out: dict[str, list] | None = None) -> None:
    count = len(rewards)
    prompts = tuple(PROMPTS[i % len(PROMPTS)] for i in range(count))
    values = np.array([[np.nan if reward is None else reward] for reward in rewards], np.float32)
    images = np.stack([picture(i + 1 + (epoch + 1), 64) for i in range(count)])
    sheet = contact_sheet([Scores(Chunk(0, "evaluate", 0, 0, prompts, tuple(range(count))), values, images)])
    table = {"prompt": prompts, "reward": rewards} | ({"held_out": held_out} if held_out else {})
    (folder / "evaluation").mkdir(exist_ok=True)
    (folder / f"evaluation/{name_of(epoch)}.png").write_bytes(png(sheet))
    (folder / f"evaluation/{name_of(epoch)}.json").write_text(json.dumps(table))


def made_up_run(folder: Path, epochs: int = 12, settings: tuple[str, ...] = ()) -> Path:
    """Files of a run with all that a report may show; every fourth epoch is evaluated."""
    given = ["evaluation.images=20", "sampler.chunk_size=4", f"train.epochs={epochs}", "run.runner=ray", *settings]
    config = load_config(overrides=given)
    identity = {"config_digest": "c" * 64, "prompts_sha256": "p" * 64}
    identity["environment"] = {"git_commit": "a1b2c3+", "gpu": ""}
    records = Records.create(Storage(str(folder)), folder.name, config_yaml(config), identity)
    rng = np.random.default_rng(0)
    before = rng.normal(0.5, 0.05, 20)
    save_evaluation(folder, BEFORE, [*before[:-1], None])
    lines = [
        {**line_of(BEFORE, epochs, True), **dict.fromkeys(("loss", "reward_mean", "sample_seconds")), "seconds": 0.0}
    ]
    for epoch in range(epochs):
        evaluated = (epoch + 1) % 4 == 0
        lines.append(line_of(epoch, epochs, evaluated))
        save_trajectories(folder, epoch, [*rng.normal(0.5 + 0.01 * epoch, 0.1, 29), None])
        if evaluated:
            save_evaluation(folder, epoch, list(before + rng.normal(0.1, 0.02, 20)))
    records.keep(lines)
    (folder / "quarantine").mkdir()
    for i in range(summary.SHOWN + 2):
        one = {"reason": f"NaN <i>reward</i> {i}", "prompt": NASTY, "epoch": i, "trajectory_id": 29}
        (folder / f"quarantine/epoch-{i:06d}-trajectory-29.json").write_text(json.dumps(one))
    event = {"time": 1.8e9, "text": "sampler <2> is gone: replacing the actor"}
    beat = {
        "state": "failed", "reason": "StorageError: no <space> left", "process": 1, "host": "elsewhere", "since": 0,
        "time": 0, "quiet_seconds": 30, "epochs": epochs, "events": 3, "last_events": [event],
    }  # fmt: skip
    (folder / "status.json").write_text(json.dumps(beat))
    (folder / "checkpoints/step-000024/lora").mkdir(parents=True)
    figure = {"value": 0.61, "low": 0.58, "high": 0.64, "base": 0.5, "floor": 0.01, "floor_high": 0.025}
    for step, value in ((8, 0.111), (24, 0.612)):
        gain = {"gain": 0.11, "gain_low": 0.09, "gain_high": 0.13}
        found = {"reward": figure | {"value": value} | gain, "vendi": None, "kid": {"value": -0.002, "floor": 0.0001}}
        found["held_out"] = {LABEL: figure | {"value": 7.25}}
        found |= {"absent": {"distance": "no prompt has two"}}
        for images in (16, 256):
            found["settings"] = {"images": images, "prompts": 8, "seed": 3, "features": "pixels"}
            text = json.dumps(found if images == 256 else found | {"reward": figure | {"value": 0.999}})
            (folder / f"evaluation/step-{step:06d}-{images}-images-ab12cd34.json").write_text(text)
    return folder
