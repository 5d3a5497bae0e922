"""One step of Adam against torch's."""

from __future__ import annotations

import pytest
import torch

from lightning_mtl.linalg import adam_step


@pytest.mark.parametrize("lr", [1e-3, 0.5])
def test_many_steps_equal_torchs_adam(lr):
    generator = torch.Generator().manual_seed(0)
    leaf = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    reference = torch.optim.Adam([leaf], lr=lr)
    ours, *state = torch.zeros(4, 4, dtype=torch.float64)
    for size in [1.0, 1e-6, 1e6] * 10:
        gradient = size * torch.randn(4, generator=generator, dtype=torch.float64)
        leaf.grad = gradient.clone()
        reference.step()
        step, *state = adam_step(gradient, *state, lr)
        ours = ours - step
        torch.testing.assert_close(ours, leaf.detach(), rtol=1e-9, atol=1e-12)


def test_entries_count_their_own_steps():
    """One that starts later makes the first step that any starts with: the learning rate, against the gradient."""
    gradient, zero, one = torch.tensor([[2.0, -3.0], [0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    step, first, second, updates = adam_step(gradient, zero, zero, zero, 0.1)
    assert step.tolist() == pytest.approx([0.1, -0.1])
    assert updates.tolist() == [1, 1]
    step, *_ = adam_step(gradient, one * first, one * second, one, 0.1)
    assert step.tolist() == pytest.approx([0.1, -0.1])


def test_nothing_it_is_given_is_changed():
    given = [torch.ones(2) for _ in range(4)]
    adam_step(*given, 0.1)
    assert all(tensor.tolist() == [1, 1] for tensor in given)
