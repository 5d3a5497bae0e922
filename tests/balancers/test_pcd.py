"""PCD where a task has nothing to say. Warnings are errors in this suite."""

import pytest
import torch

from lightning_mtl.balancers import PCD


@pytest.mark.parametrize("tau", [0.0, 0.02])
def test_a_gradient_that_has_always_been_zero_gets_weight_0(tau):
    gram = torch.diag(torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64))
    balancer, without = PCD(3, tau=tau), PCD(2, tau=tau)
    for _ in range(2):
        weights = balancer(gram, torch.ones(3))
        left = without(torch.diag(torch.tensor([1.0, 2.0], dtype=torch.float64)), torch.ones(2))
        assert float(weights[1]) == 0
        torch.testing.assert_close(weights[[0, 2]], left, rtol=1e-12, atol=0)
