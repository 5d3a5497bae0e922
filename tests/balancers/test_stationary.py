"""Rows that cancel, or nearly do: progress before a stall, and one answer for every order and precision.

Rows are strongly stationary if weights > 0 on all of them combine them to zero, weakly if weights >= 0, not all 0, do.
They are made so that they provably are, or are not, in exact numbers; then they are rounded. Where rows cancel, the
dual cone lies at a right angle to all of them, which says what the answers must be without any solver of the package.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, nnls
from torch import Tensor

from lightning_mtl.balancers import GramBalancer, available, load
from lightning_mtl.linalg import gram
from tests.balancers.cases import combine

Array = np.ndarray
KINDS = ("strong", "weak", "none")
#: T, rank, N. The last rank that is possible is T - 1 where rows are stationary.
SHAPES = [(2, 1, 3), (3, 1, 10), (3, 2, 3), (5, 3, 100), (5, 4, 10), (10, 2, 3), (10, 9, 100), (20, 1, 10)]
SHAPES += [(20, 3, 3), (20, 5, 100), (20, 10, 10), (20, 19, 100)]
SCALES = [0.0, 1e-10, 1e-5, 1.0, 1e5, 1e10, 1e15]
#: Largest length over smallest.
RATIOS = (1.0, 1e4)
EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}


@dataclass(frozen=True)
class Made:
    """Rows in float64, which of them take part in a combination that is zero, and the rank of those."""

    rows: Tensor
    cancelling: Array
    rank: int

    @property
    def longest(self) -> float:
        return float(self.rows.norm(dim=1).max())

    def outside(self, vectors: Array) -> Array:
        """What is at a right angle to all rows that cancel."""
        basis = np.linalg.svd(self.rows.numpy()[self.cancelling], full_matrices=False)[2][: self.rank]
        return vectors - (vectors @ basis.T) @ basis

    def projected(self, vector: Array) -> Array:
        """The nearest point of the dual cone: at a right angle to the rows that cancel, opposed by no other."""
        others = self.outside(self.rows.numpy()[~self.cancelling])
        inside = self.outside(vector)
        return inside + nnls(others.T, -inside)[0] @ others if len(others) else inside


def cancelling(count: int, rank: int, generator: np.random.Generator) -> Array:
    """Rows of which one combination with weights > 0 is zero; of the given rank < count."""
    weights = generator.uniform(0.3, 1, count)
    rows = generator.standard_normal((count, rank))
    return rows - np.outer(weights, weights @ rows) / (weights @ weights)


def along(count: int, rank: int, generator: np.random.Generator) -> Array:
    """Rows that all go along the first axis: no combination with weights >= 0 is zero."""
    rows = generator.standard_normal((count, rank))
    rows[:, 0] = np.abs(rows[:, 0]) + 0.1
    return rows


@cache
def make(kind: str, num_tasks: int, rank: int, num: int, ratio: float, seed: int) -> Made:
    generator = np.random.default_rng([KINDS.index(kind), num_tasks, rank, num, seed])
    rows, cancel, inside = np.zeros((num_tasks, rank)), np.zeros(num_tasks, bool), 0
    if kind == "strong":
        rows, cancel[:], inside = cancelling(num_tasks, rank, generator), True, rank
    elif kind == "none":
        rows = along(num_tasks, rank, generator)
    elif rank == 1:  # on a line, only a row of zeros
        rows, cancel[0] = along(num_tasks, 1, generator), True
        rows[0] = 0
    else:
        # Some cancel in their dimensions; the others have parts in those, but all go along the next.
        inside = int(generator.integers(1, rank))
        count = int(generator.integers(inside + 1, num_tasks - (rank - inside) + 1))
        rows[:count, :inside], cancel[:count] = cancelling(count, inside, generator), True
        rows[count:, inside:] = along(num_tasks - count, rank - inside, generator)
        rows[count:, :inside] = generator.standard_normal((num_tasks - count, inside))
    order = generator.permutation(num_tasks)
    axes = np.linalg.qr(generator.standard_normal((num, rank)))[0].T
    lengths = generator.permutation(np.geomspace(ratio**-0.5, ratio**0.5, num_tasks))
    return Made(torch.from_numpy((lengths[:, None] * rows[order]) @ axes), cancel[order], inside)


def problems(*kinds: str, ratios: tuple[float, ...] = RATIOS) -> Iterator[Made]:
    for kind in kinds:
        for shape in SHAPES:
            for seed, ratio in enumerate(ratios):
                yield make(kind, *shape, ratio, seed)


def some(kind: str) -> Iterator[Made]:
    """One of each shape."""
    for seed, shape in enumerate(SHAPES):
        yield make(kind, *shape, RATIOS[seed % 2], seed)


def update(key: str, rows: Tensor, **options: Any) -> Array:
    return combine(load(key, len(rows), **options), rows, torch.ones(len(rows))).double().numpy()


def length(vector: Array) -> float:
    return float(np.linalg.norm(vector))


# The matrices are what they claim to be.


@pytest.mark.parametrize("kind", KINDS)
def test_the_rows_are_as_stationary_as_they_claim(kind):
    for made in problems(kind, ratios=(1.0,)):
        rows = made.rows.numpy()
        num_tasks, num = rows.shape
        # The largest t with rows @ x >= t for some |x| <= 1, which is 0 if a combination with weights >= 0 is zero,
        forwards = linprog(
            np.append(np.zeros(num), -1.0),
            A_ub=np.hstack([-rows, np.ones((num_tasks, 1))]),
            b_ub=np.zeros(num_tasks),
            bounds=[(-1, 1)] * num + [(None, None)],
        )
        assert (forwards.x[-1] > 1e-3) == (kind == "none")
        # and the largest least weight of one with sum 1, if there is any.
        weights = linprog(
            np.append(np.zeros(num_tasks), -1.0),
            A_ub=np.hstack([-np.eye(num_tasks), np.ones((num_tasks, 1))]),
            b_ub=np.zeros(num_tasks),
            A_eq=np.vstack([np.hstack([rows.T, np.zeros((num, 1))]), np.append(np.ones(num_tasks), 0)]),
            b_eq=np.append(np.zeros(num), 1),
            bounds=[(0, None)] * (num_tasks + 1),
        )
        assert (weights.status == 0 and weights.x[-1] > 1e-5) == (kind == "strong")


# Projections on the dual cone.

ROUNDED = pytest.mark.parametrize("dtype, bar", [(torch.float64, 1e-8), (torch.float32, 1e-4)])


@pytest.mark.parametrize("kind", KINDS)
@ROUNDED
def test_projections_are_those_of_the_exact_rows(kind, dtype, bar):
    """Also where rounding has closed the dual cone, so that its only point is zero."""
    for made in problems(kind):
        rows = made.rows.numpy()
        expected = np.mean([made.projected(row) for row in rows], axis=0)
        assert length(update("upgrad", made.rows.to(dtype)) - expected) <= bar * made.longest
        assert length(update("dualproj", made.rows.to(dtype)) - made.projected(rows.mean(0))) <= bar * made.longest


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("key", ["upgrad", "dualproj", "mgda"])
@pytest.mark.parametrize("dtype", [*EPS])
def test_no_task_gets_worse_but_by_what_rounding_tells(kind, key, dtype):
    for made in problems(kind, ratios=(1.0, 100.0)):
        balancer, rows = load(key, len(made.rows)), made.rows.to(dtype)
        found = balancer.combine(rows, torch.ones(len(rows))).double()
        norms = rows.double().norm(dim=1)
        parts = float(balancer.last_weights.abs() @ norms)
        gains = (rows.double() @ found)[norms > 0] / norms[norms > 0]
        assert float(gains.min()) >= -2 * max(EPS[dtype], 1e-7) * parts


@pytest.mark.parametrize("dtype", [*EPS])
def test_upgrad_stops_at_strongly_stationary_rows_only(dtype):
    """As theorem 1 of its paper says: until then it makes progress."""
    coarse = EPS[dtype] > 1e-5
    for made in problems("weak", "none", ratios=(1.0,)):
        expected = np.mean([made.projected(row) for row in made.rows.numpy()], axis=0)
        found = update("upgrad", made.rows.to(dtype))
        assert length(found) >= (0.5 if coarse else 0.999) * length(expected) > 0
    for made in problems("strong"):
        assert length(update("upgrad", made.rows.to(dtype))) <= 4 * EPS[dtype] * made.longest


# Bargains.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("key, alpha", [("nash", 1.0), ("fairgrad", 0.5), ("fairgrad", 2.0)])
@ROUNDED
def test_tasks_that_cancel_gain_nothing_and_the_others_bargain_beside_them(kind, key, alpha, dtype, bar):
    """The limit that a vanishing disagreement leads to: ``d`` is at a right angle to the first, and the others' sum of
    ``(g @ d) ** -alpha * g`` there."""
    for made in problems(kind):
        weights = load(key, len(made.rows), **({} if key == "nash" else {"alpha": alpha}))
        found = weights.combine(made.rows.to(dtype), torch.ones(len(made.rows))).double().numpy()
        assert (weights.last_weights[made.rows.any(1)] > 0).all()
        others = made.rows.numpy()[~made.cancelling]
        gains = others @ found
        assert (gains > 0).all()
        expected = made.outside(gains**-alpha @ others)
        # Against the lengths of all parts, as they would be alone, where nothing is left but their rounding.
        norms = made.rows.norm(dim=1).numpy()
        parts = (norms[norms > 0] ** ((1 - alpha) / (1 + alpha))).sum()
        assert length(found - expected) <= bar * max(10 * length(expected), parts)


def test_of_opposite_gradients_and_a_third_only_the_third_gains():
    """By hand: at a right angle to the first two the third is (0, 2)."""
    rows = torch.tensor([[3.0, 0.0], [-1.0, 0.0], [1.0, 2.0]])
    np.testing.assert_allclose(update("nash", rows), [0, 1], atol=1e-5)
    np.testing.assert_allclose(update("upgrad", rows), [0, 2 / 3], atol=1e-6)
    # A hundredth of the rounding of float32 beside the line: without knowing it, a bargain between all of them.
    tilted = torch.tensor([[3.0, 1e-9], [-1.0, 1e-9], [1.0, 2.0]])
    np.testing.assert_allclose(update("nash", tilted), [0, 1], atol=1e-5)


# Every method that sees the gram.

EXCEPT = {
    "pcgrad": "random orders",
    "gradvac": "random orders",
    "krum": "chooses; of equally good tasks the first",
}
OPTIONS: dict[str, dict[str, Any]] = {"chain": {"then": "upgrad"}, "metabalance": {"granularity": "whole"}}
#: The first task is not like the others.
FIRST = {"metabalance", "pcd"}
#: Their update does not have the scale of the rows.
OF_LENGTH_1 = {"nash", "fairgrad", "clip_update"}
METHODS = sorted(key for key in available() if key not in EXCEPT and isinstance(load(key, 2), GramBalancer))


def size(key: str, made: Made) -> float:
    return len(made.rows) ** 0.5 if key in OF_LENGTH_1 else made.longest


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("key", METHODS)
def test_the_order_of_the_tasks_does_not_matter(key, kind):
    for seed, made in enumerate(some(kind)):
        first = [0] if key in FIRST else []
        order = [*first, *(np.random.default_rng(seed).permutation(len(made.rows) - len(first)) + len(first))]
        rows = made.rows.float()
        one, other = (update(key, given, **OPTIONS.get(key, {})) for given in (rows, rows[order]))
        assert length(one - other) <= 1e-4 * size(key, made)


@pytest.mark.parametrize("key", ["upgrad", "dualproj", "pcd", "cagrad", "nash"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("tilt", [1e-3, 1e-5, 1e-7, 1e-9])
def test_nor_does_it_where_rows_nearly_cancel(key, dtype, tilt):
    """How a search ends must not decide what is met."""
    for seed, made in enumerate([make("weak", 20, 19, 100, 1.0, 3), make("weak", 20, 5, 100, 1.0, 4)]):
        generator = np.random.default_rng(seed)
        off = torch.from_numpy(generator.standard_normal(made.rows.shape) / made.rows.shape[1] ** 0.5)
        rows = (made.rows + tilt * made.rows.norm(dim=1, keepdim=True) * off).to(dtype)
        order = [0, *(generator.permutation(19) + 1)]
        assert length(update(key, rows) - update(key, rows[order])) <= 1e-4 * size(key, made)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("key", [key for key in METHODS if key != "sdmgrad"])  # its long steps enlarge all rounding
def test_float32_rows_give_what_float64_rows_give(key, kind):
    for made in some(kind):
        one, other = (
            update(key, made.rows.to(dtype), **OPTIONS.get(key, {})) for dtype in (torch.float32, torch.float64)
        )
        assert length(one - other) <= 1e-3 * size(key, made)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("key", METHODS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_of_half_precision_give_no_nonsense(key, kind, dtype):
    for made in some(kind):
        found = update(key, made.rows.to(dtype), **OPTIONS.get(key, {}))
        assert np.isfinite(found).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("key", ["upgrad", "dualproj", "mgda", "cagrad", "pcd", "aligned", "nash"])
def test_rows_of_any_size(key, kind):
    """Times a power of 2 nothing is rounded."""
    for shape in SHAPES[1::3]:
        made = make(kind, *shape, 1.0, 0)
        rows = made.rows.float()
        expected = update(key, rows)
        for scale in SCALES:
            power = 2.0 ** round(np.log2(scale)) if scale else 0.0
            found = update(key, power * rows)
            wanted = expected if key == "nash" and scale else power * expected if scale else 0 * expected
            assert length(found - wanted) <= 1e-5 * (1.0 if key == "nash" else power) * size(key, made)


# What is known about the rows.


class Looking(GramBalancer):
    """Remembers what it was told."""

    def weights(self, gram: Tensor, losses: Tensor, tasks: Any) -> Tensor:
        self.told = self.resolution
        return torch.ones_like(losses)


@pytest.mark.parametrize("dtype", [*EPS])
def test_the_resolution_is_that_of_the_rows(dtype):
    balancer = Looking(2)
    balancer.combine(torch.eye(2).to(dtype), torch.ones(2))
    assert balancer.told == EPS[dtype]


@pytest.mark.parametrize("key", ["chain", "clip_update", "moving_average"])
def test_a_balancer_made_from_others_passes_it_on(key):
    inner = Looking(2)
    outer = load(key, 2, **{"then" if key == "chain" else "balancer": inner})
    outer(torch.eye(2), torch.ones(2), resolution=0.25)
    assert inner.told == outer.resolution == 0.25
    outer(torch.eye(2).double(), torch.ones(2))
    assert inner.told == EPS[torch.float64]


def test_without_rows_a_gram_tells_the_root_of_its_own_rounding():
    balancer = Looking(2)
    balancer(torch.eye(2).double(), torch.ones(2))
    assert balancer.told == EPS[torch.float64]
    for dtype in (torch.float32, torch.bfloat16):
        balancer(torch.eye(2).to(dtype), torch.ones(2))
        assert balancer.told == EPS[dtype] ** 0.5


def test_a_gram_in_float32_is_enough_for_progress():
    for made in problems("weak", ratios=(1.0,)):
        weights = load("upgrad", len(made.rows))(gram(made.rows).float(), torch.ones(len(made.rows)))
        expected = np.mean([made.projected(row) for row in made.rows.numpy()], axis=0)
        assert length(made.rows.numpy().T @ weights.numpy() - expected) <= 0.05 * made.longest


@pytest.mark.parametrize("bad", [-1e-7, float("nan"), float("inf"), 2.0, True, "float32"])
def test_a_resolution_lies_in_0_to_1(bad):
    with pytest.raises(ValueError, match=r"^Looking: `resolution` must be "):
        Looking(2)(torch.eye(2), torch.ones(2), resolution=bad)
