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
    ("laplace", "laplace", "laplace"),
    ("laplace", "classification", "regression"),
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


@pytest.mark.parametrize("form, factor", [("regression", 1.0), ("classification", 2.0), ("laplace", 1.0)])
def test_the_optimum(form, factor):
    """Regression and Laplace: s = log(loss). Classification: s = log(2 loss)."""
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


def test_the_published_code():
    """github.com/yaringal/multi-task-learning-example: precision * loss + log_var, twice the regression."""
    laplace, regression = Uncertainty(3, forms="laplace").double(), used("regression")
    with torch.no_grad():
        laplace.log_variance.copy_(regression.log_variance)
    expected = sum(
        math.exp(-s) * loss + s for loss, s in zip(losses(3).tolist(), laplace.log_variance.tolist(), strict=True)
    )
    assert laplace(losses(3)).item() == pytest.approx(expected, rel=1e-12)
    assert laplace(losses(3)).item() == pytest.approx(2 * regression(losses(3)).item(), rel=1e-12)


# With an update rule of its own.


@pytest.mark.parametrize("forms", FORMS)
def test_its_own_adam_equals_torchs_on_the_likelihood(forms):
    """Task 1 is absent, or has a loss of 0, now and then: a parameter of its own, which then makes no step."""
    own = Uncertainty(3, forms=forms, initial_log_variance=0.2, lr=0.05)
    leaves = [torch.full((1,), 0.2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    optimizers = [torch.optim.Adam([leaf], lr=0.05) for leaf in leaves]
    assert not list(own.parameters())
    for seed in range(60):
        given, present = losses(3, seed), torch.tensor([True, seed % 3 > 0, True])
        expected = [
            torch.autograd.grad(oracles.uncertainty(g[None], leaf.detach(), [form]), g)[0]
            for g, leaf, form in zip(given.clone().requires_grad_(), leaves, forms, strict=True)
        ]
        shown = given if seed % 2 else given.where(present, 0)
        found = own.weights(shown, present if seed % 2 else None)
        torch.testing.assert_close(found, torch.stack(expected).where(present, 0), rtol=1e-9, atol=0)
        own.advance(shown, present if seed % 2 else None)
        for loss, leaf, form, optimizer in zip(given, leaves, forms, optimizers, strict=True):
            optimizer.zero_grad()
            oracles.uncertainty(loss[None], leaf, [form]).backward()
            if leaf is not leaves[1] or present[1]:
                optimizer.step()
        torch.testing.assert_close(own.log_variance, torch.cat(leaves).detach(), rtol=1e-9, atol=1e-12)


def test_its_own_adam_is_in_the_checkpoint():
    one, resumed = Uncertainty(3, lr=0.1), Uncertainty(3, lr=0.1)
    for seed in range(4):
        one.advance(losses(3, seed))
    resumed.load_state_dict(one.state_dict())
    for balancer in (one, resumed):
        balancer.advance(losses(3, 9))
    assert torch.equal(one.log_variance, resumed.log_variance)
    assert set(one.state_dict()) == {"log_variance", "first_moment", "second_moment", "updates"}


def test_its_own_adam_skips_what_is_not_finite():
    balancer = Uncertainty(2, lr=0.1)
    balancer.advance(torch.tensor([1.0, float("inf")]))
    assert balancer.log_variance.tolist() == [0, 0]
    assert balancer.updates.tolist() == [0, 0]


@pytest.mark.parametrize("lr", [0.0, -1.0, float("nan"), "x"])
def test_a_bad_rate(lr):
    with pytest.raises(ValueError, match="Uncertainty: `lr` must be a finite number > 0"):
        Uncertainty(2, lr=lr)
