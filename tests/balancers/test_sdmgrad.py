"""SDMGrad against its algorithm on two samples, with torch's own SGD."""

from __future__ import annotations

import pytest
import torch

from lightning_mtl.balancers import SDMGrad, load
from tests.balancers import oracles
from tests.balancers.cases import losses, rows
from tests.balancers.test_modo import halves, samples


@pytest.mark.parametrize(
    "options",
    [
        {"pull": 0.3, "lr": 10.0, "momentum": 0.5, "iterations": 20},
        {"pull": 0.0, "lr": 0.1, "momentum": 0.0, "iterations": 5},
        {"pull": 2.0, "lr": 0.5, "momentum": 0.9, "iterations": 40},
    ],
)
@pytest.mark.parametrize("num_tasks", [1, 2, 4])
def test_equals_the_algorithm(num_tasks, options):
    balancer = SDMGrad(num_tasks, **options)
    steps = [samples(num_tasks, seed) for seed in range(6)]
    expected = oracles.sdmgrad(steps, preference=[1 / num_tasks] * num_tasks, **options)
    for (one, other), weights in zip(steps, expected, strict=True):
        update = balancer.combine(halves(one, other), losses(num_tasks))
        assert balancer.last_weights.tolist() == pytest.approx(weights, rel=1e-6, abs=1e-6)
        mean = [(a + b) / 2 for a, b in zip(one, other, strict=True)]
        torch.testing.assert_close(update, oracles.weighted_sum(weights, mean), rtol=1e-6, atol=1e-6)


def test_the_defaults():
    one, other = SDMGrad(3), SDMGrad(3, pull=0.3, preference=1.0, lr=10.0, momentum=0.5, iterations=20)
    for seed in range(4):
        given = halves(*samples(3, seed))
        assert torch.equal(one.combine(given, losses(3)), other.combine(given, losses(3)))


@pytest.mark.parametrize("preference", [[3.0, 0.0, 1.0], {"a": 3.0, "b": 0.0, "c": 1.0}])
def test_a_preference_is_divided_by_its_sum(preference):
    balancer = SDMGrad(3, preference=preference, lr=0.3)
    balancer.bind(["a", "b", "c"])
    steps = [samples(3, seed) for seed in range(4)]
    expected = oracles.sdmgrad(steps, 0.3, [0.75, 0.0, 0.25], 0.3, 0.5, 20)
    for (one, other), weights in zip(steps, expected, strict=True):
        balancer.combine(halves(one, other), losses(3))
        assert balancer.last_weights.tolist() == pytest.approx(weights, rel=1e-9)


def test_a_strong_pull_is_the_preferred_mean():
    update = SDMGrad(3, pull=1e9, lr=1e-9).combine(halves(list(rows(3)), list(rows(3))), losses(3))
    torch.testing.assert_close(update, rows(3).mean(0), rtol=1e-6, atol=1e-6)


def test_without_a_pull_and_with_equal_halves_it_ends_at_mgda():
    given = rows(3)
    balancer = SDMGrad(3, pull=0.0, lr=0.3, iterations=2000)
    update = balancer.combine(halves(list(given), list(given)), losses(3))
    torch.testing.assert_close(update, load("mgda", 3).combine(given, losses(3)), rtol=1e-6, atol=1e-6)


def test_without_its_preferred_task_the_pull_is_to_where_the_weights_are():
    balancer = SDMGrad(3, preference=[1.0, 0.0, 0.0])
    weights = balancer(torch.zeros(6, 6), losses(3), torch.tensor([False, True, True]))
    assert weights.tolist() == pytest.approx([0, 0.5, 0.5])


def test_absent_tasks_keep_their_share():
    balancer = SDMGrad(3, lr=0.1)
    balancer.combine(halves(*samples(3, 0)), losses(3))
    before = balancer.task_weights.clone()
    balancer.combine(halves(*samples(3, 1)), losses(3), torch.tensor([True, False, True]))
    assert balancer.task_weights[1] == before[1]
    assert float(balancer.task_weights.sum()) == pytest.approx(1)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"pull": -0.1}, r"`pull` must be a finite number >= 0, got -0\.1\. .*\."),
        ({"lr": 0.0}, r"`lr` must be a finite number > 0, got 0\.0\. .*\."),
        ({"momentum": 1.1}, r"`momentum` must be a finite number >= 0 and <= 1, got 1\.1\. .*\."),
        ({"iterations": 0}, r"`iterations` must be an integer >= 1, got 0\. .*\."),
        ({"preference": [1.0, -1.0]}, r"`preference` must be finite and >= 0, got \[1\.0, -1\.0\]\. .*\."),
        ({"preference": [1.0]}, r"`preference` must have one entry per task \(2\), got 1 entries\. .*\."),
        ({"every_n_steps": 0}, r"`every_n_steps` must be an integer >= 1, got 0\. .*\."),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=f"^SDMGrad: {message}$"):
        SDMGrad(2, **options)


def test_features_have_no_halves():
    with pytest.raises(ValueError, match=r"`level` must be 'parameters' for this method"):
        SDMGrad(2).check_level("features")
