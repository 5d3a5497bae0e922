"""MoDo against its algorithm on two samples."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_mtl.balancers import MoDo, load
from tests.balancers import oracles
from tests.balancers.cases import losses, rows

PROJECTIONS = {"simplex": oracles.nearest_on_simplex, "softmax": oracles.softmax}


def samples(num_tasks: int, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients of the tasks on two samples that have something in common."""
    common = rows(num_tasks, seed=seed)
    return list(common + rows(num_tasks, seed=500 + seed)), list(common + rows(num_tasks, seed=900 + seed))


def halves(one: list[Tensor], other: list[Tensor]) -> Tensor:
    """What the engine gives: each half's loss is half of the task's, which is the mean over the batch."""
    return torch.stack([*one, *other]) / 2


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("gamma, rho", [(0.1, 0.0), (0.01, 0.5), (1.0, 0.1)])
@pytest.mark.parametrize("num_tasks", [1, 2, 4])
def test_equals_the_algorithm(num_tasks, gamma, rho, projection):
    balancer = MoDo(num_tasks, gamma=gamma, rho=rho, projection=projection)
    steps = [samples(num_tasks, seed) for seed in range(10)]
    expected = oracles.modo(steps, gamma, rho, PROJECTIONS[projection])
    for (one, other), weights in zip(steps, expected, strict=True):
        update = balancer.combine(halves(one, other), losses(num_tasks))
        assert balancer.last_weights.tolist() == pytest.approx(weights, rel=1e-9, abs=1e-12)
        mean = [(a + b) / 2 for a, b in zip(one, other, strict=True)]
        torch.testing.assert_close(update, oracles.weighted_sum(weights, mean), rtol=1e-9, atol=1e-9)


def test_the_defaults():
    one, other = MoDo(3), MoDo(3, gamma=0.1, rho=0.0, projection="simplex")
    for seed in range(4):
        given = halves(*samples(3, seed))
        assert torch.equal(one.combine(given, losses(3)), other.combine(given, losses(3)))


def test_equal_halves_lead_to_mgda():
    balancer, given = MoDo(3, gamma=0.05), rows(3)
    for _ in range(2000):
        update = balancer.combine(halves(list(given), list(given)), losses(3))
    torch.testing.assert_close(update, load("mgda", 3).combine(given, losses(3)), rtol=1e-6, atol=1e-6)


def test_absent_tasks_keep_their_share():
    balancer = MoDo(3, gamma=0.01)
    balancer.combine(halves(*samples(3, 0)), losses(3))
    before = balancer.task_weights.clone()
    balancer.combine(halves(*samples(3, 1)), losses(3), torch.tensor([True, False, True]))
    assert balancer.task_weights[1] == before[1]
    assert float(balancer.task_weights.sum()) == pytest.approx(1)
    assert float(balancer.last_weights[[0, 2]].sum()) == pytest.approx(1)


def test_rows_of_one_half_only_are_refused():
    with pytest.raises(ValueError, match=r"^MoDo: `rows` must have shape \[T, N\] with T = 6, got \[3, 7\]\. .*\.$"):
        MoDo(3).combine(rows(3), losses(3))


def test_features_have_no_halves():
    with pytest.raises(
        ValueError, match=r"^MoDo: `level` must be 'parameters' for this method, got 'features'\. .*\.$"
    ):
        MoDo(3).check_level("features")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"gamma": 0.0}, r"`gamma` must be a finite number > 0, got 0\.0\. .*\."),
        ({"rho": -1.0}, r"`rho` must be a finite number >= 0, got -1\.0\. .*\."),
        ({"projection": "ball"}, r"`projection` must be one of 'simplex', 'softmax', got 'ball'\. .*\."),
        ({"every_n_steps": 0}, r"`every_n_steps` must be an integer >= 1, got 0\. .*\."),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=f"^MoDo: {message}$"):
        MoDo(2, **options)
