"""MoCo against its algorithm, step by step, with a projection of its own."""

from __future__ import annotations

import pytest
import torch

from lightning_mtl.balancers import MoCo, load
from tests.balancers import oracles
from tests.balancers.cases import losses, rows

PROJECTIONS = {"simplex": oracles.nearest_on_simplex, "softmax": oracles.softmax}


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize(
    "options",
    [
        {"beta": 0.5, "beta_decay": 0.5, "gamma": 0.1, "gamma_decay": 0.5, "rho": 0.0},
        {"beta": 0.9, "beta_decay": 0.0, "gamma": 0.02, "gamma_decay": 1.0, "rho": 0.3},
    ],
)
@pytest.mark.parametrize("num_tasks", [1, 2, 4])
def test_equals_the_algorithm(num_tasks, options, projection):
    balancer = MoCo(num_tasks, projection=projection, **options)
    steps = [list(rows(num_tasks, seed=seed)) for seed in range(12)]
    for given, update in zip(steps, oracles.moco(steps, projection=PROJECTIONS[projection], **options), strict=True):
        found = balancer.combine(torch.stack(given), losses(num_tasks))
        torch.testing.assert_close(found, update, rtol=1e-9, atol=1e-9)


def test_the_defaults():
    options = {"beta": 0.5, "beta_decay": 0.5, "gamma": 0.1, "gamma_decay": 0.5, "rho": 0.0}
    one, other = MoCo(3), MoCo(3, projection="simplex", **options)
    for seed in range(4):
        given = rows(3, seed=seed)
        assert torch.equal(one.combine(given, losses(3)), other.combine(given, losses(3)))


def test_gradients_that_stay_lead_to_mgda():
    """With the gradients known exactly, the weights go to the point of smallest norm."""
    balancer, given = MoCo(3, beta=1.0, beta_decay=0.0, gamma=0.05, gamma_decay=0.0), rows(3)
    for _ in range(2000):
        update = balancer.combine(given, losses(3))
    torch.testing.assert_close(update, load("mgda", 3).combine(given, losses(3)), rtol=1e-6, atol=1e-6)


def test_noise_is_averaged_away():
    """The reason for the memory: the tracked gradients are closer to the true ones than those of a batch."""
    balancer, true = MoCo(2, beta=1.0), rows(2, num=50)
    for seed in range(300):
        balancer.combine(true + 2 * rows(2, num=50, seed=1 + seed), losses(2))
    assert ((balancer.tracked - true).norm() / (2 * rows(2, num=50, seed=1).norm())) < 0.3


def test_a_task_that_comes_late_starts_with_its_own_counter():
    balancer = MoCo(2, beta=0.8, beta_decay=1.0)
    for seed in range(3):
        balancer.combine(rows(2, seed=seed), losses(2), torch.tensor([True, False]))
    balancer.combine(rows(2, seed=3), losses(2))
    torch.testing.assert_close(balancer.tracked[1], 0.8 * rows(2, seed=3)[1])
    assert balancer.seen.tolist() == [4, 1]


def test_absent_tasks_keep_their_share():
    balancer = MoCo(3, gamma=0.01)
    for seed in range(5):
        balancer.combine(rows(3, seed=seed), losses(3))
    before = balancer.task_weights.clone()
    balancer.combine(rows(3), losses(3), torch.tensor([True, False, True]))
    assert balancer.task_weights[1] == before[1]
    assert float(balancer.task_weights.sum()) == pytest.approx(1)
    assert float(balancer.last_weights[[0, 2]].sum()) == pytest.approx(1)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"beta": 0.0}, r"`beta` must be a finite number > 0 and <= 1, got 0\.0\. .*\."),
        ({"beta": 1.1}, r"`beta` must be a finite number > 0 and <= 1, got 1\.1\. .*\."),
        ({"gamma": 0.0}, r"`gamma` must be a finite number > 0, got 0\.0\. .*\."),
        ({"beta_decay": -0.5}, r"`beta_decay` must be a finite number >= 0, got -0\.5\. .*\."),
        ({"gamma_decay": -0.5}, r"`gamma_decay` must be a finite number >= 0, got -0\.5\. .*\."),
        ({"rho": -1.0}, r"`rho` must be a finite number >= 0, got -1\.0\. .*\."),
        ({"projection": "ball"}, r"`projection` must be one of 'simplex', 'softmax', got 'ball'\. .*\."),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=f"^MoCo: {message}$"):
        MoCo(2, **options)
