"""What is remembered of a shared parameter stays with it when others are frozen or unfrozen."""

from __future__ import annotations

from math import hypot

import pytest
import torch
from torch import Tensor

from lightning_mtl.balancers import GramBalancer, RowBalancer, available, load
from tests.balancers.cases import losses, rows

# Which columns of 9 are shared from one step on: some are frozen, come back, come anew, and change their order.
LAYOUTS = [[0, 1, 2, 3], [0, 1, 2, 3], [3, 1], [1, 3, 8], [8, 3, 1, 0, 5], [8, 3, 1, 0, 5], [5]]
ROW_MEMORY = {"moco": "tracked", "excess_mtl": "squares", "db_mtl_average": "averages"}


def places(before: list[int], after: list[int]) -> Tensor:
    return torch.tensor([before.index(column) if column in before else -1 for column in after])


def follow(key: str, old: float, new: float, loss: float, step: int) -> float:
    """How the method's memory of one coordinate moves."""
    if key == "moco":
        return old - 0.5 / step**0.5 * (old - new)
    if key == "excess_mtl":
        return hypot(old, new)
    scaled = new / (loss + 1e-8)
    return scaled if step == 1 else 0.9 * old + 0.1 * scaled


@pytest.mark.parametrize("key", ROW_MEMORY)
def test_a_memory_of_rows_stays_with_its_columns(key):
    balancer, memory = load(key, 2), {}
    assert isinstance(balancer, RowBalancer)
    assert balancer.growing == (ROW_MEMORY[key],)
    for step, layout in enumerate(LAYOUTS, start=1):
        if step > 1:
            balancer.rearrange(places(LAYOUTS[step - 2], layout))
        # What is frozen is forgotten.
        memory = {place: value for place, value in memory.items() if place[1] in layout}
        given, values = rows(2, num=9, seed=step), losses(2, step)
        assert balancer.combine(given[:, layout], values).shape == (len(layout),)
        for task in range(2):
            for column in layout:
                old, new = memory.get((task, column), 0.0), float(given[task, column])
                memory[task, column] = follow(key, old, new, float(values[task]), step)
        expected = [[memory[task, column] for column in layout] for task in range(2)]
        assert getattr(balancer, ROW_MEMORY[key]).tolist() == [pytest.approx(row, rel=1e-6) for row in expected]


@pytest.mark.parametrize("key", ["gradvac", "metabalance"])
def test_groups_are_as_many_balancers_each_with_its_own_memory(key):
    options = {"beta": 0.4, "every_n_steps": 1}
    balancer = load(key, 2, granularity="tensor", **options)
    assert isinstance(balancer, GramBalancer)
    apart: dict[int, GramBalancer] = {}
    for step, layout in enumerate(LAYOUTS, start=1):
        if step > 1:
            balancer.rearrange(places(LAYOUTS[step - 2], layout))
        apart = {group: apart.get(group) or load(key, 2, granularity="whole", **options) for group in layout}
        parts = {group: rows(2, num=3, seed=10 * step + group) for group in layout}
        found = balancer.combine(torch.cat([*parts.values()], dim=1), losses(2), sizes=[3] * len(layout))
        expected = torch.cat([apart[group].combine(part, losses(2)) for group, part in parts.items()])
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("key", ["gradvac", "metabalance"])
def test_a_new_group_has_weight_1_until_the_next_solve(key):
    balancer = load(key, 2, granularity="tensor", every_n_steps=4)
    balancer.combine(rows(2), losses(2), sizes=[3, 4])
    weights = balancer.last_weights.clone()
    balancer.rearrange(torch.tensor([1, -1, 0]))
    assert torch.equal(balancer.reuse(), torch.stack([weights[1], torch.ones(2), weights[0]]))


@pytest.mark.parametrize("key", [*ROW_MEMORY, "gradvac", "metabalance"])
def test_before_the_first_step_there_is_nothing_to_bring(key):
    options = {"granularity": "tensor"} if key in ("gradvac", "metabalance") else {}
    sizes = {"sizes": [1] * 7} if options else {}
    balancer, fresh = load(key, 2, **options), load(key, 2, **options)
    balancer.rearrange(torch.tensor([4, 0, -1]))
    assert torch.equal(balancer.combine(rows(2), losses(2), **sizes), fresh.combine(rows(2), losses(2), **sizes))


@pytest.mark.parametrize("key", [key for key in available() if not load(key, 2).growing])
def test_without_such_a_memory_nothing_happens(key):
    balancer = load(key, 2)
    before = {name: value.clone() for name, value in balancer.state_dict().items()}
    balancer.rearrange(torch.tensor([5, -1]))
    after = balancer.state_dict()
    assert all(torch.equal(value.nan_to_num(-7), after[name].nan_to_num(-7)) for name, value in before.items())


@pytest.mark.parametrize("kept", [[7], [-2, 0], [0.0, 1.0], [[0]]])
def test_what_is_no_place_is_refused(kept):
    balancer = load("moco", 2)
    balancer.combine(rows(2), losses(2))
    with pytest.raises(ValueError, match=r"^MoCo: `kept` must hold places from 0 to 6, or -1, got .*\. .*\.$"):
        balancer.rearrange(torch.tensor(kept))
    assert balancer.tracked.shape == (2, 7)


def test_after_a_checkpoint_it_goes_on():
    one, other = load("moco", 2), load("moco", 2)
    one.combine(rows(2), losses(2))
    other.load_state_dict(one.state_dict())
    for balancer in (one, other):
        balancer.rearrange(torch.tensor([6, -1, 0]))
    assert torch.equal(one.combine(rows(2, num=3), losses(2)), other.combine(rows(2, num=3), losses(2)))
