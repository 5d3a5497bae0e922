"""Logarithms of losses: who is refused, and who passes."""

from __future__ import annotations

import pytest
import torch

from lightning_mtl.linalg import log_losses, one_or_nan


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("bad", [0.0, -0.0, -1.0])
def test_on_the_cpu_a_loss_that_is_not_positive_is_refused_in_any_step(bad, first):
    with pytest.raises(ValueError, match=r"Who: `losses` must be > 0 .*, got \[1.0, .*\]\. Pass b= with a lower bound"):
        log_losses(torch.tensor([1.0, bad]), "Who", "b", first=first)


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
