"""ExcessMTL against its algorithm, step by step."""

from __future__ import annotations

import pytest
import torch

from lightning_mtl.balancers import ExcessMTL
from tests.balancers import oracles
from tests.balancers.cases import losses, rows


@pytest.mark.parametrize("eta, warmup_steps", [(1.0, 0), (0.01, 0), (5.0, 3)])
@pytest.mark.parametrize("num_tasks", [1, 2, 4])
def test_equals_the_algorithm(num_tasks, eta, warmup_steps):
    balancer = ExcessMTL(num_tasks, eta=eta, warmup_steps=warmup_steps)
    steps = [list(rows(num_tasks, seed=seed)) for seed in range(12)]
    for given, weights in zip(steps, oracles.excess_mtl(steps, eta, warmup_steps), strict=True):
        update = balancer.combine(torch.stack(given), losses(num_tasks))
        assert balancer.last_weights.tolist() == pytest.approx(weights, rel=1e-9)
        torch.testing.assert_close(update, oracles.weighted_sum(weights, given), rtol=1e-9, atol=1e-9)


def test_the_weights_are_equal_up_to_the_reference():
    balancer = ExcessMTL(3, warmup_steps=4)
    for seed in range(5):
        balancer.combine(rows(3, seed=seed), losses(3))
        assert balancer.last_weights.tolist() == pytest.approx([1 / 3] * 3)
        assert bool((balancer.first > 0).all()) == (seed == 4)
    balancer.combine(rows(3, seed=5), losses(3))
    assert balancer.last_weights.unique().numel() == 3


def test_the_task_that_stays_far_gains_weight():
    balancer = ExcessMTL(2, eta=0.3)
    for step in range(20):
        far, near = rows(2, seed=step)
        balancer.combine(torch.stack([far, near / (1 + step)]), losses(2))
    assert balancer.last_weights[0] > 0.9


def test_a_task_counts_its_own_steps():
    """A task that joins late has its reference then, and equal growth cannot come from the others' counter."""
    balancer = ExcessMTL(2, warmup_steps=1)
    for seed in range(4):
        balancer.combine(rows(2, seed=seed), losses(2), torch.tensor([True, False]))
    assert (balancer.seen.tolist(), float(balancer.first[1])) == ([4, 0], 0)
    for _ in range(2):
        balancer.combine(rows(2), losses(2))
    assert float(balancer.first[1]) == pytest.approx(float(rows(2)[1].abs().sum()) / 2**0.5)


def test_the_step_that_sets_a_reference_moves_no_weight():
    balancer = ExcessMTL(2, eta=0.7)
    for seed in range(4):
        balancer.combine(rows(2, seed=seed), losses(2), torch.tensor([True, False]))
    one = torch.stack([rows(2, seed=seed)[0] for seed in [0, 1, 2, 3, 9]])
    balancer.combine(rows(2, seed=9), losses(2))
    growth = 0.7 * float((one[4] ** 2 / (one**2).sum(0).sqrt()).sum() / one[0].abs().sum())
    assert float((balancer.last_weights[0] / balancer.last_weights[1]).log()) == pytest.approx(growth)


def test_absent_tasks_keep_their_share():
    balancer = ExcessMTL(3)
    for seed in range(5):
        balancer.combine(rows(3, seed=seed), losses(3))
    before = balancer.task_weights.clone()
    balancer.combine(rows(3), losses(3), torch.tensor([True, False, True]))
    assert balancer.task_weights[1] == before[1]
    assert float(balancer.task_weights.sum()) == pytest.approx(1)
    assert balancer.last_weights[[0, 2]].tolist() == pytest.approx(
        (balancer.task_weights[[0, 2]] / (1 - before[1])).tolist()
    )


def test_small_gradients_in_float32():
    """Squares of 1e-30 are 0 in float32; the estimates are not."""
    one, other = ExcessMTL(2), ExcessMTL(2)
    for seed in range(4):
        one.combine(rows(2, seed=seed), losses(2))
        other.combine((1e-30 * rows(2, seed=seed)).float(), losses(2))
    assert other.last_weights.tolist() == pytest.approx(one.last_weights.tolist(), rel=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"eta": 0.0}, r"`eta` must be a finite number > 0, got 0\.0\. .*\."),
        ({"eta": float("nan")}, r"`eta` must be a finite number > 0, got nan\. .*\."),
        ({"warmup_steps": -1}, r"`warmup_steps` must be an integer >= 0, got -1\. .*\."),
        ({"warmup_steps": 1.5}, r"`warmup_steps` must be an integer >= 0, got 1\.5\. .*\."),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=f"^ExcessMTL: {message}$"):
        ExcessMTL(2, **options)
