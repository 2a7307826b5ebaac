"""Several hosts: samplers on each, cables that are cut, raylets that are killed; and the same LoRA, bit by bit."""

from __future__ import annotations

import json
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator

import pyarrow.parquet as pq
import pytest
from emulated_run import lora
from hosts import Hosts, why_not

from learner.run import main

pytestmark = [
    pytest.mark.slow,
    pytest.mark.faults,
    pytest.mark.ray,
    pytest.mark.timeout(900),
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]
NOTICED = re.compile("replac")  # the driver's word about an actor that is gone
NOTICE_SECONDS = 8.0

# Chunks of about a second, several for each sampler in an epoch.
LONGER = (
    "sampler.steps=20", "train.trajectories=64", "sampler.transitions=random", "sampler.transition_fraction=0.05",
)  # fmt: skip


@pytest.fixture(scope="module")
def settings(small_settings) -> list[str]:
    return [*small_settings, *LONGER]


@pytest.fixture(scope="module")
def unbroken(settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "unbroken"
    assert main([*settings, "run.runner=inprocess", f"run.dir={folder}"]) == 0
    return folder


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    start = time.monotonic()
    with Hosts([6, 2, 2]) as made:
        print(f"three hosts in {time.monotonic() - start:.1f} s")
        yield made


class Driven:
    """A run, and what its driver says, each line with its time."""

    def __init__(self, hosts: Hosts, folder, *settings: str) -> None:
        self.folder = folder
        self.process = hosts.drive(*settings, f"run.dir={folder}", cwd=folder.parent)
        self.lines: list[tuple[float, str]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if "[state-dump]" in line:
                continue  # Ray's own last words of a raylet that is gone, pages of them
            self.lines.append((time.monotonic(), line.rstrip()))

    @property
    def said(self) -> str:
        return "\n".join(line for _, line in self.lines)

    def until(self, condition: Callable[[], bool], what: str, seconds: float = 240) -> float:
        """The time when `condition` came true, while the run goes on."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"over before {what}: {self.said[-5000:]}"
            assert time.monotonic() < deadline, f"no {what} in {seconds:g} s: {self.said[-5000:]}"
            time.sleep(0.02)
        return time.monotonic()

    def said_since(self, moment: float, words: re.Pattern[str]) -> list[float]:
        return [at for at, line in self.lines if at > moment and words.search(line)]

    def epoch_closed(self, number: int) -> None:
        done = self.folder / f"checkpoints/step-{number + 1:06}/state.json"
        self.until(done.exists, f"end of epoch {number}")

    def end(self, seconds: float = 300) -> int:
        status = self.process.wait(seconds)
        self._reader.join(10)
        return status

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait(10)


@pytest.fixture
def drive(hosts, settings, tmp_path) -> Iterator[Callable[..., Driven]]:
    started = []

    def go(*more: str) -> Driven:
        started.append(Driven(hosts, tmp_path / "run", *settings, *more))
        return started[-1]

    yield go
    for run in started:
        run.stop()


def sampled_on(folder, epoch: int) -> set[str]:
    rows = pq.read_table(folder / "trajectories", columns=["epoch", "sampler_node"]).to_pylist()
    return {row["sampler_node"] for row in rows if row["epoch"] == epoch}


def metrics(folder) -> dict[int, dict]:
    return {line["epoch"]: line for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())}


def sampling(hosts: Hosts, number: int) -> Callable[[], bool]:
    return lambda: hosts.does(hosts[number], "ray::SamplerActor.sample")


THREE = ("sampler.actors=3", "reward.actors=1", "learner.labels={host: h0}", "reward.labels={host: h0}")


def test_a_cut_host_and_a_killed_raylet_in_mid_epoch_change_nothing(hosts, drive, unbroken):
    run = drive(*THREE)
    run.epoch_closed(0)
    assert sampled_on(run.folder, 0) == {hosts[0].address, hosts[1].address, hosts[2].address}
    run.until(sampling(hosts, 1), "sampling on h1")
    time.sleep(4)  # what it finished meanwhile is lost with it
    run.until(sampling(hosts, 1), "sampling on h1")
    hosts.cut(hosts[1])
    cut = time.monotonic()
    assert hosts.is_cut(hosts[1]) and sampling(hosts, 1)()
    noticed = run.until(lambda: bool(run.said_since(cut, NOTICED)), "word of the cut", 60) - cut
    print(f"cut noticed after {noticed:.1f} s")
    run.until(sampling(hosts, 2), "sampling on h2")
    hosts.kill_raylet(hosts[2])
    killed = time.monotonic()
    noticed_kill = run.until(lambda: bool(run.said_since(killed, NOTICED)), "word of the kill", 60) - killed
    print(f"raylet's end noticed after {noticed_kill:.1f} s")
    hosts.heal(hosts[1])  # a raylet that was declared dead ends itself; the run is not troubled
    assert run.end() == 0, run.said[-5000:]
    assert noticed < NOTICE_SECONDS and noticed_kill < NOTICE_SECONDS
    assert lora(run.folder) == lora(unbroken)
    epochs = metrics(run.folder)
    # Two chunks of four were in the hands of each at most: more were lost, finished ones that nobody had fetched yet.
    print(f"trajectories made again: {epochs[1]['lost_trajectories']}")
    assert epochs[1]["lost_trajectories"] > 8 and epochs[1]["trajectories"] == 64


def test_a_cut_too_short_to_be_noticed_changes_nothing(hosts, drive, unbroken):
    run = drive(*THREE)
    run.epoch_closed(0)
    run.until(sampling(hosts, 1), "sampling on h1")
    hosts.cut(hosts[1])
    assert hosts.is_cut(hosts[1]) and sampling(hosts, 1)()
    time.sleep(1.5)
    hosts.heal(hosts[1])
    assert run.end() == 0, run.said[-5000:]
    assert not NOTICED.search(run.said)
    assert lora(run.folder) == lora(unbroken)
    assert metrics(run.folder)[1]["lost_trajectories"] == 0


def test_the_learners_host_is_cut_off(hosts, drive, unbroken):
    """Restarted elsewhere or said in one line, within the deadline; the same command ends with the same bits."""
    apart = ('learner.labels={host: "in(h1,h2)"}', "sampler.labels={host: h0}", "reward.labels={host: h0}")
    settings = ("sampler.actors=2", "reward.actors=1", *apart)
    run = drive(*settings)
    run.epoch_closed(0)
    (number,) = [number for number in (1, 2) if hosts.does(hosts[number], "ray::LearnerActor")]
    run.until(sampling(hosts, 0), "sampling")
    hosts.cut(hosts[number])
    cut = time.monotonic()
    status = run.end(120)
    print(f"the run ended with {status} {time.monotonic() - cut:.1f} s after its learner's host was cut off")
    if status:
        (line,) = [line for _, line in run.lines if line.startswith("learner.run:")]
        assert status == 1 and "ActorDied: " in line and "Traceback" not in run.said
        assert drive(*settings).end() == 0
    assert lora(run.folder) == lora(unbroken)


def test_a_host_that_joins_is_used(hosts, drive):
    """Automatic counts: the fourth host's samplers work in the last epoch at the latest, and the run ends as it should.
    Twelve epochs: on a busy machine an actor takes as long to start as several of them."""
    run = drive("sampler.actors=null", "reward.actors=1", "learner.labels={host: h0}", "reward.labels={host: h0}",
                "sampler.labels={host: \"!h0\"}", "train.epochs=12")  # fmt: skip
    run.epoch_closed(0)
    joined = hosts.join(2)
    assert run.end() == 0, run.said[-5000:]
    assert hosts[3] is joined and joined.address not in sampled_on(run.folder, 0)
    assert joined.address in sampled_on(run.folder, 11)
