"""The trimmed mean against SciPy's."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import trim_mean

from lightning_mtl.balancers import TrimmedMean
from tests.balancers.cases import losses, rows


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("num_tasks, num_trimmed", [(1, 0), (2, 0), (3, 1), (5, 1), (5, 2), (8, 3)])
def test_equals_scipys(num_tasks, num_trimmed, seed):
    given = rows(num_tasks, seed=seed)
    expected = trim_mean(given.numpy(), (num_trimmed + 0.5) / num_tasks, axis=0)
    found = TrimmedMean(num_tasks, num_trimmed=num_trimmed).combine(given, losses(num_tasks))
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-12, atol=1e-12)


def test_one_less_than_half_is_the_median():
    given = rows(5)
    torch.testing.assert_close(TrimmedMean(5, num_trimmed=2).combine(given, losses(5)), given.median(0).values)


def test_a_few_wild_gradients_do_not_matter():
    given = rows(5)
    wild = given.clone()
    wild[1], wild[3] = 1e6 + given[1].abs(), -1e6 - given[3].abs()
    update = TrimmedMean(5, num_trimmed=2).combine(wild, losses(5))
    others = given[[0, 2, 4]]
    assert ((update >= others.min(0).values) & (update <= others.max(0).values)).all()


@pytest.mark.parametrize("others, trimmed", [(4, 1), (3, 1), (2, 0), (1, 0)])
def test_with_fewer_tasks_as_many_are_trimmed_as_leave_one(others, trimmed):
    present = torch.tensor([task < others for task in range(5)])
    found = TrimmedMean(5, num_trimmed=2).combine(rows(5), losses(5), present)
    expected = trim_mean(rows(5)[:others].numpy(), (trimmed + 0.5) / others, axis=0)
    torch.testing.assert_close(found, torch.from_numpy(expected))


def test_equal_gradients_count_one_by_one():
    given = torch.tensor([[1.0], [1.0], [1.0], [9.0]], dtype=torch.float64)
    assert TrimmedMean(4, num_trimmed=1).combine(given, losses(4)).tolist() == [1.0]


@pytest.mark.parametrize(
    "num_tasks, num_trimmed, message",
    [
        (4, 2, r"be less than half the number of tasks, 4, got 2\. .*\."),
        (1, 1, r"be less than half the number of tasks, 1, got 1\. .*\."),
        (4, -1, r"be an integer >= 0, got -1\. .*\."),
        (4, 0.5, r"be an integer >= 0, got 0\.5\. .*\."),
    ],
)
def test_bad_arguments(num_tasks, num_trimmed, message):
    with pytest.raises(ValueError, match=f"^TrimmedMean: `num_trimmed` must {message}$"):
        TrimmedMean(num_tasks, num_trimmed=num_trimmed)
