"""The gram and what is read off it, against correctly rounded sums."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_mtl.linalg import combination, conflict, cosines, gram, gram_of_parts, to_longest

# How far a gram may be from the exact one, relative to the norms of its two rows.
BARS = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-14, torch.float16: 1e-14}
DTYPES = pytest.mark.parametrize("dtype", BARS, ids=str)


def exact(rows: Tensor) -> list[list[float]]:
    """Products in float64, which are exact for the shorter dtypes, and a sum that is rounded once."""
    values = rows.double().tolist()
    return [[math.fsum(x * y for x, y in zip(a, b, strict=True)) for b in values] for a in values]


def error(found: Tensor, rows: Tensor) -> float:
    """The largest difference from the exact gram, relative to the norms of the two rows."""
    right = torch.tensor(exact(rows), dtype=torch.float64)
    norms = right.diagonal().sqrt()
    return float(((found - right).abs() / (norms[:, None] * norms)).max())


@DTYPES
@pytest.mark.parametrize("num_tasks, num", [(1, 1), (3, 1), (2, 7), (5, 300), (3, 1024), (3, 2500)])
def test_gram_of_rows(num_tasks, num, dtype):
    rows = torch.randn(num_tasks, num).to(dtype)
    found = gram(rows)
    assert found.dtype == torch.float64
    assert error(found, rows) <= BARS[dtype]


@DTYPES
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e3])
def test_gram_of_rows_of_other_sizes(size, dtype):
    rows = (torch.randn(3, 1500) * size * torch.tensor([[1.0], [0.1], [10.0]])).to(dtype)
    assert error(gram(rows), rows) <= BARS[dtype]


@pytest.mark.parametrize("size", [1e-15, 1e15])
def test_gram_of_very_small_and_very_large_rows(size):
    rows = torch.randn(3, 1500) * size
    assert error(gram(rows), rows) <= BARS[torch.float32]


def test_gram_of_nearly_opposite_rows_keeps_its_sign():
    row = torch.randn(1500)
    row = row / row.norm()
    across = torch.randn(1500)
    across = (across - (across @ row) * row) * 1e-3
    rows = torch.stack([row, across - 1e-5 * row])
    assert float(gram(rows)[0, 1]) == pytest.approx(exact(rows)[0][1], rel=0.05)


def test_gram_of_rows_that_lie_apart_in_memory():
    rows = torch.randn(2500, 6).T[::2]
    assert error(gram(rows), rows) <= BARS[torch.float32]


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_a_faster_matmul_does_not_reach_the_gram(precision):
    rows = torch.randn(3, 2500)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        assert error(gram(rows), rows) <= BARS[torch.float32]
    finally:
        torch.set_float32_matmul_precision(before)


def test_gram_shows_what_is_not_finite():
    rows = torch.ones(2, 1500)
    rows[1, 3] = torch.inf
    assert gram(rows).isfinite().tolist() == [[True, False], [False, False]]


def test_gram_of_parts_is_the_gram_of_the_joined_rows():
    parts = [[torch.randn(3, 4), torch.randn(5), torch.randn(())] for _ in range(4)]
    rows = torch.stack([torch.cat([part.flatten() for part in row]) for row in parts])
    assert error(gram_of_parts(parts), rows) <= BARS[torch.float32]


def test_gram_of_no_parts_is_zero():
    assert gram_of_parts([[], [], []]).tolist() == [[0.0] * 3] * 3


def test_cosines_by_hand():
    rows = torch.tensor([[3.0, 4.0], [0.0, 2.0], [-6.0, -8.0], [0.0, 0.0]], dtype=torch.float64)
    expected = [[1, 0.8, -1, 0], [0.8, 1, -0.8, 0], [-1, -0.8, 1, 0], [0, 0, 0, 0]]
    torch.testing.assert_close(cosines(gram(rows)), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_cosines_do_not_depend_on_sizes(size):
    rows = torch.randn(4, 9, dtype=torch.float64)
    scale = torch.tensor([[1.0], [size], [1.0], [size**0.5]])
    torch.testing.assert_close(cosines(gram(rows * scale)), cosines(gram(rows)))


def test_cosines_stay_within_1():
    row = torch.randn(1, 33, dtype=torch.float64)
    found = cosines(gram(torch.cat([row, row * 1.1, -row / 3])))
    assert found.abs().max() <= 1
    assert found.diagonal().tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "rows, expected",
    [
        ([[1.0, 0.0]], 0.0),
        ([[1.0, 0.0], [1.0, 1.0]], 0.0),
        ([[1.0, 0.0], [0.0, 1.0]], 0.0),
        ([[1.0, 0.0], [-1.0, 1.0]], 1.0),
        ([[1.0, 0.0], [-1.0, 0.1], [1.0, 1.0]], 2 / 3),
        ([[1.0, 0.0], [0.0, 0.0], [-1.0, 0.0]], 1 / 3),
    ],
)
def test_conflict_is_the_share_of_opposed_pairs(rows, expected):
    assert conflict(gram(torch.tensor(rows))) == pytest.approx(expected)


@pytest.mark.parametrize("columns", [1024, 4096, 5000])
@pytest.mark.parametrize("num_tasks, rank", [(3, 1), (3, 2), (8, 3), (20, 10)])
def test_rows_that_depend_on_each_other_do_so_in_their_gram(num_tasks, rank, columns):
    generator = torch.Generator().manual_seed(rank)
    rows = torch.randn(num_tasks, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)
    expected = rows.double() @ rows.double().T
    found = gram(rows)
    assert torch.equal(found, found.T)
    scale = expected.diagonal().sqrt()
    assert ((found - expected).abs() / scale / scale[:, None]).max() < 1e-13


def test_a_row_of_zeros_and_one_that_is_not_finite_pass():
    rows = torch.randn(3, 2048, generator=torch.Generator().manual_seed(0))
    rows[1] = 0
    torch.testing.assert_close(gram(rows), rows.double() @ rows.double().T, rtol=1e-6, atol=1e-4)
    rows[2, 5] = torch.nan
    assert gram(rows)[2].isnan().any()


def test_to_longest():
    rows = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 2.0], [0.3, 0.4]], dtype=torch.float64)
    factors = to_longest(rows.norm(dim=1))
    assert (factors[:, None] * rows).norm(dim=1).tolist() == pytest.approx([5, 0, 5, 5])
    assert factors[1] == 0
    assert to_longest(torch.zeros(2)).tolist() == [0, 0]


@pytest.mark.parametrize("size", [1e-24, 1e-22, 1e-20, 1.0, 1e18])
@pytest.mark.parametrize("ratio", [1.0, 1e-4, 1e-8])
def test_products_that_float32_cannot_hold(size, ratio):
    given = size * torch.randn(3, 4096, generator=torch.Generator().manual_seed(0))
    given[2] *= ratio
    assert error(gram(given), given) <= 1e-6


@pytest.mark.parametrize("ratio", [1e2, 1e4, 1e6])
def test_beside_a_long_row_the_products_of_float32_rows_are_those_of_float64(ratio):
    given = torch.randn(3, 4096, generator=torch.Generator().manual_seed(0))
    given[0] *= ratio
    assert error(gram(given), given) <= 1e-14


@DTYPES
@pytest.mark.parametrize("num_tasks, num", [(1, 1), (3, 7), (4, 40_000)])
def test_a_combination_of_rows_that_nearly_cancel(num_tasks, num, dtype):
    """Rounded once: beside large weights nothing of what is left is lost."""
    rows = torch.randn(num_tasks, num).to(dtype)
    weights = 1e5 * torch.ones(num_tasks, dtype=torch.float64)
    if num_tasks > 1:
        rows[1], weights[1] = -rows[0], 1e5 - 1
    found = combination(weights, rows)
    assert found.dtype == dtype
    columns = [0, num // 2, num - 1]
    wide = rows[:, columns].double().T.tolist()
    expected = [math.fsum(w * x for w, x in zip(weights.tolist(), column, strict=True)) for column in wide]
    kept = torch.tensor(expected, dtype=torch.float64).to(dtype)
    torch.testing.assert_close(found[columns], kept, rtol=2 * torch.finfo(dtype).eps + 1e-9, atol=0)


def test_a_combination_of_rows_without_columns():
    assert combination(torch.ones(2), torch.zeros(2, 0)).shape == (0,)
