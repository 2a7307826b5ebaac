"""A run goes on from a folder of which any file is damaged, and says so, or refuses it in a line with the remedy; what
it ends with is what the unbroken run ends with. What other commands make of such a folder: tests/commands/."""

import shutil
from pathlib import Path

import pytest
from damages import REMEDIES, damages
from emulated_run import outcome

from learner.run import main
from records.run_folder import Records
from records.storage import Storage

FIRST = ("run.json", "config.yaml", "metrics.jsonl", "evaluation/epoch-before.parquet")
# Of an early, the newest and no checkpoint.
OTHERS = (
    "status.json", "run.lock", "report.html", "before.png", "evaluation/epoch-before.json",
    "evaluation/epoch-before.png",
    "checkpoints/step-000004/state.json", "checkpoints/step-000004/config.yaml",
    "checkpoints/step-000004/learner.json", "checkpoints/step-000002/state.json",
)  # fmt: skip
KEPT = ("LoRA", "learner", "cursor", "ledger")


@pytest.fixture(scope="module")
def begun(unbroken, tmp_path_factory):
    """Stopped in its last epoch."""
    folder = shutil.copytree(unbroken, tmp_path_factory.mktemp("runs") / "run", symlinks=True)
    shutil.rmtree(folder / "checkpoints/step-000006")
    Records.open(Storage(str(folder))).note(finished=False)
    return folder


@pytest.mark.parametrize("file", [*FIRST, *(pytest.param(file, marks=pytest.mark.long) for file in OTHERS)])
def test_a_run_goes_on_or_refuses_in_a_line(file, light, begun, unbroken, tmp_path, capsys):
    for kind, content in damages(begun / file).items():
        run = Path(shutil.copytree(begun, tmp_path / "run", symlinks=True))
        (run / file).unlink() if content is None else (run / file).write_bytes(content)
        capsys.readouterr()
        status = main([*light, f"run.dir={run}"])
        said = capsys.readouterr()
        about = f"{file}, {kind}: {said.err}"
        named = [line for line in said.err.splitlines() if Path(file).name in line or Path(file).parent.name in line]
        assert "\x1b" not in said.out + said.err and all(
            line.startswith("learner.run: ") for line in said.err.splitlines()
        )
        if status:
            assert status == 2 and len(named) == 1 and any(word in named[0] for word in REMEDIES), about
            assert (run / file).read_bytes() == content, about  # nothing was written
        else:
            then, now = outcome(unbroken), outcome(run)
            assert all(then[key] == now[key] for key in KEPT), about
            assert named or all(then[key] == now[key] for key in ("metrics", "rows")), about
        shutil.rmtree(run)
