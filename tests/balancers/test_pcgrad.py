"""PCGrad against algorithm 1 on raw vectors."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from lightning_mtl.balancers import PCGrad
from tests.balancers import oracles
from tests.balancers.cases import losses, rows


def conflicting(num_tasks: int, seed: int):
    """In few dimensions nearly every pair of many tasks conflicts somewhere."""
    return rows(num_tasks, num=max(2, num_tasks - 2), seed=seed)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("num_tasks", [1, 2, 3, 4, 7])
def test_equals_algorithm_1_with_the_same_orders(num_tasks, seed):
    balancer, given = PCGrad(num_tasks, seed=seed), conflicting(num_tasks, seed)
    for _ in range(3):
        orders = balancer._orders(num_tasks).tolist() if num_tasks > 1 else [[]]
        update, weights = oracles.pcgrad(list(given), orders)
        solved = PCGrad(num_tasks, seed=seed)
        solved.load_state_dict(balancer.state_dict())
        assert solved(given @ given.T, losses(num_tasks)).tolist() == pytest.approx(weights, rel=1e-9, abs=1e-9)
        found = balancer.combine(given, losses(num_tasks))
        torch.testing.assert_close(found, update, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_two_tasks_in_closed_form(seed):
    a, b = rows(2, num=2, seed=seed)
    inner = min(float(a @ b), 0.0)
    expected = a - inner / float(b @ b) * b + b - inner / float(a @ a) * a
    torch.testing.assert_close(PCGrad(2).combine(torch.stack([a, b]), torch.ones(2)), expected)


def test_the_order_matters_with_three_tasks():
    given = conflicting(3, seed=3)
    updates = {tuple(PCGrad(3, seed=s).combine(given, losses(3)).round(decimals=6).tolist()) for s in range(20)}
    assert len(updates) > 1


@pytest.mark.parametrize("num_tasks", [2, 3, 6])
def test_each_order_holds_every_other_task_once(num_tasks):
    for step, order in [(s, o) for s in range(10) for o in enumerate(_orders(num_tasks, s))]:
        task, others = order
        assert sorted([*others, task]) == list(range(num_tasks)), step


def _orders(num_tasks: int, step: int, seed: int = 0) -> list[list[int]]:
    balancer = PCGrad(num_tasks, seed=seed)
    balancer.step.fill_(step)
    return balancer._orders(num_tasks).tolist()


def test_orders_change_with_the_step_and_the_seed():
    assert len({str(_orders(5, step)) for step in range(10)}) == 10
    assert len({str(_orders(5, 0, seed)) for seed in range(10)}) == 10


def test_no_order_is_preferred():
    counts = Counter(tuple(_orders(3, step)[task]) for step in range(600) for task in range(3))
    assert len(counts) == 6
    assert all(240 <= count <= 360 for count in counts.values())  # 300 expected, five standard deviations


def test_orders_go_on_after_a_resume():
    whole, first, resumed = PCGrad(5, seed=3), PCGrad(5, seed=3), PCGrad(5, seed=3)
    given = conflicting(5, seed=0)
    expected = [whole.combine(given, losses(5)) for _ in range(8)]
    found = [first.combine(given, losses(5)) for _ in range(3)]
    resumed.load_state_dict(first.state_dict())
    found += [resumed.combine(given, losses(5)) for _ in range(5)]
    assert torch.equal(torch.stack(found), torch.stack(expected))


def test_a_skipped_step_takes_no_order():
    one, other, given = PCGrad(5), PCGrad(5), conflicting(5, seed=0)
    one(torch.full((5, 5), torch.inf), losses(5))
    assert torch.equal(one.combine(given, losses(5)), other.combine(given, losses(5)))


def test_orders_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    PCGrad(4).combine(rows(4), losses(4))
    assert torch.equal(torch.get_rng_state(), before)
