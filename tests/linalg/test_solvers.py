"""The solvers on small grams against SciPy, closed forms and the conditions of optimality."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import brentq, minimize, minimize_scalar, nnls, root

from lightning_mtl.linalg import (
    cagrad_dual,
    cancelling,
    equal_angles,
    factor,
    fair_weights,
    min_norm,
    nonnegative_qp,
    project_on_dual_cone,
    project_on_simplex,
    random_orders,
    simplex_qp,
    solve_symmetric,
    unit_gram,
)

SEEDS = pytest.mark.parametrize("seed", range(8))
SIZES = pytest.mark.parametrize("num_tasks", [1, 2, 3, 7])


def rows(num_tasks: int, seed: int, rank: int = 9, spread: float = 1.0) -> np.ndarray:
    """Rows in 9 dimensions, their lengths up to ``spread`` apart."""
    generator = np.random.default_rng([num_tasks, seed])
    made = generator.standard_normal((num_tasks, rank)) @ generator.standard_normal((rank, 9))
    made /= np.linalg.norm(made, axis=1)[:, None]
    return np.geomspace(1, spread, num_tasks)[:, None] * made


@SIZES
@SEEDS
def test_project_on_simplex(num_tasks, seed):
    """Against the root of ``sum(max(v - x, 0)) = 1``."""
    vector = 3 * np.random.default_rng(seed).standard_normal(num_tasks)
    shift = brentq(lambda x: np.maximum(vector - x, 0).sum() - 1, vector.min() - 2, vector.max(), xtol=1e-14)
    assert project_on_simplex(vector).tolist() == pytest.approx(np.maximum(vector - shift, 0).tolist(), abs=1e-12)


@SIZES
@SEEDS
@pytest.mark.parametrize("spread", [1.0, 1e5])
def test_min_norm(num_tasks, seed, spread):
    """Against non-negative least squares: the nearest point to zero of a hull lifted by one dimension."""
    given = rows(num_tasks, seed, spread=spread)
    weights = min_norm(given @ given.T)
    lifted, _ = nnls(np.vstack([given.T, np.ones(num_tasks)]), np.append(np.zeros(9), 1.0))
    assert weights.tolist() == pytest.approx((lifted / lifted.sum()).tolist(), abs=1e-9)


def test_min_norm_with_a_row_of_zeros():
    assert min_norm(np.diag([1.0, 0.0, 4.0, 0.0])).tolist() == [0, 0.5, 0, 0.5]


@SEEDS
def test_simplex_qp(seed):
    given, linear = rows(3, seed), np.random.default_rng(seed).standard_normal(3)
    unit, norms = unit_gram(given @ given.T)
    weights = simplex_qp(unit, norms, linear)
    slopes = given @ (given.T @ weights) + linear
    assert weights.sum() == pytest.approx(1)
    assert (weights >= 0).all()
    assert slopes.min() == pytest.approx(weights @ slopes, abs=1e-12)


@SIZES
@SEEDS
def test_nonnegative_qp(num_tasks, seed):
    """Against least squares of the rows: ``min |J' y - p|`` over ``y >= 0``."""
    given, aims = rows(num_tasks, seed), np.random.default_rng(seed).standard_normal((4, 9))
    found = nonnegative_qp(given @ given.T, -aims @ given.T)
    for y, aim in zip(found, aims, strict=True):
        assert y.tolist() == pytest.approx(nnls(given.T, aim)[0].tolist(), abs=1e-10)


@SEEDS
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_project_on_dual_cone_of_dependent_rows(seed, rank):
    """Only the point is unique, not its weights."""
    given = rows(6, seed, rank)
    found = project_on_dual_cone(given @ given.T, np.eye(6)) @ given
    for point, row in zip(found, given, strict=True):
        assert np.abs(point - row - given.T @ nnls(given.T, -row)[0]).max() <= 1e-7


@SIZES
@SEEDS
@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_fair_weights(num_tasks, seed, power):
    given = rows(num_tasks, seed, spread=100.0)
    inner = given @ given.T
    weights = fair_weights(inner, power)
    assert (inner @ weights * weights**power).tolist() == pytest.approx([1.0] * num_tasks, abs=1e-9)


@SEEDS
def test_fair_weights_minimise_the_convex_form(seed):
    given = rows(3, seed)
    inner = given @ given.T
    found = minimize(lambda x: np.exp(x) @ inner @ np.exp(x) / 2 - x.sum(), np.zeros(3), tol=1e-12)
    assert fair_weights(inner, 1.0).tolist() == pytest.approx(np.exp(found.x).tolist(), rel=1e-4)


@SEEDS
@pytest.mark.parametrize("c", [0.1, 0.5, 0.9])
def test_cagrad_dual_of_two(seed, c):
    given = rows(2, seed, spread=10.0)
    mean = given.mean(0)

    def dual(first: float) -> float:
        mixed = first * given[0] + (1 - first) * given[1]
        return float(mixed @ mean + c * np.linalg.norm(mean) * np.linalg.norm(mixed))

    found = minimize_scalar(dual, bounds=(0, 1), method="bounded", options={"xatol": 1e-12})
    best = min(found.fun, dual(0.0), dual(1.0))
    weights = cagrad_dual(given @ given.T, c)
    assert weights.sum() == pytest.approx(1)
    assert dual(weights[0]) == pytest.approx(best, rel=1e-10, abs=1e-12)


