"""IMTL equals IMTL-L and then IMTL-G, by hand."""

from __future__ import annotations

from math import exp

import pytest
import torch
from torch import Tensor

from lightning_mtl.balancers import IMTL, IMTLG, IMTLL
from tests.balancers.cases import losses, rows

SCALES = [-1.0, 0.4, 1.3]


def made() -> IMTL:
    balancer = IMTL(3)
    with torch.no_grad():
        balancer.first.log_scale.copy_(torch.tensor(SCALES))
    return balancer


def factors() -> Tensor:
    return torch.tensor([exp(s) for s in SCALES], dtype=torch.float64)


@pytest.mark.parametrize("present", [None, torch.tensor([True, False, True])], ids=["all", "one absent"])
def test_equals_the_two_parts(present):
    given = torch.stack([factor * row for factor, row in zip(factors(), rows(3), strict=True)])
    expected = IMTLG(3).combine(given, losses(3), present)
    torch.testing.assert_close(made().combine(rows(3), losses(3), present), expected, rtol=1e-6, atol=1e-7)


def test_the_update_has_equal_projections_on_the_gradients_and_its_weights_undo_the_scales():
    """A scale does not turn a gradient; so the projections are equal, and ``sum_t w_t / e^{s_t}`` is 1."""
    balancer = made()
    update = balancer.combine(rows(3), losses(3))
    projections = rows(3) @ update / rows(3).norm(dim=1)
    assert projections.tolist() == pytest.approx([float(projections[0])] * 3, rel=1e-6)
    assert float((balancer.last_weights / factors()).sum()) == pytest.approx(1, rel=1e-6)


def test_heads_are_weighted_by_the_scales():
    torch.testing.assert_close(made().private_weights(losses(3)), factors(), rtol=1e-6, atol=0)
    present = torch.tensor([True, False, True])
    torch.testing.assert_close(made().private_weights(losses(3), present), factors() * present, rtol=1e-6, atol=0)


def test_the_scales_have_the_gradient_of_the_papers_loss():
    balancer, given = made(), losses(3)
    balancer.own_objective(given.requires_grad_()).backward()
    expected = [exp(s) * float(loss) - 1 for s, loss in zip(SCALES, losses(3), strict=True)]
    assert balancer.first.log_scale.grad.tolist() == pytest.approx(expected, rel=1e-5)
    assert given.grad is None


def test_the_scale_of_an_absent_task_has_no_gradient():
    balancer = made()
    balancer.own_objective(losses(3), torch.tensor([True, False, True])).backward()
    assert balancer.first.log_scale.grad[1] == 0
    assert balancer.first.log_scale.grad[0] != 0


def test_an_optimizer_makes_the_scaled_losses_equal():
    balancer, given = IMTL(3), torch.tensor([0.01, 1.0, 30.0])
    adam = torch.optim.Adam(balancer.parameters(), lr=0.05)
    for _ in range(600):
        adam.zero_grad()
        balancer.own_objective(given).backward()
        adam.step()
    assert (balancer.private_weights(given) * given).tolist() == pytest.approx([1.0] * 3, rel=1e-2)


def test_with_a_rate_it_needs_no_optimizer():
    """Beside the two by hand: the scales of the first move after each solve, those of the heads are the same."""
    balancer, first, second = IMTL(3, lr=0.1), IMTLL(3, lr=0.1), IMTLG(3)
    assert not list(balancer.parameters())
    assert balancer.own_objective(losses(3)) is None
    for seed in range(5):
        scale = first.weights(losses(3, seed))
        torch.testing.assert_close(balancer.private_weights(losses(3, seed)), scale)
        expected = second.combine(scale[:, None] * rows(3, seed=seed), scale * losses(3, seed))
        torch.testing.assert_close(balancer.combine(rows(3, seed=seed), losses(3, seed)), expected)
        first.advance(losses(3, seed))
    assert first.log_scale.abs().max() > 0.1


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"^IMTL: `num_tasks` must be an integer >= 1, got 0\. .*\.$"):
        IMTL(0)
    with pytest.raises(ValueError, match=r"^IMTL: `every_n_steps` must be an integer >= 1, got 0\. .*\.$"):
        IMTL(2, every_n_steps=0)
