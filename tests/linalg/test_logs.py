"""Logarithms of losses: who is refused, and who passes."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_mtl.linalg import log_losses, one_or_nan
from lightning_mtl.linalg.logs import LEAST_LOSS


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("bad", [-1e-20, -1.0])
def test_on_the_cpu_a_loss_that_is_negative_is_refused_in_any_step(bad, first):
    message = r"Who: `losses` must be >= 0 .*, got \[1.0, -.*\]\. Pass b= with a lower bound"
    with pytest.raises(ValueError, match=message):
        log_losses(torch.tensor([1.0, bad]), "Who", "b", first=first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("floor", [LEAST_LOSS, 1e-3, 7.0])
def test_the_slope_is_one_over_the_loss_or_the_floor(floor, dtype):
    given = torch.tensor([-0.9 * floor, 0.0, floor / 1e6, floor, 1.5 * floor, 1e30], dtype=dtype).requires_grad_()
    logs = log_losses(given, "Who", "b", floor, first=True)
    logs.sum().backward()
    expected = [1 / max(value, float(torch.tensor(floor, dtype=dtype))) for value in given.tolist()]
    assert given.grad.tolist() == pytest.approx(expected, rel=1e-6)
    # The tangent at the floor, and nothing else from there on.
    values = [math.log(x) if x >= floor else math.log(floor) + x / floor - 1 for x in given.tolist()]
    assert logs.tolist() == pytest.approx(values, rel=1e-5)


def test_each_task_may_have_its_floor():
    given = torch.tensor([1e-4, 1e-4], dtype=torch.float64).requires_grad_()
    log_losses(given, "Who", "b", torch.tensor([1e-2, 1e-6], dtype=torch.float64), first=True).sum().backward()
    assert given.grad.tolist() == pytest.approx([1e2, 1e4])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_passes(bad):
    logs = log_losses(torch.tensor([1.0, bad]), "Who", "b", first=True)
    assert logs[0] == 0
    assert not logs[1].isfinite()


def test_elsewhere_only_the_first_step_is_looked_at():
    """The meta device has no values: to look at them is an error."""
    there = torch.ones(2, device="meta")
    assert log_losses(there, "Who", "b", first=False).shape == (2,)
    with pytest.raises((NotImplementedError, RuntimeError)):
        log_losses(there, "Who", "b", first=True)


def test_one_or_nan():
    assert one_or_nan(torch.tensor([1e-30, -3.0, 3e38, 3e38])) == 1
    for bad in (torch.nan, torch.inf, -torch.inf):
        assert one_or_nan(torch.tensor([1.0, bad])).isnan()
    assert not one_or_nan(torch.ones(2, requires_grad=True)).requires_grad
