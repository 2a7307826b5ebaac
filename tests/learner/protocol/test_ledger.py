import pytest

from learner.protocol.ledger import Ledger, LedgerError

STAGES = ("sampled", "scored", "trained")


@pytest.fixture
def ledger() -> Ledger:
    ledger = Ledger()
    ledger.open(0, (0, 1))
    return ledger


def advance(ledger: Ledger, epoch: int, ids: list[int], stages: tuple[str, ...] = STAGES) -> None:
    for stage in stages:
        ledger.advance(epoch, ids, stage)


def test_every_trajectory_is_counted_once_at_every_stage_also_after_a_resume():
    ledger = Ledger()
    for epoch in range(2):
        ledger.open(epoch, [0, 1, 2])
        advance(ledger, epoch, [0, 1, 2])
        assert ledger.close(epoch) == 0 and ledger.epochs == epoch + 1
        ledger = Ledger(ledger.to_json())
    assert ledger.totals == {"issued": 6, "sampled": 6, "scored": 6, "trained": 6, "quarantined": 0, "lost": 0}


def test_a_lost_chunk_is_made_again_and_counted_until_it_is_trained():
    ledger = Ledger()
    ledger.open(0, (0, 1, 2, 3))
    ledger.advance(0, [0, 1], "sampled")
    ledger.advance(0, [0, 1], "issued")  # after sampling
    ledger.advance(0, [2, 3], "issued")  # before
    advance(ledger, 0, [0, 1, 2, 3], ("sampled", "scored"))
    ledger.advance(0, [0], "issued")  # after scoring
    advance(ledger, 0, [0], ("sampled", "scored"))
    ledger.advance(0, [0, 1, 2, 3], "trained")
    with pytest.raises(LedgerError, match="trajectory 0 of epoch 0 cannot be issued: it is trained"):
        ledger.advance(0, [0], "issued")
    assert ledger.close(0) == 5 == ledger.totals["lost"] and ledger.totals["sampled"] == 4


@pytest.mark.parametrize(
    ("stages", "ids", "stage", "said"),
    [
        ((), [0], "scored", "trajectory 0 of epoch 0 cannot be scored: it is issued"),
        ((), [0], "quarantined", "cannot be quarantined: it is issued"),
        (("sampled",), [0], "sampled", "it is sampled"),
        (("sampled",), [0], "trained", "it is sampled"),
        (STAGES, [0], "trained", "it is trained"),
        (STAGES, [0], "quarantined", "it is trained"),
        ((), [7], "sampled", "trajectory 7 of epoch 0 cannot be sampled: it is unknown"),
    ],
)
def test_what_is_out_of_order_is_refused_by_name(ledger, stages, ids, stage, said):
    advance(ledger, 0, [0], stages)
    with pytest.raises(LedgerError, match=said):
        ledger.advance(0, ids, stage)


def test_an_epoch_closes_when_all_is_trained_or_quarantined(ledger):
    advance(ledger, 0, [0, 1], STAGES[:2])
    ledger.advance(0, [0], "trained")
    with pytest.raises(LedgerError, match="1 trajectories were not trained on, first 1"):
        ledger.close(0)
    ledger.advance(0, [1], "quarantined")
    ledger.close(0)
    assert ledger.totals == {"issued": 2, "sampled": 2, "scored": 2, "trained": 1, "quarantined": 1, "lost": 0}


def test_several_epochs_are_in_work_and_come_and_close_in_their_order(ledger):
    ledger.open(1, (0, 1))
    for epoch in (1, 3):
        with pytest.raises(LedgerError, match=f"epoch {epoch} was issued, but 2 is next"):
            ledger.open(epoch, [0])
    advance(ledger, 1, [0, 1])
    with pytest.raises(LedgerError, match="epoch 1 was to be closed, but 0 is next"):
        ledger.close(1)
    # A checkpoint has the closed epochs alone: what is in work will be done again after a crash.
    assert ledger.to_json() == Ledger().to_json()
    advance(ledger, 0, [0, 1])
    assert (ledger.close(0), ledger.close(1)) == (0, 0)
    assert ledger.totals["trained"] == 4 and ledger.epochs == 2
