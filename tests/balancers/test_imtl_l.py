"""IMTL-L against its published objective, and its optimum."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_mtl.balancers import IMTLL, Uncertainty
from tests.balancers import oracles
from tests.balancers.cases import losses


def used() -> IMTLL:
    balancer = IMTLL(3).double()
    with torch.no_grad():
        balancer.log_scale.copy_(torch.tensor([0.4, -1.2, 2.0]))
    return balancer


def settled(given: Tensor) -> IMTLL:
    """After many optimizer steps with the same losses."""
    balancer = IMTLL(len(given)).double()
    optimizer = torch.optim.SGD(balancer.parameters(), lr=0.3)
    for _ in range(400):
        optimizer.zero_grad()
        balancer(given).backward()
        optimizer.step()
    return balancer


def test_objective_and_gradients():
    balancer, ours, theirs = used(), losses(3).requires_grad_(), losses(3).requires_grad_()
    leaf = balancer.log_scale.detach().clone().requires_grad_()
    found, expected = balancer(ours), oracles.imtl_l(theirs, leaf)
    found.backward(), expected.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=0)
    torch.testing.assert_close(balancer.log_scale.grad, leaf.grad, rtol=1e-12, atol=1e-15)


def test_at_the_optimum_all_scaled_losses_are_1():
    given = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
    balancer = settled(given)
    assert balancer.log_scale.tolist() == pytest.approx([-math.log(loss) for loss in given.tolist()], abs=1e-6)
    assert (balancer.weights(given) * given).tolist() == pytest.approx([1.0] * 3, abs=1e-6)


def test_at_the_optimum_the_unit_of_a_loss_changes_no_update():
    given, units = torch.tensor([0.5, 1.0, 2.0]).double(), torch.tensor([0.4, 1.0, 1.5]).double()
    before, after = settled(given).weights(given), settled(units * given).weights(units * given)
    torch.testing.assert_close(after * units, before, rtol=1e-5, atol=0)


def test_it_is_twice_the_uncertainty_with_the_other_sign():
    balancer, other = used(), Uncertainty(3).double()
    with torch.no_grad():
        other.log_variance.copy_(-balancer.log_scale)
    assert balancer(losses(3)).item() == pytest.approx(2 * other(losses(3)).item(), rel=1e-12)


def test_the_scale_of_an_absent_task_has_no_gradient():
    balancer = used()
    balancer(losses(3), torch.tensor([True, False, True])).backward()
    assert balancer.log_scale.grad[1] == 0
    assert (balancer.log_scale.grad[[0, 2]] != 0).all()


def test_its_own_adam_equals_torchs_on_the_papers_loss():
    own, leaf = IMTLL(3, lr=0.05), torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([leaf], lr=0.05)
    for seed in range(60):
        torch.testing.assert_close(own.weights(losses(3, seed)), leaf.detach().exp(), rtol=1e-9, atol=0)
        own.advance(losses(3, seed))
        optimizer.zero_grad()
        oracles.imtl_l(losses(3, seed), leaf).backward()
        optimizer.step()
    torch.testing.assert_close(own.log_scale, leaf.detach(), rtol=1e-9, atol=0)
    assert not list(own.parameters())
