"""The sum of logarithms: weights by hand, and what it does to units."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_mtl.balancers import GeometricMean, LogSum
from tests.balancers.cases import losses


@pytest.mark.parametrize("num_tasks", [1, 2, 5])
def test_objective_and_weights(num_tasks):
    values = losses(num_tasks).tolist()
    balancer = LogSum(num_tasks)
    assert balancer(losses(num_tasks)).item() == pytest.approx(sum(math.log(value) for value in values), rel=1e-12)
    assert balancer.weights(losses(num_tasks)).tolist() == pytest.approx([1 / value for value in values], rel=1e-12)


def test_it_is_the_geometric_mean_up_to_one_factor():
    ours, other = LogSum(4).weights(losses(4)), GeometricMean(4).weights(losses(4))
    torch.testing.assert_close(other, ours * GeometricMean(4)(losses(4)) / 4, rtol=1e-12, atol=0)


@pytest.mark.parametrize("factor", [1e-20, 1e20])
def test_the_unit_of_a_loss_changes_no_update(factor):
    units = torch.tensor([factor, 1.0, 3.0], dtype=torch.float64)
    after = LogSum(3).weights(units * losses(3)) * units
    torch.testing.assert_close(after, LogSum(3).weights(losses(3)), rtol=1e-12, atol=0)


@pytest.mark.parametrize("offset", [-5.0, [-5.0, 0.0], {"a": -5.0}])
def test_an_offset_takes_losses_that_go_negative(offset):
    balancer = LogSum(2, loss_offset=offset)
    balancer.bind(["a", "b"])
    assert balancer.weights(torch.tensor([-3.0, 5.0]))[0].item() == pytest.approx(0.5)


@pytest.mark.parametrize("bad", [-1e-6, -1.0])
def test_a_loss_below_its_offset_is_refused_in_any_step(bad):
    balancer = LogSum(2)
    balancer(torch.ones(2))
    with pytest.raises(ValueError, match=r"LogSum: `losses` must be >= 0 .* Pass loss_offset= with"):
        balancer(torch.tensor([1.0, bad]))
    assert LogSum(2, loss_offset=2 * bad).weights(torch.tensor([1.0, bad])).isfinite().all()


def test_an_absent_task_may_have_any_loss():
    assert LogSum(2).weights(torch.tensor([2.0, -1.0]), torch.tensor([True, False])).tolist() == [0.5, 0]


def test_offsets_by_name_need_the_names():
    with pytest.raises(ValueError, match=r"LogSum: `loss_offset` must be .* Call bind\(names\) first"):
        LogSum(2, loss_offset={"a": 1.0})(torch.ones(2))
    with pytest.raises(ValueError, match=r"`loss_offset` must be finite"):
        LogSum(2, loss_offset=float("nan"))
