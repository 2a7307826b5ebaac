import numpy as np
import pytest

from evaluation.metrics import paired_interval


def test_interval_holds_the_true_shift_and_uses_the_pairing():
    rng = np.random.default_rng(0)
    before = rng.normal(0, 10, 200)
    after = before + 0.5 + rng.normal(0, 0.1, 200)
    low, high = paired_interval(before, after)
    assert 0.45 < low < 0.5 < high < 0.55


def test_no_shift_includes_zero_and_unpaired_samples_are_refused():
    rng = np.random.default_rng(1)
    low, high = paired_interval(rng.normal(size=100), rng.normal(size=100))
    assert low < 0 < high
    with pytest.raises(ValueError, match="paired"):
        paired_interval(np.zeros(3), np.zeros(4))