@SIZES
@SEEDS
def test_factor(num_tasks, seed):
    for rank in range(1, num_tasks + 1):
        given = rows(num_tasks, seed, rank)
        made = factor(given @ given.T)
        assert made.shape == (num_tasks, rank)
        assert np.abs(made @ made.T - given @ given.T).max() <= 1e-12


@SEEDS
def test_equal_angles(seed):
    given = rows(5, seed)
    inner = given @ given.T
    assert (inner @ equal_angles(inner)).tolist() == pytest.approx([1.0] * 5, rel=1e-9)
    opposite = np.array([[1.0, -1.0], [-1.0, 1.0]])
    assert equal_angles(opposite).tolist() == [0, 0]


@pytest.mark.parametrize("num_tasks", [1, 2, 6])
def test_random_orders(num_tasks):
    orders = random_orders(num_tasks, 3)
    others = [[t for t in range(num_tasks) if t != task] for task in range(num_tasks)]
    assert [sorted(order) for order in orders.tolist()] == others
    assert (orders == random_orders(num_tasks, 3)).all()


@SEEDS
def test_cancelling(seed):
    """Two groups that cancel, each with weights > 0, and rows beside them; the order does not matter."""
    generator = np.random.default_rng(seed)
    given = np.zeros((9, 7))
    for first, count, axes in ((0, 3, slice(0, 2)), (3, 2, slice(2, 3))):
        weights, made = generator.uniform(0.5, 1, count), generator.standard_normal((count, axes.stop - axes.start))
        given[first : first + count, axes] = made - np.outer(weights, weights @ made) / (weights @ weights)
    given[5:] = generator.standard_normal((4, 7))
    given[5:, 6] = np.abs(given[5:, 6]) + 0.1
    order = generator.permutation(9)
    given = given[order].astype(np.float32).astype(float)
    unit, norms = unit_gram(given @ given.T)
    found = cancelling(unit, float(np.finfo(np.float32).eps))
    assert (found > 0).tolist() == (order < 5).tolist()
    assert np.linalg.norm(found @ (given / norms[:, None])) <= 1e-6
    assert not cancelling(unit_gram(given[order > 4] @ given[order > 4].T)[0]).any()


@SEEDS
def test_pushes_that_ask_for_what_the_rows_forbid_stay_finite(seed):
    """Two opposite rows cannot both be gone along: then the pushes are as large as a few rounds make them."""
    unit = np.array([[1.0, -1.0, 0.3], [-1.0, 1.0, -0.3], [0.3, -0.3, 1.0]])
    wish = np.random.default_rng(seed).uniform(0.1, 1, 3)
    for resolution in (0.0, 1e-7, 1e-2):
        found = nonnegative_qp(unit, -wish[None], resolution)[0]
        assert np.isfinite(found).all()
        assert (found >= 0).all()
        assert found.max() <= 10 / max(resolution, 1e-10)


@SEEDS
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_the_rank_is_that_of_the_rows_before_they_were_rounded(seed, dtype):
    given = rows(6, seed, rank=2).astype(dtype).astype(float)
    unit, _ = unit_gram(given @ given.T)
    resolution = float(np.finfo(dtype).eps)
    assert factor(unit, resolution).shape == (6, 2)
    right = unit @ np.ones(6)
    found = solve_symmetric(unit, right, resolution)
    assert np.linalg.norm(found) <= 1.01 * 6**0.5
    assert np.abs(unit @ found - right).max() <= 10 * resolution + 1e-12


@SEEDS
@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_where_rows_cancel_a_bargain_is_the_limit_of_raised_grams(seed, power):
    """Found by SciPy for a sum of squares that vanishes; what it leaves falls with its root."""
    generator = np.random.default_rng(seed)
    row, other = generator.standard_normal((2, 4))
    given = np.stack([row, -generator.uniform(0.5, 2) * row, other])
    norms = np.linalg.norm(given, axis=1)
    update = given.T @ fair_weights(given @ given.T, power)

    def raised(ridge: float) -> np.ndarray:
        inner = given @ given.T + ridge * np.diag(norms**2)

        def lack(x: np.ndarray) -> np.ndarray:
            return inner @ np.exp(x) - np.exp(-power * x)

        def slopes(x: np.ndarray) -> np.ndarray:
            return inner * np.exp(x) + np.diag(power * np.exp(-power * x))

        found = root(lack, -np.log(norms), jac=slopes, tol=1e-13)
        return given.T @ np.exp(found.x)

    away = [np.linalg.norm(update - raised(ridge)) / np.linalg.norm(update) for ridge in (1e-2, 1e-4, 1e-6)]
    assert away[2] <= 0.05
    assert away[2] <= away[1] <= away[0]
