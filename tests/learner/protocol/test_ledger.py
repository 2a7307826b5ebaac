import pytest

from learner.protocol.ledger import Ledger, LedgerError


def through(ledger: Ledger, epoch: int, ids: list[int]) -> None:
    ledger.open(epoch, ids)
    for stage in ("sampled", "scored", "trained"):
        ledger.advance(epoch, ids, stage)
    ledger.close(epoch)


def test_every_trajectory_is_counted_once_at_every_stage():
    ledger = Ledger()
    through(ledger, 0, [0, 1, 2])
    through(ledger, 1, [0, 1, 2])
    assert ledger.epochs == 2
    assert ledger.totals == {"issued": 6, "sampled": 6, "scored": 6, "trained": 6, "quarantined": 0, "lost": 0}


def test_a_lost_chunk_is_made_again_and_counted():
    ledger = Ledger()
    ledger.open(0, [0, 1, 2, 3])
    ledger.advance(0, [0, 1], "sampled")
    ledger.lose(0, [0, 1])  # after sampling
    ledger.lose(0, [2, 3])  # before
    for stage in ("sampled", "scored", "trained"):
        ledger.advance(0, [0, 1, 2, 3], stage)
    ledger.close(0)
    assert ledger.totals["sampled"] == 4 and ledger.totals["lost"] == 4


@pytest.mark.parametrize(
    ("stages", "ids", "stage", "said"),
    [
        ((), [0], "scored", "trajectory 0 of epoch 0 was to be scored, but is issued"),
        (("sampled",), [0], "sampled", "but is sampled"),
        (("sampled", "scored", "trained"), [0], "trained", "but is trained"),
        ((), [7], "sampled", "trajectory 7 of epoch 0 was to be sampled, but was never issued"),
    ],
)
def test_what_is_out_of_order_is_refused_by_name(stages, ids, stage, said):
    ledger = Ledger()
    ledger.open(0, [0, 1])
    for done in stages:
        ledger.advance(0, [0], done)
    with pytest.raises(LedgerError, match=said):
        ledger.advance(0, ids, stage)


def test_an_epoch_does_not_close_before_all_is_trained():
    ledger = Ledger()
    ledger.open(0, [0, 1])
    for stage in ("sampled", "scored", "trained"):
        ledger.advance(0, [0], stage)
    with pytest.raises(LedgerError, match="1 trajectories were not trained on, first 1"):
        ledger.close(0)


def test_epochs_and_ids_come_once():
    ledger = Ledger()
    through(ledger, 0, [0])
    for epoch in (0, 2):
        with pytest.raises(LedgerError, match="1 is next"):
            ledger.open(epoch, [0])
    with pytest.raises(LedgerError, match="twice"):
        ledger.open(1, [0, 0])


def test_trained_work_cannot_be_lost_but_scored_work_can():
    ledger = Ledger()
    ledger.open(0, [0, 1])
    for stage in ("sampled", "scored"):
        ledger.advance(0, [0, 1], stage)
    ledger.lose(0, [1])
    ledger.advance(0, [0], "trained")
    with pytest.raises(LedgerError, match="trajectory 0 of epoch 0 cannot be made again: it is trained"):
        ledger.lose(0, [0])


def test_several_epochs_are_in_work_and_close_in_their_order():
    ledger = Ledger()
    ledger.open(0, [0, 1])
    ledger.open(1, [0, 1])
    with pytest.raises(LedgerError, match="epoch 1 was issued, but 2 is next"):
        ledger.open(1, [0])
    for stage in ("sampled", "scored", "trained"):
        ledger.advance(1, [0, 1], stage)
    with pytest.raises(LedgerError, match="epoch 1 was to be closed, but 0 is next"):
        ledger.close(1)
    # A checkpoint has the closed epochs alone: what is in work will be done again after a crash.
    assert ledger.to_json() == Ledger().to_json()
    for stage in ("sampled", "scored", "trained"):
        ledger.advance(0, [0, 1], stage)
    assert (ledger.close(0), ledger.close(1)) == (0, 0)
    assert ledger.totals["trained"] == 4 and ledger.epochs == 2


def test_a_saved_ledger_goes_on():
    ledger = Ledger()
    through(ledger, 0, [0, 1])
    again = Ledger(ledger.to_json())
    through(again, 1, [0, 1])
    assert again.totals["trained"] == 4
