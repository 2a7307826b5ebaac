"""Every file that a run leaves, damaged in every way, under every command that reads a run: it does what it does for
the whole run, or names the file in a warning, or refuses in one line with the remedy. A run that goes on itself:
tests/learner/test_damaged_files.py."""

import json
import os
import re
import shutil
import zlib
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import mlflow
import mlflow.diffusers
import numpy as np
import pytest
from damages import REMEDIES, damages

from commands import compare, evaluate, export, generate, report, status, upload
from diffusion import parts
from learner.run import main
from records.storage import Storage
from reports import html, mlflow_database, mlflow_mirror

CHECKPOINT = "checkpoints/step-000002"
SMALL = ("run.json", "config.yaml", "metrics.jsonl", "status.json", "run.lock")
EVALUATED = tuple(f"evaluation/{name}" for name in ("epoch-before.json", "epoch-000001.json", "step-000002.json"))
OF_CHECKPOINT = tuple(f"{CHECKPOINT}/{name}" for name in ("state.json", "config.yaml", "learner.pt", "replay-0.pt"))
LORAS = tuple(f"{CHECKPOINT}/lora/{name}.safetensors" for name in ("pytorch_lora_weights", "kohya"))
PICTURES = ("evaluation/epoch-before.png", "evaluation/epoch-000001.png", "evaluation/step-000002.png", "before.png")
TABLES = ("evaluation/epoch-before.parquet", "trajectories/epoch-000001.parquet")
OTHERS = ("report.html", "quarantine/epoch-000000-trajectory-3.json", "evaluation/step-000002.parquet")
FILES = (*SMALL, *EVALUATED, *OF_CHECKPOINT, *LORAS, *PICTURES, *TABLES, *OTHERS)
LIGHT = ("report", "export", "upload")
HEAVY = ("evaluate", "compare", "generate", "run --plan")


@pytest.fixture(scope="module")
def whole(finished_run, tmp_path_factory):
    """A finished run with a judgement and a trajectory that was set aside."""
    folder = shutil.copytree(finished_run, tmp_path_factory.mktemp("whole") / "run", symlinks=True)
    figure = {"value": 0.6, "low": 0.5, "high": 0.7, "base": 0.4, "floor": 0.01, "gain": 0.2, "gain_low": 0.1}
    storage = Storage(str(folder))
    judged = {"epochs_done": 2, "reward": figure, "kid": figure, "vendi": None, "held_out": {"sharp": figure}}
    storage.write_json("evaluation/step-000002.json", judged)
    for end in ("png", "parquet"):
        shutil.copy(folder / f"evaluation/epoch-000001.{end}", folder / f"evaluation/step-000002.{end}")
    aside = {"reason": "the reward is NaN", "prompt": "a fox", "epoch": 0, "trajectory_id": 3}
    storage.write_json("quarantine/epoch-000000-trajectory-3.json", aside)
    return folder


@pytest.fixture(scope="module")
def commands(small_settings):
    """`commands(name, run, out)`: its exit status and what it made, with all that only computes or talks left out."""
    with pytest.MonkeyPatch.context() as patch:
        made: list = []
        patch.setattr(parts, "without_weights", cache(parts.without_weights))
        patch.setattr(evaluate, "judge", lambda targets, cache: made.extend(map(_judged, targets)) or [])
        patch.setattr(html, "_jpeg", lambda picture: f"{zlib.crc32(picture.tobytes())}")
        patch.setattr(compare, "write", lambda judged, out: None)
        patch.setattr(generate, "draw", lambda *given: made.append(_drawn(*given)) or [_pictures(given)])
        client = MagicMock()
        client.search_runs.return_value = client.search_logged_models.return_value = []
        patch.setattr(mlflow, "MlflowClient", lambda uri: client)
        patch.setattr(mlflow_database, "opened", nullcontext)
        patch.setattr(mlflow_mirror, "require_own_place", lambda server, place: None)
        patch.setattr(mlflow, "set_tracking_uri", MagicMock())
        patch.setattr(mlflow.diffusers, "log_model", lambda folder, *given, **more: made.append(_files(Path(folder))))

        def go(name: str, run: Path, out: Path):
            made.clear()
            client.reset_mock()
            place = ["--cache", str(out / "cache"), "--out", str(out / "judged")]
            prompt = ["--prompt", "a fox", "--images", "1", "--out", str(out / "grid.png")]
            given = [*small_settings, "run.runner=inprocess", "lora.alpha=3", "evaluation.seed=5", f"run.dir={run}"]
            code = {
                "status": lambda: status.main([str(run)]),
                "report": lambda: report.main([str(run)]),
                "export": lambda: export.main([str(run), "--format", "diffusers", "--out", str(out / "export")]),
                "upload": lambda: upload.main([str(run), "--uri", f"sqlite:///{out}/mlflow.db"]),
                "evaluate": lambda: evaluate.main([str(run), *place]),
                "compare": lambda: compare.main([str(run), *place]),
                "generate": lambda: generate.main(["--lora", str(run), *prompt]),
                "run --plan": lambda: main([*given, "--plan"]),
            }[name]()
            made.extend(re.sub(r" at 0x\w+", "", str(call)) for call in client.mock_calls)
            page = (run / "report.html").read_bytes() if name == "report" else b""
            made.append(re.sub(rb"<footer>.*?</footer>", b"", page, flags=re.S))
            return code, [*made, *(_files(out / "export") if name == "export" and not code else ())]

        yield go


