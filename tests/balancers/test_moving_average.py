"""The moving average follows its recursion, whatever balancer is inside."""

from __future__ import annotations

import pytest
import torch

from lightning_mtl.balancers import MovingAverage, load
from tests.balancers.cases import losses, rows, weigh


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("inner", ["mgda", "nash", "pcgrad", "famo", "dwa"])
def test_follows_the_recursion(inner, alpha):
    balancer, alone, average = MovingAverage(3, inner, alpha=alpha), load(inner, 3), None
    for seed in range(6):
        new = weigh(alone, rows(3, seed=seed), losses(3, seed)).tolist()
        average = new if average is None else [alpha * a + (1 - alpha) * w for a, w in zip(average, new, strict=True)]
        found = weigh(balancer, rows(3, seed=seed), losses(3, seed))
        assert found.tolist() == pytest.approx(average, rel=1e-9, abs=1e-12)


def test_the_papers_defaults():
    balancer = MovingAverage(3)
    assert (balancer.alpha, type(balancer.inner).__name__) == (0.9, "MGDA")


def test_a_task_that_comes_late_starts_with_its_first_weight():
    balancer = MovingAverage(3, "mgda")
    for seed in range(3):
        weigh(balancer, rows(3, seed=seed), losses(3), torch.tensor([True, True, False]))
    before = balancer.averages.clone()
    found, new = weigh(balancer, rows(3, seed=9), losses(3)), weigh(load("mgda", 3), rows(3, seed=9), losses(3))
    assert float(found[2]) == pytest.approx(float(new[2]))
    assert found[:2].tolist() == pytest.approx((0.9 * before[:2] + 0.1 * new[:2]).tolist())


def test_it_smooths():
    """The mean of many weights of MGDA is where the average stays near."""
    raw, smooth = load("mgda", 3), MovingAverage(3, "mgda", alpha=0.95)
    pairs = [
        (weigh(raw, rows(3, seed=s), losses(3)), weigh(smooth, rows(3, seed=s), losses(3)).clone()) for s in range(200)
    ]
    one, other = (torch.stack(list(part))[50:] for part in zip(*pairs, strict=True))
    assert (other.std(0) < 0.4 * one.std(0)).all()


def test_heads_are_those_of_the_inner_balancer():
    assert MovingAverage(2, "mgda").private_weights(losses(2)) is None
    weights = MovingAverage(2, {"class_path": "fixed", "init_args": {"weights": [2.0, 3.0]}}).private_weights(losses(2))
    assert weights.tolist() == [2, 3]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"alpha": 1.1}, r"`alpha` must be a finite number >= 0 and <= 1, got 1\.1\. .*\."),
        ({"alpha": -0.1}, r"`alpha` must be a finite number >= 0 and <= 1, got -0\.1\. .*\."),
        ({"balancer": "moco"}, r"`balancer` must need the losses, or one gram .*, got MoCo\. .*\."),
        ({"balancer": load("mgda", 3)}, r"`balancer` must be a balancer of 2 tasks, got one of 3\. .*\."),
        ({"every_n_steps": 0}, r"`every_n_steps` must be an integer >= 1, got 0\. .*\."),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=f"^MovingAverage: {message}$"):
        MovingAverage(2, **options)
