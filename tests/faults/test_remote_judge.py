"""A judge behind HTTP that is killed and started again in mid-epoch, is busy at random, hangs and answers garbage: the
run ends with the LoRA of the undisturbed one, or in one typed line within its deadline."""

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from emulated_run import lora, totals
from ray_processes import wait_for

from learner.config import ROOT
from learner.run import main
from rewards import tokens

pytestmark = [pytest.mark.faults, pytest.mark.ray, pytest.mark.long]
JUDGE = ROOT / "tests/rewards/judge.py"
TOKEN = "s3cret-of-the-judge"
# 2 epochs of 16 trajectories in chunks of 4, whose images alone are judged.
SETTINGS = (
    "--config", str(ROOT / "configs/shapes_ddpo.yaml"), "flow.warmup_steps=0", "flow.fit_steps=0",
    "train.trajectories=16", "evaluation.images=4", "run.thumbnail_pixels=0", "reward.actors=1",
    "sampler.actors=1",
)  # fmt: skip
OPTIONS = "reward.options={{urls: {url}, batch: 2, request_seconds: 2, seconds: {seconds}}}"


class Process:
    """judge.py on a port of its own, which it keeps."""

    def __init__(self, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.folder, self.url = folder, f"http://127.0.0.1:{self.port}"

    def start(self, dies_after: int | None = None) -> None:
        self("up").unlink(missing_ok=True)
        env = {**os.environ, tokens.VARIABLE: TOKEN} | ({"DIES_AFTER": str(dies_after)} if dies_after else {})
        self.process = subprocess.Popen([sys.executable, JUDGE, str(self.port), str(self.folder)], env=env)
        wait_for(self("up").exists, 60)

    def __call__(self, witness: str) -> Path:
        return self.folder / witness

    @property
    def scored(self) -> list[str]:
        """A line a request that was answered: its place, its id, its images."""
        return self("scored").read_text().splitlines()

    def stop(self) -> None:
        self.process.kill()
        self.process.wait(30)


@pytest.fixture
def judge(tmp_path):
    (tmp_path / "judge").mkdir()
    process = Process(tmp_path / "judge")
    yield process
    process.stop()


@pytest.fixture
def settings(small_settings):
    return [*small_settings, *SETTINGS]


@pytest.fixture(scope="module")
def undisturbed(small_settings, tmp_path_factory):
    """The LoRA of the same reward in process."""
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    own = "reward.name=judge:in_process"
    assert main([*small_settings, *SETTINGS, own, "run.runner=inprocess", f"run.dir={folder}"]) == 0
    return lora(folder)


def grep(folder: Path, text: str) -> list[str]:
    return [str(file) for file in folder.rglob("*") if file.is_file() and text.encode() in file.read_bytes()]


@pytest.mark.parametrize("runner", ["inprocess", "ray"])
def test_a_judge_that_fails_in_every_way_costs_nothing_but_time(
    runner, judge, settings, undisturbed, cluster, tmp_path, capfd, monkeypatch
):
    """The cluster is older than the token in the environment: it came to the reward actors with the run."""
    monkeypatch.setenv(tokens.VARIABLE, TOKEN)
    judge.start(dies_after=8)  # two requests of the first evaluation, and six of the first epoch's eight

    def start_again() -> None:
        judge.process.wait(300)
        time.sleep(1)  # long enough to be refused
        judge.start()

    nurse = threading.Thread(target=start_again)
    nurse.start()
    folder, options = tmp_path / "run", OPTIONS.format(url=judge.url, seconds=120)
    status = main([*settings, "reward.name=remote", options, f"run.runner={runner}", f"run.dir={folder}"])
    nurse.join(60)
    captured = capfd.readouterr()
    print(captured.out, captured.err)
    assert status == 0 and "Traceback" not in captured.err
    for witness in ("killed", "hung", "garbage", "busy", "slow"):
        assert judge(witness).exists(), witness
    assert lora(folder) == undisturbed
    assert totals(folder) == {"issued": 32, "sampled": 32, "scored": 32, "trained": 32, "quarantined": 0, "lost": 0}
    assert grep(folder, TOKEN) == [] and TOKEN not in captured.out + captured.err
    logs = cluster._folder.path  # all that Ray writes
    assert list(logs.rglob("*.log")) and grep(logs, TOKEN) == []


@pytest.mark.parametrize("runner", ["inprocess", "ray"])
def test_a_judge_that_stays_away_ends_the_run_in_one_line_and_it_goes_on_later(
    runner, judge, settings, undisturbed, cluster, tmp_path, capfd, monkeypatch
):
    """Also where bad trajectories are set aside: none is."""
    monkeypatch.setenv(tokens.VARIABLE, TOKEN)
    judge.start(dies_after=8)
    folder = tmp_path / "run"
    command = [*settings, "reward.name=remote", "reward.on_bad_reward=quarantine", f"run.runner={runner}"]
    command += [f"run.dir={folder}"]
    assert main([*command, OPTIONS.format(url=judge.url, seconds=20)]) == 1
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("learner.run: ")]
    assert (
        f"JudgeSilent: reward remote: no scores from {judge.url} for 2 images within reward.options.seconds=20 s"
        in line
    )
    assert "ConnectionRefusedError" in line and f"GET {judge.url}/health" in line and "the same command goes on" in line
    assert judge("killed").exists() and not (folder / "quarantine").exists()
    assert main([*command, OPTIONS.format(url=judge.url, seconds=20)]) == 2  # looked at before anything starts
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("learner.run: ")]
    assert f"reward.options.urls: {judge.url} does not answer" in line
    elsewhere = Process(judge.folder)  # where a judge is may change
    elsewhere.start()
    try:
        assert main([*command, OPTIONS.format(url=elsewhere.url, seconds=120)]) == 0
    finally:
        elsewhere.stop()
    assert lora(folder) == undisturbed and totals(folder)["trained"] == 32
