"""DTP: the focal weight of a running mean of metrics."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_mtl.balancers import DTP

NAN = float("nan")


def weights(balancer: DTP) -> list[float]:
    return balancer.weights(torch.ones(balancer.num_tasks, dtype=torch.float64)).tolist()


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("smoothing", [0.1, 0.5, 1.0])
def test_weights_over_several_epochs(smoothing, gamma):
    balancer, mean = DTP(3, gamma=gamma, smoothing=smoothing), [0.0] * 3
    for epoch, seen in enumerate([[0.1, 0.5, 0.9], [0.3, 0.4, 0.95], [0.2, 0.8, 0.99]]):
        balancer.observe_metrics(torch.tensor(seen, dtype=torch.float64))
        mean = [k if epoch == 0 else smoothing * k + (1 - smoothing) * old for k, old in zip(seen, mean, strict=True)]
        expected = [-((1 - k) ** gamma) * math.log(k) for k in mean]
        assert weights(balancer) == pytest.approx(expected, rel=1e-12)


def test_weights_are_1_until_a_metric_is_known():
    balancer = DTP(2)
    assert weights(balancer) == [1, 1]
    balancer.observe_metrics(torch.tensor([NAN, 0.5]))
    assert weights(balancer) == pytest.approx([1, 0.5 * math.log(2)])


def test_a_metric_that_is_not_known_keeps_the_mean():
    balancer = DTP(2)
    balancer.observe_metrics(torch.tensor([0.4, 0.5]))
    balancer.observe_metrics(torch.tensor([NAN, 0.7]))
    assert balancer.progress.tolist() == pytest.approx([0.4, 0.6])


def test_a_perfect_task_has_weight_0_and_a_hopeless_one_a_finite_weight():
    balancer = DTP(2)
    balancer.observe_metrics(torch.tensor([1.0, 0.0]))
    assert weights(balancer) == pytest.approx([0, 0.999 * math.log(1000)])


def test_training_losses_move_nothing():
    balancer = DTP(2)
    balancer.advance(torch.tensor([1.0, 2.0]))
    balancer.end_epoch()
    assert balancer.progress.isnan().all()


def test_progress_survives_a_checkpoint():
    balancer, resumed = DTP(2), DTP(2)
    balancer.observe_metrics(torch.tensor([0.2, NAN]))
    resumed.load_state_dict(balancer.state_dict())
    assert weights(resumed) == weights(balancer)


@pytest.mark.parametrize("values", [[0.5, 1.2], [-0.1, 0.5], [0.5, torch.inf], [0.5], [0.5, 0.5, 0.5]])
def test_bad_metrics_are_refused_and_move_nothing(values):
    balancer = DTP(2)
    with pytest.raises(ValueError, match="DTP: `values` must"):
        balancer.observe_metrics(torch.tensor(values))
    assert balancer.progress.isnan().all()


@pytest.mark.parametrize(
    "options", [{"metric": ""}, {"metric": 3}, {"gamma": -1.0}, {"smoothing": 0.0}, {"smoothing": 1.5}]
)
def test_bad_options(options):
    with pytest.raises(ValueError, match=f"DTP: `{next(iter(options))}` must"):
        DTP(2, **options)
