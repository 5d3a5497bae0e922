"""GradNorm against its published objective, and what its weights do over time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_mtl.balancers import GradNorm
from tests.balancers import oracles


def gram_of(norms: list[float]) -> Tensor:
    return torch.diag(torch.tensor(norms, dtype=torch.float64) ** 2)


def numbers(num_tasks: int, seed: int) -> tuple[list[float], list[float]]:
    """Norms and losses, all positive."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand((2, num_tasks), generator=generator, dtype=torch.float64) * 4 + 0.05
    return values[0].tolist(), values[1].tolist()


def settled(norms: list[float], losses: list[float] | None = None, steps: int = 1200, **options: float) -> list[float]:
    """The weights after many steps with the same norms and losses."""
    balancer = GradNorm(len(norms), **options)
    first = torch.ones(len(norms))
    balancer(gram_of(norms), first)
    later = first if losses is None else torch.tensor(losses)
    for _ in range(steps):
        balancer(gram_of(norms), later)
    return balancer.task_weights.tolist()


@pytest.mark.parametrize("alpha", [0.0, 0.12, 1.5])
@pytest.mark.parametrize("seed", range(4))
def test_weight_gradient_is_that_of_the_published_objective(seed, alpha):
    norms, losses = numbers(4, seed)
    initial = numbers(4, seed + 50)[1]
    start = torch.tensor([0.7, 1.5, 1.2, 0.6], dtype=torch.float64)
    balancer = GradNorm(4, alpha=alpha, initial_losses=initial)
    balancer.task_weights.copy_(start)
    balancer(gram_of(norms), torch.tensor(losses, dtype=torch.float64))
    unit = sum(norms) / 4
    found = balancer.first_moment / 0.1 * unit  # Adam's first moment after one step is (1 - 0.9) times the gradient

    rates = [loss / first for loss, first in zip(losses, initial, strict=True)]
    leaf = start.clone().requires_grad_()
    oracles.gradnorm_objective(leaf, norms, rates, alpha).backward()
    torch.testing.assert_close(found, leaf.grad, rtol=1e-9, atol=1e-9)

    target = float(start @ torch.tensor(norms, dtype=torch.float64)) / 4
    targets = [target * (rate / (sum(rates) / 4)) ** alpha for rate in rates]
    for task in range(4):
        step = 1e-6
        ends = [abs((float(start[task]) + sign * step) * norms[task] - targets[task]) for sign in (1, -1)]
        assert float(found[task]) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.12, 1.5])
@pytest.mark.parametrize("num_tasks", [2, 5])
def test_equals_a_run_of_torchs_adam_on_the_published_objective(num_tasks, alpha):
    balancer = GradNorm(num_tasks, alpha=alpha, lr=0.05)
    reference = oracles.GradNormByOptimizer([1.0] * num_tasks, alpha, lr=0.05)
    for step in range(60):
        norms, losses = numbers(num_tasks, step)
        found = balancer(gram_of(norms), torch.tensor(losses, dtype=torch.float64))
        assert found.tolist() == pytest.approx(reference.step(norms, losses), rel=1e-9), step


def test_the_first_step_uses_the_weights_from_before_it():
    assert GradNorm(3)(gram_of([1, 10, 100]), torch.ones(3)).tolist() == [1, 1, 1]


@pytest.mark.parametrize("norms", [[1.0, 3.0, 10.0], [2.0, 2.0], [5.0, 0.3, 1.0, 1.0]])
def test_with_alpha_0_the_weighted_norms_become_equal(norms):
    weights = settled(norms, alpha=0.0, lr=2e-3)
    weighted = [weight * norm for weight, norm in zip(weights, norms, strict=True)]
    assert weighted == pytest.approx([sum(weighted) / len(norms)] * len(norms), rel=0.05)


def test_the_papers_toy_with_scales_1_and_100():
    assert settled([1.0, 100.0], alpha=0.0, lr=1e-3) == pytest.approx([1.98, 0.02], abs=5e-3)


