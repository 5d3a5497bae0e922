"""The clip bounds the length of the update, and changes nothing else."""

from __future__ import annotations

import pytest
import torch

from lightning_mtl.balancers import ClipUpdate, load
from tests.balancers.cases import losses, rows


@pytest.mark.parametrize("max_norm", [0.01, 1.0, 1.9, 1e6])
@pytest.mark.parametrize("inner", ["fixed", "nash", "famo", "pcgrad", "mgda"])
def test_as_the_inner_update_but_no_longer(inner, max_norm):
    balancer, alone = ClipUpdate(3, inner, max_norm=max_norm), load(inner, 3)
    for seed in range(5):
        given, values = rows(3, seed=seed), losses(3, seed)
        free, found = alone.combine(given, values), balancer.combine(given, values)
        length = min(float(free.norm()), max_norm)
        assert float(found.norm()) == pytest.approx(length, rel=1e-9)
        torch.testing.assert_close(found, free / free.norm() * length, rtol=1e-9, atol=1e-12)


def test_a_short_update_is_left_alone():
    given = 1e-3 * rows(3)
    assert torch.equal(ClipUpdate(3, "fixed").combine(given, losses(3)), load("fixed", 3).combine(given, losses(3)))


def test_gradients_of_zero_are_no_division():
    assert ClipUpdate(2, "fixed").combine(torch.zeros(2, 5), losses(2)).tolist() == [0] * 5


def test_opposite_gradients_that_cancel():
    given = torch.tensor([[1.0, 2.0], [-1.0, -2.0]])
    assert ClipUpdate(2, "fixed").combine(given, losses(2)).tolist() == [0, 0]


def test_what_is_clipped_is_the_update_of_the_tasks_that_are_there():
    given = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    update = ClipUpdate(2, "fixed", max_norm=3.5).combine(given, losses(2), torch.tensor([True, False]))
    assert update.tolist() == [3, 0]


def test_the_default_is_nash_clipped_at_1():
    given = rows(3)
    free = load("nash", 3).combine(given, losses(3))
    assert float(free.norm()) == pytest.approx(3**0.5)
    torch.testing.assert_close(ClipUpdate(3).combine(given, losses(3)), free / free.norm())


def test_heads_are_those_of_the_inner_balancer():
    assert ClipUpdate(2).private_weights(losses(2)) is None
    inner = {"class_path": "fixed", "init_args": {"weights": {"a": 2.0}}}
    balancer = ClipUpdate(2, inner, max_norm=1e-3)
    balancer.bind(["a", "b"])
    assert balancer.private_weights(losses(2)).tolist() == [2, 1]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_norm": 0.0}, r"`max_norm` must be a finite number > 0, got 0\.0\. .*\."),
        ({"max_norm": float("inf")}, r"`max_norm` must be a finite number > 0, got inf\. .*\."),
        ({"balancer": "sdmgrad"}, r"`balancer` must need the losses, or one gram .*, got SDMGrad\. .*\."),
        ({"balancer": load("mgda", 3)}, r"`balancer` must be a balancer of 2 tasks, got one of 3\. .*\."),
        ({"every_n_steps": 0}, r"`every_n_steps` must be an integer >= 1, got 0\. .*\."),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=f"^ClipUpdate: {message}$"):
        ClipUpdate(2, **options)
