"""DWA against equation 7, and its memory of epochs."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from lightning_mtl.balancers import DWA
from tests.balancers import oracles
from tests.balancers.cases import losses


def epoch(balancer: DWA, seed: int, steps: int = 4) -> list[float]:
    """One epoch; the mean losses."""
    given = torch.stack([losses(balancer.num_tasks, 10 * seed + step) for step in range(steps)])
    for row in given:
        balancer.advance(row)
    balancer.end_epoch()
    return given.mean(0).tolist()


@pytest.mark.parametrize("temperature", [0.5, 2.0, 10.0])
@pytest.mark.parametrize("num_tasks", [1, 2, 5])
def test_weights_are_those_of_the_paper(num_tasks, temperature):
    balancer, means = DWA(num_tasks, temperature), [[1.0] * num_tasks]
    for seed in range(5):
        expected = oracles.dwa(means[1:] or means, temperature)
        assert balancer.weights(losses(num_tasks)).tolist() == pytest.approx(expected, rel=1e-12)
        means.append(epoch(balancer, seed))


def test_a_window_is_an_epoch_of_so_many_steps():
    epochs, windows = DWA(3), DWA(3, window=4)
    for seed in range(4):
        for step in range(4):
            assert torch.equal(windows.weights(losses(3)), epochs.weights(losses(3)))
            for balancer in (epochs, windows):
                balancer.advance(losses(3, 10 * seed + step))
        epochs.end_epoch()
    windows.end_epoch()  # says nothing where windows are counted
    assert torch.equal(windows.last_means, epochs.last_means)


def test_within_an_epoch_the_weights_stay():
    balancer = DWA(3)
    epoch(balancer, 0), epoch(balancer, 1)
    before = balancer.weights(losses(3))
    balancer.advance(100 * losses(3))
    assert torch.equal(balancer.weights(losses(3)), before)


def test_a_run_that_is_resumed_within_an_epoch_goes_on_the_same():
    balancer = DWA(3)
    epoch(balancer, 0), epoch(balancer, 1)
    balancer.advance(losses(3, 5))
    resumed = DWA(3)
    resumed.load_state_dict(deepcopy(balancer.state_dict()))
    for one in (balancer, resumed):
        one.advance(losses(3, 6))
        one.end_epoch()
    assert torch.equal(resumed.weights(losses(3)), balancer.weights(losses(3)))


def test_a_task_absent_for_an_epoch_keeps_its_means():
    balancer = DWA(2)
    for seed in range(2):
        epoch(balancer, seed)
    before = balancer.last_means.clone(), balancer.earlier_means.clone()
    balancer.advance(torch.tensor([4.0, 5.0]), torch.tensor([True, False]))
    balancer.end_epoch()
    assert balancer.last_means.tolist() == [4.0, before[0][1].item()]
    assert balancer.earlier_means.tolist() == [before[0][0].item(), before[1][1].item()]


def test_a_task_that_joined_late_counts_as_one_that_does_not_change():
    balancer = DWA(2, window=1)
    for value in (2.0, 1.0):
        balancer.advance(torch.tensor([value, 1.0]), torch.tensor([True, False]))
    assert balancer.weights(torch.ones(2)).tolist() == pytest.approx(oracles.dwa([[2.0, 1.0], [1.0, 1.0]], 2.0))


def test_an_epoch_with_losses_of_zero_is_no_epoch():
    """A task that is switched on after it would outweigh all others for two epochs."""
    balancer = DWA(3, window=1)
    for values in ([0.0, 0.0, 1.0], [1.0, 0.0, 1e-3]):
        balancer.advance(torch.tensor(values))
    expected = oracles.dwa([[1.0, 1.0, 1.0], [1.0, 1.0, 1e-3]], 2.0)
    assert balancer.weights(torch.ones(3)).tolist() == pytest.approx(expected)


def test_an_epoch_whose_losses_cancel_gives_finite_weights():
    balancer = DWA(2, window=2, temperature=1e-3)
    for values in ([1.0, 1.0], [-1.0, 1.0], [1.0, 1.0], [1.0, 1.0]):
        balancer.advance(torch.tensor(values))
    assert balancer.weights(torch.ones(2)).tolist() == pytest.approx([2, 0])


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": -1.0}, {"window": 0}, {"window": 2.5}])
def test_bad_options(options):
    with pytest.raises(ValueError, match=f"DWA: `{next(iter(options))}` must be"):
        DWA(2, **options)
