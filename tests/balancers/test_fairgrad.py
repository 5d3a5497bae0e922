"""FairGrad at the ends of alpha, and what double precision can meet for small alpha, against many digits."""

from itertools import product

import mpmath
import pytest
import torch
from mpmath import mpf

from lightning_mtl.balancers import MGDA, FairGrad
from tests.balancers.cases import rows


def two_tasks(ratio: float) -> list[list[float]]:
    """The gram of gradients of lengths ``ratio`` and 1 at 120 degrees: each works against the other."""
    return [[ratio**2, -ratio / 2], [-ratio / 2, 1.0]]


def exact(gram: list[list[float]], alpha: float) -> list[mpf]:
    """The solution with 120 digits: ``w = s (1, x)``, where ``x`` is found by bisection."""
    (a, b), (_, c) = [[mpf(entry) for entry in row] for row in gram]
    power = 1 / mpf(alpha)
    low, high = -b / c, -a / b
    for _ in range(380):
        x = (low + high) / 2
        low, high = (x, high) if (b + c * x) * x**power < a + b * x else (low, x)
    s = (a + b * x) ** (-1 / (1 + power))
    return [s, s * x]


def residual(gram: list[list[float]], weights: list[float], alpha: float) -> float:
    """How far ``w_t (G w)_t ** alpha`` are from 1, without rounding."""
    gains = [sum(mpf(entry) * mpf(weight) for entry, weight in zip(row, weights, strict=True)) for row in gram]
    if min(gains) <= 0:
        return float("inf")
    return max(float(abs(mpf(w) * gain ** mpf(alpha) - 1)) for w, gain in zip(weights, gains, strict=True))


def found(gram: list[list[float]], alpha: float) -> list[float]:
    return FairGrad(2, alpha=alpha)(torch.tensor(gram, dtype=torch.float64), torch.ones(2)).tolist()


@pytest.fixture(autouse=True)
def many_digits():
    with mpmath.workdps(120):
        yield


def rounding(alpha: float, ratio: float) -> float:
    """What the docstring says."""
    return 1e-16 * max(1.0, ratio ** ((1 - alpha) / alpha))


GRID = [*product((0.1, 0.2, 0.3, 0.4, 0.5, 1.0, 2.0), (1.0, 10.0, 1e2, 1e4, 1e6))]


@pytest.mark.parametrize("alpha, ratio", [given for given in GRID if rounding(*given) < 1e-3])
def test_the_equations_hold_as_far_as_doubles_can(alpha, ratio):
    gram = two_tasks(ratio)
    assert residual(gram, exact(gram, alpha), alpha) <= 1e-60
    assert residual(gram, found(gram, alpha), alpha) <= 1e-12 + 100 * rounding(alpha, ratio)


@pytest.mark.parametrize("alpha, ratio", [(0.1, 1e3), (0.1, 1e4), (0.2, 1e5), (0.2, 1e6), (0.25, 1e6)])
def test_beyond_that_even_the_solution_rounded_to_doubles_misses_them(alpha, ratio):
    gram = two_tasks(ratio)
    rounded = [float(weight) for weight in exact(gram, alpha)]
    assert residual(gram, rounded, alpha) > 1e-3
    # No more is promised than this.
    assert torch.tensor(found(gram, alpha)).isfinite().all()


def test_towards_alpha_0_it_is_the_sum_of_agreeing_gradients():
    given = rows(4).abs()
    away = [float((FairGrad(4, alpha=alpha)(given @ given.T, torch.ones(4)) - 1).abs().max()) for alpha in (0.1, 0.01)]
    assert away[1] <= 0.15 * away[0] <= 0.05


def test_towards_alpha_infinity_it_is_the_direction_of_the_largest_least_gain():
    """Which is that of the shortest convex combination."""
    given = rows(4)
    shortest = MGDA(4).combine(given, torch.ones(4))
    updates = [FairGrad(4, alpha=alpha).combine(given, torch.ones(4)) for alpha in (1.0, 10.0, 100.0)]
    away = [1 - float(update @ shortest / update.norm() / shortest.norm()) for update in updates]
    assert away[2] < 0.1 * away[1] < 0.01 * away[0]


@pytest.mark.parametrize("alpha", [1000.0, 100.0, 10.0])
def test_a_large_alpha_is_finite_and_silent(alpha):
    """Points that are tried on the way overflow: warnings are errors in this suite."""
    for seed in range(40):
        random = torch.Generator().manual_seed(seed)
        lengths = torch.logspace(0, seed % 4, 7, dtype=torch.float64)
        task_rows = torch.randn(7, 1 + seed % 9, generator=random, dtype=torch.float64) * lengths[:, None]
        weights = FairGrad(7, alpha=alpha)(task_rows @ task_rows.T, torch.ones(7))
        assert torch.isfinite(weights).all()
        assert (weights > 0).all()


@pytest.mark.parametrize("alpha", [5.0, 10.0, 15.0, 20.0, 50.0])
@pytest.mark.parametrize("digits", [4, 6])
def test_a_bargain_far_from_equal_weights_is_found(alpha, digits):
    """Weights are powers of gains: some are many orders of magnitude larger than others."""
    random = torch.Generator().manual_seed(3)
    lengths = torch.logspace(0, digits, 8, dtype=torch.float64)
    task_rows = (
        torch.nn.functional.normalize(torch.randn(8, 11, generator=random, dtype=torch.float64)) * lengths[:, None]
    )
    gram = task_rows @ task_rows.T
    weights = FairGrad(8, alpha=alpha)(gram, torch.ones(8))
    torch.testing.assert_close(weights * (gram @ weights) ** alpha, torch.ones(8).double(), rtol=1e-6, atol=0)


def test_a_weight_below_the_normal_numbers_is_kept():
    gram = torch.tensor([[1e24, 1.9e10], [1.9e10, 1.0]], dtype=torch.float64)
    weights = FairGrad(2, alpha=30.0)(gram, torch.ones(2))
    assert 0 < float(weights[0]) < 2.2e-308
    gains = gram @ weights
    assert abs(float(weights[0] ** (1 / 30) * gains[0]) - 1) < 1e-6
