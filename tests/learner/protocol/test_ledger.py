import pytest

from learner.protocol.ledger import Ledger, LedgerError

STAGES = ("sampled", "scored", "trained")


def issued(epochs: int = 1, ids: tuple[int, ...] = (0, 1)) -> Ledger:
    ledger = Ledger()
    for epoch in range(epochs):
        ledger.open(epoch, ids)
    return ledger


def advance(ledger: Ledger, epoch: int, ids: list[int], stages: tuple[str, ...] = STAGES) -> None:
    for stage in stages:
        ledger.advance(epoch, ids, stage)


def through(ledger: Ledger, epoch: int, ids: list[int]) -> None:
    ledger.open(epoch, ids)
    advance(ledger, epoch, ids)
    ledger.close(epoch)


def test_every_trajectory_is_counted_once_at_every_stage():
    ledger = Ledger()
    through(ledger, 0, [0, 1, 2])
    through(ledger, 1, [0, 1, 2])
    assert ledger.epochs == 2
    assert ledger.totals == {"issued": 6, "sampled": 6, "scored": 6, "trained": 6, "quarantined": 0, "lost": 0}


def test_a_lost_chunk_is_made_again_and_counted():
    ledger = issued(ids=(0, 1, 2, 3))
    ledger.advance(0, [0, 1], "sampled")
    ledger.lose(0, [0, 1])  # after sampling
    ledger.lose(0, [2, 3])  # before
    advance(ledger, 0, [0, 1, 2, 3])
    assert ledger.close(0) == 4
    assert ledger.totals["sampled"] == 4 and ledger.totals["lost"] == 4


@pytest.mark.parametrize(
    ("stages", "ids", "stage", "said"),
    [
        ((), [0], "scored", "trajectory 0 of epoch 0 was to be scored, but is issued"),
        (("sampled",), [0], "sampled", "but is sampled"),
        (STAGES, [0], "trained", "but is trained"),
        ((), [7], "sampled", "trajectory 7 of epoch 0 was to be sampled, but was never issued"),
    ],
)
def test_what_is_out_of_order_is_refused_by_name(stages, ids, stage, said):
    ledger = issued()
    advance(ledger, 0, [0], stages)
    with pytest.raises(LedgerError, match=said):
        ledger.advance(0, ids, stage)


def test_only_what_is_scored_is_quarantined_and_then_the_epoch_closes():
    ledger = issued()
    with pytest.raises(LedgerError, match="trajectory 0 of epoch 0 was to be quarantined, but is issued"):
        ledger.set_aside(0, [0])
    advance(ledger, 0, [0, 1], STAGES[:2])
    ledger.set_aside(0, [1])
    ledger.advance(0, [0], "trained")
    ledger.close(0)
    assert ledger.totals == {"issued": 2, "sampled": 2, "scored": 2, "trained": 1, "quarantined": 1, "lost": 0}


def test_an_epoch_does_not_close_before_all_is_trained():
    ledger = issued()
    advance(ledger, 0, [0])
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
    ledger = issued()
    advance(ledger, 0, [0, 1], STAGES[:2])
    ledger.lose(0, [1])
    ledger.advance(0, [0], "trained")
    with pytest.raises(LedgerError, match="trajectory 0 of epoch 0 cannot be made again: it is trained"):
        ledger.lose(0, [0])


def test_several_epochs_are_in_work_and_close_in_their_order():
    ledger = issued(epochs=2)
    with pytest.raises(LedgerError, match="epoch 1 was issued, but 2 is next"):
        ledger.open(1, [0])
    advance(ledger, 1, [0, 1])
    with pytest.raises(LedgerError, match="epoch 1 was to be closed, but 0 is next"):
        ledger.close(1)
    # A checkpoint has the closed epochs alone: what is in work will be done again after a crash.
    assert ledger.to_json() == Ledger().to_json()
    advance(ledger, 0, [0, 1])
    assert (ledger.close(0), ledger.close(1)) == (0, 0)
    assert ledger.totals["trained"] == 4 and ledger.epochs == 2


def test_a_saved_ledger_goes_on():
    ledger = Ledger()
    through(ledger, 0, [0, 1])
    again = Ledger(ledger.to_json())
    through(again, 1, [0, 1])
    assert again.totals["trained"] == 4
