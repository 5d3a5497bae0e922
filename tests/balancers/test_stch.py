"""STCH against the published function, before, during and after the warm-up."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_mtl.balancers import STCH, LogSum
from tests.balancers import oracles
from tests.balancers.cases import losses


def same(balancer: STCH, given: Tensor, expected: Tensor, leaf: Tensor) -> None:
    """Value and weights."""
    expected.backward()
    assert balancer(given).item() == pytest.approx(expected.item(), rel=1e-9)
    torch.testing.assert_close(balancer.weights(given), leaf.grad, rtol=1e-9, atol=1e-300)


def warmed(epochs: int = 4, num_tasks: int = 3, **options: object) -> tuple[STCH, list[float]]:
    """After the warm-up, and the mean losses of its last epoch."""
    balancer, means = STCH(num_tasks, warmup_epochs=epochs, **options), []
    for epoch in range(epochs):
        given = torch.stack([losses(num_tasks, 10 * epoch + step) for step in range(3)])
        for row in given:
            balancer.advance(row)
        balancer.end_epoch()
        means = given.mean(0).tolist()
    return balancer, means


@pytest.mark.parametrize("mu", [0.1, 1.0, 20.0])
@pytest.mark.parametrize("weights, reference", [(None, None), ([3.0, 1.0, 4.0], [-1.0, 0.0, 0.3])])
def test_the_plain_form(mu, weights, reference):
    balancer, leaf = STCH(3, mu, weights, reference, warmup_epochs=0), losses(3).requires_grad_()
    preference = [w / sum(weights) for w in weights] if weights else [1 / 3] * 3
    same(balancer, losses(3), oracles.stch(leaf, preference, reference or [0.0] * 3, mu), leaf)


def test_the_plain_form_takes_losses_that_are_negative():
    assert STCH(2, warmup_epochs=0).weights(torch.tensor([-5.0, 3.0])).isfinite().all()


def test_a_small_mu_leaves_the_worst_task():
    weights = STCH(3, mu=1e-3, warmup_epochs=0).weights(torch.tensor([1.0, 3.0, 2.0]))
    assert weights.tolist() == pytest.approx([0, 1 / 3, 0])


@pytest.mark.parametrize("epochs", [1, 4])
def test_during_the_warm_up_it_is_the_sum_of_logs(epochs):
    balancer = STCH(3, warmup_epochs=epochs)
    for epoch in range(epochs):
        assert torch.equal(balancer.weights(losses(3)), LogSum(3).weights(losses(3)))
        balancer.advance(losses(3, 20 + epoch))
        balancer.end_epoch()
    assert not torch.equal(balancer.weights(losses(3)), LogSum(3).weights(losses(3)))


@pytest.mark.parametrize("epochs", [1, 4])
@pytest.mark.parametrize("mu", [0.1, 1.0])
def test_after_the_warm_up(epochs, mu):
    balancer, means = warmed(epochs, mu=mu)
    assert balancer.nadir.tolist() == pytest.approx(means, rel=1e-12)
    leaf = losses(3, 77).requires_grad_()
    same(balancer, losses(3, 77), oracles.stch_of_ratios(leaf, means, mu), leaf)


def test_the_preference_counts_after_the_warm_up():
    equal, tilted = warmed()[0], warmed(preference=[5.0, 1.0, 1.0])[0]
    assert tilted.weights(tilted.nadir)[0] > equal.weights(equal.nadir)[0]


def test_the_nadir_is_kept():
    balancer, means = warmed()
    for _ in range(3):
        balancer.advance(losses(3, 50))
        balancer.end_epoch()
    assert balancer.nadir.tolist() == pytest.approx(means, rel=1e-12)


def test_a_task_that_joins_late_gets_its_nadir_at_the_end_of_that_epoch():
    balancer, some = STCH(2, warmup_epochs=1), torch.tensor([True, False])
    balancer.advance(torch.tensor([2.0, 9.0]), some)
    balancer.end_epoch()
    assert balancer.nadir[0] == 2
    assert balancer.nadir[1].isnan()
    assert balancer.weights(torch.tensor([2.0, 4.0])).tolist() == pytest.approx([0.5, 0.25])
    balancer.advance(torch.tensor([1.0, 4.0]))
    balancer.end_epoch()
    assert balancer.nadir.tolist() == [2, 4]


def test_resuming_within_the_last_epoch_of_the_warm_up():
    balancer, resumed = STCH(3, warmup_epochs=1), STCH(3, warmup_epochs=1)
    balancer.advance(losses(3, 1))
    resumed.load_state_dict(balancer.state_dict())
    for one in (balancer, resumed):
        one.advance(losses(3, 2))
        one.end_epoch()
    assert torch.equal(resumed.nadir, balancer.nadir)


def test_settings_by_name():
    named = STCH(2, preference={"b": 3.0}, reference={"a": -1.0}, warmup_epochs=0)
    with pytest.raises(ValueError, match=r"STCH: `preference` must be .* Call bind\(names\) first"):
        named(torch.ones(2))
    named.bind(["a", "b"])
    listed = STCH(2, preference=[1.0, 3.0], reference=[-1.0, 0.0], warmup_epochs=0)
    assert torch.equal(named.weights(losses(2)), listed.weights(losses(2)))


def test_a_loss_below_its_reference_is_refused():
    with pytest.raises(ValueError, match=r"STCH: `losses` must be >= 0 .* Pass reference= with"):
        STCH(2)(torch.tensor([1.0, -0.5]))
    assert STCH(2, reference=-1.0).weights(torch.tensor([1.0, -0.5])).tolist() == pytest.approx([0.5, 2.0])


@pytest.mark.parametrize(
    "options",
    [
        {"mu": 0.0},
        {"warmup_epochs": -1},
        {"preference": [1.0, 0.0]},
        {"preference": [1.0]},
        {"reference": float("nan")},
    ],
)
def test_bad_options(options):
    with pytest.raises(ValueError, match=f"STCH: `{next(iter(options))}` must"):
        STCH(2, **options)