def test_a_task_that_trains_slowly_gains_weight():
    slow, fast = settled([1.0, 1.0], losses=[0.9, 0.3], steps=200, alpha=1.5)
    assert slow > fast
    # Rates 0.9 and 0.3 relative to their mean are 1.5 and 0.5, so the weights should stand as 3**1.5 to 1.
    assert settled([1.0, 1.0], losses=[0.9, 0.3], alpha=1.5, lr=2e-3)[0] == pytest.approx(
        2 * 3**1.5 / (1 + 3**1.5), rel=0.02
    )


def test_alpha_0_ignores_the_losses():
    one, other = GradNorm(2, alpha=0.0), GradNorm(2, alpha=0.0)
    for step in range(5):
        norms, losses = numbers(2, step)
        assert torch.equal(one(gram_of(norms), torch.tensor(losses)), other(gram_of(norms), torch.ones(2)))


def test_only_the_diagonal_of_the_gram_matters():
    one, other = GradNorm(3), GradNorm(3)
    for step in range(5):
        norms, losses = numbers(3, step)
        full = gram_of(norms) + 0.01 * (1 - torch.eye(3, dtype=torch.float64))
        assert torch.equal(one(gram_of(norms), torch.tensor(losses)), other(full, torch.tensor(losses)))


def test_initial_losses_are_the_first_finite_ones():
    balancer = GradNorm(2)
    balancer(gram_of([1, 1]), torch.tensor([torch.inf, 2.0]))
    assert balancer.initial_losses.isnan().all()
    balancer(gram_of([1, 1]), torch.tensor([3.0, 4.0]), torch.tensor([True, False]))
    balancer(gram_of([1, 1]), torch.tensor([5.0, 6.0]))
    balancer(gram_of([1, 1]), torch.tensor([7.0, 8.0]))
    assert balancer.initial_losses.tolist() == [3, 6]


@pytest.mark.parametrize("given", [[2.0, 5.0], {"a": 2.0, "b": 5.0}])
def test_initial_losses_can_be_given(given):
    balancer = GradNorm(2, initial_losses=given)
    balancer.bind(["a", "b"])
    balancer(gram_of([1, 1]), torch.tensor([1.0, 1.0]))
    assert balancer.initial_losses.tolist() == [2, 5]


def test_initial_losses_given_for_one_task_only():
    balancer = GradNorm(2, initial_losses={"b": 5.0})
    balancer.bind(["a", "b"])
    balancer(gram_of([1, 1]), torch.tensor([1.5, 1.0]))
    assert balancer.initial_losses.tolist() == [1.5, 5]


@pytest.mark.parametrize("offset", [-20.0, [-20.0, -20.0], {"a": -20.0, "b": -20.0}])
def test_an_offset_makes_negative_losses_those_above_it(offset):
    plain, shifted = GradNorm(2), GradNorm(2, loss_offset=offset)
    for balancer in (plain, shifted):
        balancer.bind(["a", "b"])
    for step in range(20):
        norms, losses = numbers(2, step)
        expected = plain(gram_of(norms), torch.tensor(losses, dtype=torch.float64))
        found = shifted(gram_of(norms), torch.tensor(losses, dtype=torch.float64) - 20)
        assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-9)


def test_a_loss_below_the_offset_is_refused_and_moves_nothing():
    balancer = GradNorm(2)
    before = {name: value.clone() for name, value in balancer.state_dict().items()}
    with pytest.raises(ValueError, match="be >= 0 after the offset"):
        balancer(gram_of([1, 1]), torch.tensor([1.0, -0.5]))
    assert all(torch.equal(v.nan_to_num(-7), before[n].nan_to_num(-7)) for n, v in balancer.state_dict().items())


def test_an_absent_task_keeps_its_weight_and_the_others_their_sum():
    balancer = GradNorm(3)
    for step in range(5):
        norms, losses = numbers(3, step)
        balancer(gram_of(norms), torch.tensor(losses))
    before = balancer.task_weights.clone()
    balancer(gram_of([1, 2, 30]), torch.tensor([1.0, 1, 1]), torch.tensor([True, False, True]))
    assert balancer.task_weights[1] == before[1]
    assert float(balancer.task_weights.sum()) == pytest.approx(3, rel=1e-12)
    assert balancer.task_weights[0] != before[0]
