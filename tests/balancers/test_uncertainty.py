"""Uncertainty weighting against the likelihoods it comes from."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_mtl.balancers import Uncertainty
from tests.balancers import oracles
from tests.balancers.cases import losses

FORMS = [
    ("regression", "regression", "regression"),
    ("classification", "classification", "classification"),
    ("classification", "regression", "classification"),
]


def used(forms) -> Uncertainty:
    balancer = Uncertainty(3, forms=forms).double()
    with torch.no_grad():
        balancer.log_variance.copy_(torch.tensor([0.4, -1.2, 2.0]))
    return balancer


@pytest.mark.parametrize("forms", FORMS)
def test_objective_is_the_negative_log_likelihood(forms):
    balancer = used(forms)
    expected = oracles.uncertainty(losses(3), balancer.log_variance, forms)
    assert balancer(losses(3)).item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("forms", FORMS)
def test_gradients_of_losses_and_variances(forms):
    balancer, ours, theirs = used(forms), losses(3).requires_grad_(), losses(3).requires_grad_()
    leaf = balancer.log_variance.detach().clone().requires_grad_()
    balancer(ours).backward()
    oracles.uncertainty(theirs, leaf, forms).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=0)
    torch.testing.assert_close(balancer.log_variance.grad, leaf.grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("form, factor", [("regression", 1.0), ("classification", 2.0)])
def test_the_optimum(form, factor):
    """Regression: s = log(loss). Classification: s = log(2 loss)."""
    balancer, given = Uncertainty(3, forms=form).double(), torch.tensor([0.2, 1.0, 30.0])
    optimizer = torch.optim.SGD(balancer.parameters(), lr=0.5)
    for _ in range(400):
        optimizer.zero_grad()
        balancer(given).backward()
        optimizer.step()
    expected = [math.log(factor * loss) for loss in given.tolist()]
    assert balancer.log_variance.tolist() == pytest.approx(expected, abs=1e-6)


def test_forms_by_name():
    balancer = Uncertainty(3, forms={"kind": "classification"})
    balancer.bind(["size", "kind", "shape"])
    assert balancer.weights(torch.ones(3)).tolist() == [0.5, 1.0, 0.5]


def test_the_start_can_be_chosen():
    weights = Uncertainty(2, initial_log_variance=-0.5).weights(torch.ones(2))
    assert weights.tolist() == pytest.approx([0.5 * math.exp(0.5)] * 2)


def test_the_variance_of_an_absent_task_has_no_gradient():
    balancer = used("regression")
    balancer(losses(3), torch.tensor([True, False, True])).backward()
    assert balancer.log_variance.grad[1] == 0
    assert (balancer.log_variance.grad[[0, 2]] != 0).all()


def test_half_precision_losses_lose_no_variance():
    balancer = Uncertainty(2).bfloat16()
    assert balancer.scale.dtype == torch.float32
