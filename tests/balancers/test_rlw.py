"""RLW: the laws of its draws, and that they can be had again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_mtl.balancers import RLW

LAWS = pytest.mark.parametrize("law", ["normal", "dirichlet"])


def drawn(balancer: RLW, steps: int) -> Tensor:
    weights = []
    for _ in range(steps):
        weights.append(balancer.weights(torch.ones(balancer.num_tasks, dtype=torch.float64)))
        balancer.advance(torch.ones(balancer.num_tasks))
    return torch.stack(weights)


def test_normal_weights_have_normal_log_ratios():
    logs = drawn(RLW(3), 2000).log()
    ratios = logs[:, 0] - logs[:, 1]  # the difference of two standard normals
    assert float(ratios.mean()) == pytest.approx(0, abs=0.12)
    assert float(ratios.std()) == pytest.approx(2**0.5, rel=0.06)
    assert float((ratios.abs() < 2**0.5).double().mean()) == pytest.approx(0.6827, abs=0.04)


def test_dirichlet_weights_are_uniform_on_the_simplex():
    weights = drawn(RLW(3, law="dirichlet"), 2000)
    # A share of a flat Dirichlet of three is Beta(1, 2): mean 1/3, variance 1/18, P(w < 1/2) = 3/4.
    assert weights.mean(0).tolist() == pytest.approx([1 / 3] * 3, abs=0.02)
    assert weights.var(0).tolist() == pytest.approx([1 / 18] * 3, rel=0.1)
    assert (weights < 0.5).double().mean(0).tolist() == pytest.approx([0.75] * 3, abs=0.04)


@LAWS
def test_the_same_step_gives_the_same_weights_and_others_do_not(law):
    one, other = RLW(4, law=law), RLW(4, law=law)
    first = drawn(one, 10)
    assert torch.equal(drawn(other, 10), first)
    assert len(first.unique(dim=0)) == 10
    assert not torch.equal(drawn(RLW(4, law=law, seed=77), 10), first)


@LAWS
def test_a_resumed_run_draws_on(law):
    whole = drawn(RLW(3, law=law), 8)
    stopped, resumed = RLW(3, law=law), RLW(3, law=law)
    drawn(stopped, 5)
    resumed.load_state_dict(stopped.state_dict())
    assert torch.equal(drawn(resumed, 3), whole[5:])


def test_the_draws_of_others_do_not_matter_and_are_left_alone():
    torch.manual_seed(1)
    expected, after = drawn(RLW(3), 3), torch.rand(1)
    torch.manual_seed(1)
    torch.rand(5)
    assert torch.equal(drawn(RLW(3), 3), expected)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after)


def test_a_loss_that_is_not_finite_does_not_count_as_a_step():
    balancer = RLW(2)
    balancer.advance(torch.tensor([1.0, torch.nan]))
    assert int(balancer.step) == 0


@pytest.mark.parametrize("options", [{"law": "cauchy"}, {"seed": -1}, {"seed": 0.5}])
def test_bad_options(options):
    with pytest.raises(ValueError, match=f"RLW: `{next(iter(options))}` must be"):
        RLW(2, **options)
