"""COSMOS against its formula, written with loops."""

from __future__ import annotations

import pytest
import torch

from lightning_mtl.balancers import COSMOS
from tests.balancers import oracles
from tests.balancers.cases import losses


@pytest.mark.parametrize("strength", [0.0, 1.0, 8.0])
@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 7.0]])
def test_objective_and_weights(weights, strength):
    leaf, share = losses(3).requires_grad_(), [w / 10 for w in weights] if weights else [1 / 3] * 3
    expected = oracles.cosmos(leaf, share, strength)
    expected.backward()
    balancer = COSMOS(3, weights, strength)
    assert balancer(losses(3)).item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(balancer.weights(losses(3)), leaf.grad, rtol=1e-10, atol=1e-12)


def test_in_the_chosen_proportion_the_angle_has_no_say():
    weights = COSMOS(3, [1.0, 2.0, 7.0], strength=50.0).weights(torch.tensor([3.0, 6.0, 21.0]))
    assert weights.tolist() == pytest.approx([0.1, 0.2, 0.7], abs=1e-5)


def test_descent_ends_in_the_chosen_proportion():
    """On the losses themselves, with a large strength."""
    balancer, given = COSMOS(2, [1.0, 3.0], strength=20.0), torch.tensor([2.0, 1.0], dtype=torch.float64)
    for _ in range(400):
        given = given - 2e-3 * balancer.weights(given)
    assert float(given[1] / given[0]) == pytest.approx(3.0, rel=0.05)


def test_losses_that_are_all_zero():
    assert COSMOS(2)(torch.zeros(2)).item() == 0
    assert COSMOS(2).weights(torch.zeros(2)).tolist() == [0.5, 0.5]


def test_weights_by_name():
    named = COSMOS(2, {"b": 3.0})
    with pytest.raises(ValueError, match=r"COSMOS: `preference` must be .* Call bind\(names\) first"):
        named(torch.ones(2))
    named.bind(["a", "b"])
    assert torch.equal(named.weights(losses(2)), COSMOS(2, [1.0, 3.0]).weights(losses(2)))


@pytest.mark.parametrize("options", [{"strength": -1.0}, {"preference": [1.0, 0.0]}, {"preference": [1.0]}])
def test_bad_options(options):
    with pytest.raises(ValueError, match=f"COSMOS: `{next(iter(options))}` must"):
        COSMOS(2, **options)
