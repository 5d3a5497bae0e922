"""PBI against its two distances, written with loops."""

from __future__ import annotations

import pytest
import torch

from lightning_mtl.balancers import PBI
from tests.balancers import oracles
from tests.balancers.cases import losses


@pytest.mark.parametrize("theta", [0.0, 0.5, 5.0])
@pytest.mark.parametrize("weights, reference", [(None, None), ([1.0, 2.0, 7.0], [-1.0, 0.0, 0.05])])
def test_objective_and_weights(weights, reference, theta):
    leaf = losses(3).requires_grad_()
    expected = oracles.pbi(leaf, weights or [1.0] * 3, reference or [0.0] * 3, theta)
    expected.backward()
    balancer = PBI(3, weights, theta, reference)
    assert balancer(losses(3)).item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(balancer.weights(losses(3)), leaf.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("size", [1e-20, 0.3, 1e20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_on_the_ray_the_distance_has_no_say(dtype, size):
    ray = torch.tensor([1.0, 2.0, 7.0], dtype=dtype)
    weights = PBI(3, ray.tolist(), theta=100.0).weights(size * ray)
    torch.testing.assert_close(weights, ray / ray.norm())


def test_a_loss_too_small_for_its_place_is_let_go():
    assert PBI(2).weights(torch.tensor([0.1, 2.0]))[0] < 0


def test_past_the_reference_it_goes_on_down():
    """With the absolute value of the published formula the weights would turn round here."""
    assert (PBI(2, theta=0.5).weights(torch.tensor([-1.0, -1.1])) > 0).all()


def test_descent_ends_on_the_ray():
    balancer, given = PBI(2, [1.0, 3.0]), torch.tensor([4.0, 1.0], dtype=torch.float64)
    for _ in range(1500):
        given = given - 1e-3 * balancer.weights(given)
    assert float(given[1] / given[0]) == pytest.approx(3.0, rel=0.05)


def test_losses_at_the_reference():
    weights = PBI(2, reference=1.0).weights(torch.ones(2))
    assert weights.tolist() == pytest.approx([0.5**0.5] * 2)


def test_settings_by_name():
    named = PBI(2, {"b": 3.0}, reference={"a": -1.0})
    with pytest.raises(ValueError, match=r"PBI: `preference` must be .* Call bind\(names\) first"):
        named(torch.ones(2))
    named.bind(["a", "b"])
    listed = PBI(2, [1.0, 3.0], reference=[-1.0, 0.0])
    assert torch.equal(named.weights(losses(2)), listed.weights(losses(2)))


@pytest.mark.parametrize("options", [{"theta": -1.0}, {"preference": [1.0, 0.0]}, {"reference": float("inf")}])
def test_bad_options(options):
    with pytest.raises(ValueError, match=f"PBI: `{next(iter(options))}` must"):
        PBI(2, **options)
