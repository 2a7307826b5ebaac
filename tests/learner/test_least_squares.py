"""The solver of learner.optimizer=natural against dense algebra, and what it does with noise."""

import numpy as np
import pytest
import torch

from learner.least_squares import columns, scale, solve


def problem(seed: int, n: int = 40, p: int = 60, noise: float = 0.5, groups: int = 0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, p, generator=generator, dtype=torch.float64)
    truth = torch.zeros(p, dtype=torch.float64)
    truth[:3] = 1.0
    index = torch.arange(n) % groups if groups else torch.full((n,), -1)
    errors = rows @ truth + noise * torch.randn(n, generator=generator, dtype=torch.float64)
    return rows, errors + (3.0 * index if groups else 0.0), index


def dense(rows, errors, index, ridge):
    """Ridge regression with free intercepts, by its normal equations: parameters and intercepts."""
    indicator = (
        torch.nn.functional.one_hot(index.clamp(min=0)).double() if index.max() >= 0 else rows.new_zeros(len(rows), 0)
    )
    design = torch.cat([rows, indicator], 1)
    penalty = torch.diag(torch.cat([torch.full((rows.shape[1],), ridge), torch.zeros(indicator.shape[1])]).double())
    return torch.linalg.lstsq(design.T @ design + penalty, design.T @ errors).solution, design


@pytest.mark.parametrize("groups", [0, 1, 4])
def test_equals_a_dense_solution_and_leave_one_out_is_leaving_out(groups):
    rows, errors, index = problem(0, groups=groups)
    found = solve(rows @ rows.T, errors, columns(index))
    step = rows.T @ found.coefficients
    expected, _ = dense(rows, errors, index, found.ridge)
    torch.testing.assert_close(step, expected[: rows.shape[1]], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found.free, expected[rows.shape[1] :], rtol=1e-6, atol=1e-8)
    left, alone = 0.0, 0.0
    for i in range(len(errors)):
        others = np.delete(np.arange(len(errors)), i)
        solution, _ = dense(rows[others], errors[others], index[others], found.ridge)
        design = torch.cat(
            [rows[i], torch.nn.functional.one_hot(index[i].clamp(min=0), max(groups, 1)).double()[:groups]]
        )
        left += float((errors[i] - design @ solution) ** 2)
        same = others[(index[others] == index[i]).numpy()]
        alone += float((errors[i] - (errors[same].mean() if groups else 0.0)) ** 2)
    assert found.explained == pytest.approx(1 - left / alone, rel=1e-6)
    assert found.explained > 0.2


def test_no_step_on_pure_noise():
    explained = []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        rows, errors = torch.randn(80, 200, generator=generator), torch.randn(80, generator=generator)
        found = solve(rows @ rows.T, errors, torch.ones(80, 1))
        explained.append(found.explained)
        assert (found.coefficients == 0).all() == (found.explained == 0)
    assert sum(value == 0 for value in explained) >= 18 and max(explained) < 0.15


def test_a_row_alone_in_its_group_and_rows_without_length_say_nothing():
    rows, errors, _ = problem(1, n=6)
    assert (solve(rows @ rows.T, errors, columns(torch.arange(6))).coefficients == 0).all()
    found = solve(torch.zeros(6, 6), errors, torch.ones(6, 1))
    assert (found.coefficients == 0).all() and found.explained == 0


def test_parameters_are_scaled_to_equal_information_down_to_a_floor():
    information = torch.tensor([4.0, 1.0, 0.01, 0.0])
    assert scale(information, [1, 2, 1, 1], 1.0).tolist() == [0.5, 1.0, 1.0, 1.0, 1.0]
    assert scale(information, [1, 2, 1, 1], 0.05).tolist() == pytest.approx([0.5, 1.0, 1.0, 0.05**-0.5, 0.05**-0.5])


def test_a_free_column_is_held_by_no_ridge():
    """As the scaling of the present adapter: found whole where rows alone shrink it."""
    rows, _, _ = problem(2, n=200, p=400, noise=0.0)
    generator = torch.Generator().manual_seed(5)
    along = rows @ torch.randn(400, generator=generator, dtype=torch.float64) / 20
    errors = -0.4 * along + 0.5 * torch.randn(200, generator=generator, dtype=torch.float64) + 2.0
    found = solve(rows @ rows.T, errors, torch.stack([torch.ones(200), along], 1))
    assert found.free[0].item() == pytest.approx(2.0, abs=0.15) and found.free[1].item() == pytest.approx(
        -0.4, abs=0.15
    )