def _judged(target) -> tuple:
    return target.name, target.adapter.sha256, target.config, target.prompts, target.file, json.dumps(target.facts)


def _drawn(config, adapter, prompts, images) -> tuple:
    return config, adapter.sha256, tuple(prompts), images


def _pictures(given) -> tuple:
    return tuple(np.zeros((given[3], 64, 64, 3), np.uint8) for _ in range(2))


def _files(folder: Path) -> list:
    return sorted((file.name, file.read_bytes()) for file in folder.iterdir())


def _shown_as_it_is(name: str, file: str, kind: str) -> bool:
    """What a folder says of itself, sealed as it should be; a look says what is there; nothing counts what is aside."""
    as_it_is = (name, file) == ("upload", "report.html")  # a page for people, whatever it is
    return as_it_is or kind in ("escapes", "large") or (kind == "absent" and (name == "status" or "quarantine" in file))


def check(files, names, commands, whole, tmp_path, capsys) -> None:
    run, out = tmp_path / "run", tmp_path / "out"

    def fresh() -> None:
        for folder in (run, out):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, run, symlinks=True, copy_function=os.link)
        out.mkdir()

    def outcome(name: str) -> SimpleNamespace:
        capsys.readouterr()
        code, made = commands(name, run, out)
        said = capsys.readouterr()
        shown = re.sub(r"last sign.*|finished .* ago", "", said.out)
        return SimpleNamespace(code=code, made=(made, shown), out=said.out, err=said.err)

    fresh()
    usual = {name: outcome(name) for name in names}
    assert all(each.code == 0 and each.err == "" for each in usual.values()), [each.err for each in usual.values()]
    faults = []
    for file in files:
        for kind, content in damages(whole / file).items():
            for name in names:
                fresh()
                (run / file).unlink()
                if content is not None:
                    (run / file).write_bytes(content)
                about = f"{name}, {file}, {kind}"
                try:
                    found = outcome(name)
                except BaseException as error:
                    faults.append(f"{about}: {error!r:.200}")
                    continue
                lines = found.err.splitlines()
                refusals = [line for line in lines if "warning: " not in line]
                parts = Path(file).name, "checkpoints", "evaluation/"
                known = [line for line in lines if any(part in line for part in parts)]
                shown = b"".join(part if isinstance(part, bytes) else str(part).encode() for part in found.made[0])
                if "\x1b" in found.out + found.err or (name in ("report", "export") and b"\x1b" in shown):
                    faults.append(f"{about}: an escape sequence is shown")
                if found.code:
                    if (
                        len(refusals) != 1
                        or (refusals[0] not in known and kind != "escapes")  # forged, and sealed: another run's
                        or not any(word in refusals[0] for word in REMEDIES)
                    ):
                        faults.append(f"{about}: refused without file or remedy: {found.err:.600}")
                elif not known and found.made != usual[name].made and not _shown_as_it_is(name, file, kind):
                    faults.append(f"{about}: no word, and another outcome; {found.err:.300}")
                elif refusals:
                    faults.append(f"{about}: {refusals}")
    assert not faults, "\n".join(faults)


def test_a_look_at_the_run(commands, whole, tmp_path, capsys):
    check(FILES, ["status"], commands, whole, tmp_path, capsys)


@pytest.mark.long
@pytest.mark.parametrize("name", LIGHT)
@pytest.mark.parametrize("file", FILES)
def test_commands_that_only_read(file, name, commands, whole, tmp_path, capsys):
    check([file], [name], commands, whole, tmp_path, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("name", HEAVY)
@pytest.mark.parametrize("file", (*SMALL, *OF_CHECKPOINT, *LORAS))
def test_commands_that_draw(file, name, commands, whole, tmp_path, capsys):
    check([file], [name], commands, whole, tmp_path, capsys)
