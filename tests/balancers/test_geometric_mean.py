"""The geometric mean against the root of the product."""

from __future__ import annotations

import pytest
import torch

from lightning_mtl.balancers import GeometricMean
from tests.balancers import oracles
from tests.balancers.cases import losses


@pytest.mark.parametrize("num_tasks", [1, 2, 5])
def test_objective_and_weights(num_tasks):
    leaf = losses(num_tasks).requires_grad_()
    expected = oracles.geometric_mean(leaf)
    expected.backward()
    balancer = GeometricMean(num_tasks)
    assert balancer(losses(num_tasks)).item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(balancer.weights(losses(num_tasks)), leaf.grad, rtol=1e-12, atol=0)


def test_weights_in_closed_form():
    assert GeometricMean(2).weights(torch.tensor([2.0, 8.0])).tolist() == pytest.approx([1.0, 0.25])


@pytest.mark.parametrize("factor", [1e-3, 50.0])
def test_the_unit_of_one_loss_scales_the_update_by_its_root(factor):
    units = torch.tensor([factor, 1.0, 1.0], dtype=torch.float64)
    before = GeometricMean(3).weights(losses(3))
    after = GeometricMean(3).weights(units * losses(3)) * units
    torch.testing.assert_close(after, before * factor ** (1 / 3), rtol=1e-12, atol=0)


@pytest.mark.parametrize("many", [300, 1000])
def test_a_product_that_no_float_can_hold(many):
    assert GeometricMean(many)(torch.full((many,), 1e-4)).item() == pytest.approx(1e-4, rel=1e-3)


@pytest.mark.parametrize("offset", [-5.0, [-5.0, -5.0], {"a": -5.0, "b": -5.0}])
def test_an_offset_takes_losses_that_go_negative(offset):
    balancer = GeometricMean(2, loss_offset=offset)
    balancer.bind(["a", "b"])
    assert balancer(torch.tensor([-3.0, 3.0])).item() == pytest.approx(4.0)
    assert balancer.weights(torch.tensor([-3.0, 3.0])).tolist() == pytest.approx([1.0, 0.25])


@pytest.mark.parametrize("bad", [-1e-6, -1.0])
def test_a_loss_below_its_offset_is_refused_in_any_step(bad):
    balancer = GeometricMean(2)
    balancer(torch.ones(2))
    with pytest.raises(ValueError, match=r"GeometricMean: `losses` must be >= 0 .* Pass loss_offset= with"):
        balancer(torch.tensor([1.0, bad]))
    assert GeometricMean(2, loss_offset=2 * bad).weights(torch.tensor([1.0, bad])).isfinite().all()


def test_offsets_by_name_need_the_names():
    with pytest.raises(ValueError, match=r"GeometricMean: `loss_offset` must be .* Call bind\(names\) first"):
        GeometricMean(2, loss_offset={"a": 1.0})(torch.ones(2))
    with pytest.raises(ValueError, match=r"`loss_offset` must be finite"):
        GeometricMean(2, loss_offset=float("nan"))
