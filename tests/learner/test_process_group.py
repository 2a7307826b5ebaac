"""The process group of the ranks, with real processes: the same sum everywhere, and a peer that is gone or silent."""

import os
import signal
import time

import pytest
import torch
import torch.multiprocessing as mp

from learner import process_group
from learner.process_group import GroupBroken

LIMIT = 3.0  # seconds, of every collective that a silent peer must break
PATIENT = 60.0  # of those that a closed connection breaks first


class Ranks:
    """`count` processes running target(rank, count, address, *arguments, queue); none outlives the test. They come from
    a process that has imported what they need, once."""

    def __init__(
        self, target, count: int, *arguments, absent: tuple[int, ...] = (), needs: str = "learner.process_group"
    ) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload([needs])
        self.queue, address = context.Queue(), process_group.free_address("127.0.0.1")
        self.processes = [
            context.Process(target=target, args=(rank, count, address, *arguments, self.queue), daemon=True)
            for rank in {*range(count)} - {*absent}
        ]

    def __enter__(self) -> "Ranks":
        for process in self.processes:
            process.start()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.join(10)

    def answers(self, count: int, seconds: float = 60) -> list:
        return [self.queue.get(timeout=seconds) for _ in range(count)]


def _broken(rank, count, address, operation, victim, blow, queue):
    """All meet once; then `victim` is struck, and the others say what they get, and after how long."""
    torch.set_num_threads(1)
    limit = LIMIT if blow == signal.SIGSTOP else PATIENT
    process_group.join(address, rank, count, limit, whole_gpu=False)
    weight = torch.nn.Parameter(torch.zeros(1000))
    weight.grad = torch.full((1000,), float(rank))

    meet = {"averaging": process_group.average_gradients, "gathering": process_group.gather}[operation]
    given = [weight] if operation == "averaging" else [rank] * 100
    meet(given)
    if rank == victim:
        queue.put((rank, "struck", 0.0))
        queue.close()
        queue.join_thread()
        os.kill(os.getpid(), blow)
    start = time.monotonic()
    try:
        meet(given)
    except GroupBroken as error:
        queue.put((rank, str(error), time.monotonic() - start))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("operation", ["averaging", "gathering"])
@pytest.mark.parametrize(("blow", "least", "most"), [(signal.SIGKILL, 0.0, PATIENT), (signal.SIGSTOP, LIMIT, PATIENT)])
def test_a_rank_that_is_gone_or_silent_breaks_the_group_in_time(operation, blow, least, most):
    with Ranks(_broken, 2, operation, 1, blow) as ranks:
        (_, said, seconds), struck = sorted(ranks.answers(2, 2 * PATIENT))
    assert struck[:2] == (1, "struck")
    print(f"{blow.name} in {operation}: {seconds:.2f} s: {said}")
    assert said.startswith(operation)
    assert least - 0.05 <= seconds < most


@pytest.mark.parametrize("blow", [pytest.param(signal.SIGKILL, marks=pytest.mark.long), signal.SIGSTOP])
def test_all_of_four_ranks_hear_of_it(blow):
    with Ranks(_broken, 4, "averaging", 2, blow) as ranks:
        seconds = {rank: seconds for rank, _, seconds in ranks.answers(4, 2 * PATIENT)}
    print(blow.name, seconds)
    assert sorted(seconds) == [0, 1, 2, 3] and max(seconds.values()) < PATIENT


def _joins(rank, count, address, queue):
    start = time.monotonic()
    with pytest.raises(GroupBroken) as broken:
        process_group.join(address, rank, count, LIMIT, whole_gpu=False)
    queue.put((rank, str(broken.value), time.monotonic() - start))
    queue.close()
    queue.join_thread()
    os._exit(0)


@pytest.mark.parametrize("absent", [0, 1])
def test_joining_ends_in_time_when_a_rank_never_comes(absent):
    with Ranks(_joins, 3, absent=(absent,)) as ranks:
        for rank, said, seconds in ranks.answers(2):
            print(f"rank {rank} without rank {absent}: {seconds:.2f} s: {said}")
            assert said.startswith("joining the 3 learner ranks at tcp://127.0.0.1:") and seconds < PATIENT


def test_a_defect_of_the_learners_own_is_no_broken_group():
    with pytest.raises(ValueError, match="mine"), process_group.errors("adding up"):
        raise ValueError("mine")
    with pytest.raises(GroupBroken, match="adding up: Connection closed"), process_group.errors("adding up"):
        raise RuntimeError("Connection closed\nby peer")


def _averages(rank, count, address, queue):
    process_group.join(address, rank, count, 60, whole_gpu=False)
    matrix, vector, idle = (torch.nn.Parameter(torch.zeros(shape)) for shape in ((2, 3), (4,), (1,)))
    matrix.grad, vector.grad = torch.full((2, 3), float(rank)), torch.arange(4.0) * rank
    process_group.average_gradients([matrix, vector, idle])
    queue.put((matrix.grad.tolist(), vector.grad.tolist(), idle.grad))
    torch.distributed.destroy_process_group()


def test_gradients_become_their_mean_in_their_own_shapes():
    with Ranks(_averages, 3) as ranks:
        for answer in ranks.answers(3):
            assert answer == ([[1.0] * 3] * 2, [0.0, 1.0, 2.0, 3.0], None)
