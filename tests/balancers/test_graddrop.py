"""GradDrop: the statistics of its signs, and each coordinate by itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_mtl.balancers import GradDrop
from tests.balancers import oracles
from tests.balancers.cases import losses, rows

COLUMNS = [[3.0, -1.0, 0.0], [1.0, -3.0, 0.5], [2.0, -2.0, 0.0], [5.0, -0.1, -0.2]]


@pytest.mark.parametrize("column", COLUMNS)
def test_each_sign_is_kept_as_often_as_it_is_pure(column):
    num, balancer = 2000, GradDrop(3)
    given = torch.tensor(column, dtype=torch.float64)[:, None].expand(3, num)
    updates = torch.cat([balancer.combine(given, losses(3)) for _ in range(5)])
    positive, negative = sum(x for x in column if x > 0), sum(x for x in column if x < 0)
    kept = torch.isclose(updates, torch.tensor(positive, dtype=torch.float64))
    torch.testing.assert_close(updates[~kept], torch.full_like(updates[~kept], negative))
    purity = 0.5 * (1 + (positive + negative) / (positive - negative))
    # Five standard errors of the share of 10 000 draws.
    assert float(kept.double().mean()) == pytest.approx(purity, abs=5 * (purity * (1 - purity) / 1e4) ** 0.5)


def test_the_mean_update_of_the_paper():
    """In the mean a coordinate gets ``P`` times the positive part plus ``1 - P`` times the negative one."""
    given, balancer = rows(4, num=6), GradDrop(4)
    mean = torch.stack([balancer.combine(given, losses(4)) for _ in range(4000)]).mean(0)
    positive, negative = given.clamp(min=0).sum(0), given.clamp(max=0).sum(0)
    purity = positive / (positive - negative)
    spread = (purity * (1 - purity)).sqrt() * (positive - negative)
    assert ((mean - purity * positive - (1 - purity) * negative).abs() <= 5 * spread / 4000**0.5).all()


@pytest.mark.parametrize("leak", [None, 0.0, 0.3, 1.0, [0.0, 0.5, 1.0], {"b": 0.5, "c": 1.0}])
@pytest.mark.parametrize("seed", range(3))
def test_equals_algorithm_1_with_the_same_draws(seed, leak):
    balancer = GradDrop(3, leak=leak, seed=seed)
    balancer.bind(["a", "b", "c"])
    leaks = leak if isinstance(leak, list) else [0.0, 0.5, 1.0] if isinstance(leak, dict) else [leak or 0.0] * 3
    for step in range(3):
        draws = torch.rand(7, generator=torch.Generator().manual_seed(seed + step)).tolist()
        expected = oracles.graddrop(list(rows(3, seed=step)), draws, leaks)
        torch.testing.assert_close(balancer.combine(rows(3, seed=step), losses(3)), expected)


def test_a_leak_of_1_is_the_plain_sum():
    torch.testing.assert_close(GradDrop(4, leak=1.0).combine(rows(4), losses(4)), rows(4).sum(0))


def test_the_leak_of_an_absent_task_goes_with_it():
    balancer = GradDrop(3, leak=[1.0, 0.0, 1.0])
    found = balancer.combine(rows(3), losses(3), torch.tensor([True, False, True]))
    torch.testing.assert_close(found, rows(3)[[0, 2]].sum(0))


def test_draws_change_with_the_coordinate_the_step_and_the_seed():
    column = torch.tensor([[1.0], [-1.0]]).expand(2, 64)

    def signs(step: int, seed: int) -> Tensor:
        balancer = GradDrop(2, seed=seed)
        balancer.step.fill_(step)
        return balancer.combine(column, torch.ones(2))

    assert len(signs(0, 0).unique()) == 2
    assert len({str(signs(step, 0).tolist()) for step in range(10)}) == 10
    assert len({str(signs(0, seed).tolist()) for seed in range(10)}) == 10


def test_draws_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    GradDrop(4).combine(rows(4), losses(4))
    assert torch.equal(torch.get_rng_state(), before)


def test_there_are_no_weights():
    balancer = GradDrop(3)
    balancer.combine(rows(3), losses(3))
    assert balancer.last_weights.isnan().all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"leak": 1.5}, r"GradDrop: `leak` must be finite and >= 0 and <= 1, got \[1\.5, 1\.5\]\. .*\."),
        ({"leak": [0.5, -0.1]}, r"GradDrop: `leak` must be finite and >= 0 and <= 1, got .*\."),
        ({"leak": "much"}, r"GradDrop: `leak` must hold one number per task, got 'much'\. .*\."),
        ({"leak": [0.1]}, r"GradDrop: `leak` must have one entry per task \(2\), got 1 entries\. .*\."),
        ({"seed": -1}, r"GradDrop: `seed` must be an integer >= 0, got -1\. .*\."),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        GradDrop(2, **options)


def test_a_leak_for_an_unknown_task():
    with pytest.raises(ValueError, match=r"^GradDrop: `leak` must name tasks among 'a', 'b', got 'c'\. .*\.$"):
        GradDrop(2, leak={"c": 0.5}).bind(["a", "b"])
