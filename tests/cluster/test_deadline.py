"""A deadline in this very process: for Python that waits, for what catches everything, for what nothing interrupts."""

import contextlib
import signal
import subprocess
import sys
import time

import pytest

from cluster import deadline
from cluster.deadline import within
from diffusion.failures import DeadlineExceeded

SAID = r"scoring chunk 0 took longer than run\.chunk_seconds=0\.02 s"


def test_what_waits_or_catches_everything_ends_and_what_is_done_in_time_hears_nothing(monkeypatch):
    """Somebody else's alarm, as pytest-timeout's, goes on."""
    monkeypatch.setattr(deadline, "AGAIN_SECONDS", 0.02)
    theirs = signal.setitimer(signal.ITIMER_REAL, 500)
    try:
        with pytest.raises(DeadlineExceeded, match=SAID), within(0.02, "scoring chunk 0", "run.chunk_seconds"):
            for _ in range(2):
                with contextlib.suppress(BaseException):  # as a reward may
                    time.sleep(60)
            time.sleep(60)
        assert 400 < signal.getitimer(signal.ITIMER_REAL)[0] <= 500
        with within(60, "scoring chunk 1", "run.chunk_seconds"):
            assert 50 < signal.getitimer(signal.ITIMER_REAL)[0] <= 60
        assert 400 < signal.getitimer(signal.ITIMER_REAL)[0] <= 500
    finally:
        signal.setitimer(signal.ITIMER_REAL, *theirs)


CODE = """
import signal, sys, time
from cluster import deadline, signals
deadline.HARD_SECONDS = 0.05
if sys.argv[1] == "command":
    signals.watch("learner.run")
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])  # as in a call that does not come back to Python
with deadline.within(0.02, "scoring chunk 0", "run.chunk_seconds"):
    time.sleep(60 if sys.argv[1] == "command" else 0.5)
"""


@pytest.mark.parametrize(("kind", "status"), [("command", 1), ("library", 0)])
def test_what_nothing_interrupts_ends_a_command_with_a_line_and_nobody_elses_program(kind, status):
    done = subprocess.run([sys.executable, "-c", CODE, kind], capture_output=True, text=True, timeout=60)
    assert done.returncode == status and "Traceback" not in done.stderr
    program = "learner.run" if kind == "command" else "learner.train"
    assert done.stderr.startswith(
        f"{program}: scoring chunk 0 took longer than run.chunk_seconds=0.02 s, in <string>:9"
    )
