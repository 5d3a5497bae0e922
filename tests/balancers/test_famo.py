"""FAMO against torch's Adam on the published update."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_mtl.balancers import FAMO, GeometricMean
from tests.balancers import oracles
from tests.balancers.cases import losses


def step(balancer: FAMO, given: Tensor, present: Tensor | None = None) -> list[float]:
    weights = balancer.weights(given, present)
    balancer.advance(given, present)
    return weights.tolist()


@pytest.mark.parametrize("gamma", [0.0, 1e-3, 0.1])
@pytest.mark.parametrize("num_tasks, bound", [(1, 0.0), (2, -3.0), (5, 0.05)])
def test_equals_a_run_of_torchs_adam_on_the_published_update(num_tasks, bound, gamma):
    balancer = FAMO(num_tasks, gamma=gamma, lr=0.05, min_losses=bound)
    reference = oracles.FAMOByOptimizer(num_tasks, gamma, 0.05, [bound] * num_tasks)
    for seed in range(60):
        given = losses(num_tasks, seed)
        assert step(balancer, given) == pytest.approx(reference.step(given.tolist()), rel=1e-9), seed


def test_at_first_it_follows_the_geometric_mean():
    """Equal logits: weights in proportion to 1 / loss, summing to 1."""
    weights, other = FAMO(4).weights(losses(4)), GeometricMean(4).weights(losses(4))
    torch.testing.assert_close(weights, other / other.sum(), rtol=1e-12, atol=0)


def test_the_objective_is_the_weighted_mean_of_the_losses():
    balancer = FAMO(3)
    step(balancer, losses(3))
    given = losses(3, 1)
    assert balancer(given).item() == pytest.approx(float(balancer.weights(given) @ given), rel=1e-12)


def test_who_improves_most_loses_weight():
    balancer, given = FAMO(2, gamma=0.0), torch.ones(2, dtype=torch.float64)
    for _ in range(50):
        step(balancer, given)
        given = given * torch.tensor([0.9, 0.99])
    # Relative progress counts, so compare shares of it and not the weights of unequal losses.
    share = torch.softmax(balancer.logits, 0)
    assert share[0] < 0.4 < 0.6 < share[1]


def test_without_change_and_decay_nothing_moves():
    balancer = FAMO(3, gamma=0.0)
    for _ in range(5):
        assert step(balancer, torch.ones(3)) == pytest.approx([1 / 3] * 3)
    assert balancer.logits.tolist() == [0, 0, 0]


def test_decay_pulls_the_logits_back():
    balancer = FAMO(2, gamma=0.1, lr=0.01)
    balancer.logits.copy_(torch.tensor([1.0, -1.0]))
    for _ in range(300):
        step(balancer, torch.ones(2))
    assert balancer.logits.abs().max() < 0.1


@pytest.mark.parametrize("bounds", [-20.0, [-20.0, -20.0], {"a": -20.0, "b": -20.0}])
def test_bounds_make_negative_losses_those_above_them(bounds):
    plain, shifted = FAMO(2), FAMO(2, min_losses=bounds)
    shifted.bind(["a", "b"])
    for seed in range(10):
        given = losses(2, seed)
        assert step(shifted, given - 20) == pytest.approx(step(plain, given), rel=1e-9)


def test_a_task_that_was_away_compares_with_its_last_step():
    away, there = FAMO(2), FAMO(2)
    only = torch.tensor([True, False])
    for balancer in (away, there):
        step(balancer, torch.tensor([1.0, 1.0]))
    step(away, torch.tensor([1.0, 7.0]), only)
    assert away.last_logs.tolist() == [0, 0]
    assert away.updates.tolist() == [1, 0]
    step(away, torch.tensor([1.0, 0.5]))
    assert away.logits[1] < 0


def test_a_loss_below_its_bound_is_refused_and_moves_nothing():
    balancer = FAMO(2)
    step(balancer, torch.ones(2))
    before = {name: value.clone() for name, value in balancer.state_dict().items()}
    with pytest.raises(ValueError, match=r"FAMO: `losses` must be >= 0 .* Pass min_losses= with"):
        balancer(torch.tensor([1.0, -0.1]))
    assert all(torch.equal(value, before[name]) for name, value in balancer.state_dict().items())


def test_bounds_by_name_need_the_names():
    with pytest.raises(ValueError, match=r"FAMO: `min_losses` must be .* Call bind\(names\) first"):
        FAMO(2, min_losses={"a": -1.0})(torch.ones(2))
    with pytest.raises(ValueError, match=r"`min_losses` must be finite"):
        FAMO(2, min_losses=float("-inf"))


@pytest.mark.parametrize("options", [{"gamma": -1.0}, {"lr": 0.0}])
def test_bad_options(options):
    with pytest.raises(ValueError, match=f"FAMO: `{next(iter(options))}` must be"):
        FAMO(2, **options)
