import numpy as np

from diffusion.noise import select_transitions as select

IDS = range(200)


def test_all_selects_every_step_and_random_a_sorted_set_of_the_asked_size_uniformly():
    assert select("all", 0.3, 5, 0, 0, range(2)).tolist() == [[0, 1, 2, 3, 4]] * 2
    chosen = select("random", 0.4, 10, 0, 0, IDS)
    assert chosen.shape == (200, 4)
    assert (np.diff(chosen, axis=1) > 0).all()
    counts = np.bincount(chosen.ravel(), minlength=10)
    assert counts.min() > 50 and counts.max() < 110


def test_low_variance_takes_the_last_step_and_one_of_each_stretch():
    chosen = select("low_variance", 0.1, 51, 0, 0, IDS)
    assert chosen.shape == (200, 6)
    assert (chosen[:, -1] == 50).all()
    assert (chosen[:, :5] // 10 == np.arange(5)).all()


def test_a_selection_depends_on_its_trajectory_alone():
    whole = select("random", 0.5, 10, 7, 3, IDS)
    assert (select("random", 0.5, 10, 7, 3, [11, 5]) == whole[[11, 5]]).all()
    assert (select("random", 0.5, 10, 8, 3, IDS) != whole).any()
