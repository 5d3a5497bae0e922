"""Rows to gram, and what can be read off a gram."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_mtl.linalg.unit import eigen

# Columns per block; the sum over blocks is float64 everywhere. On the CPU a block stays in a cache, in float32 in the
# first, in float64 in the second; on other devices large blocks mean few kernels.
_BLOCK_FLOAT32 = 1 << 10
_BLOCK_CPU = 1 << 16  # of numbers
_BLOCK = 1 << 22
# Smallest eigenvalue of the unit gram, over the ratio of the lengths, from which on float32 products will do.
_CLEAR = 0.05
# Smallest squared length, and inverse of the largest, for which they will.
_SMALLEST = 1e-24
# Length of a combination, over the sum of the lengths of its parts, below which it is summed in float64.
_SHORT = 1e-2


def gram(rows: Tensor) -> Tensor:
    """Inner products of the rows, summed in float64: relative to the norms exact to 1e-6 for float32 rows.

    On the CPU float32 products will do, block by block, if the rows turn out to be clearly independent and about
    equally long. Where they (nearly) depend on each other, products are float64 too, because rank decisions hang on the
    last digits; where one is much longer, because beside it the others' products are last digits.

    Shapes: rows ``[T, N]`` -> gram float64 ``[T, T]``.
    """
    # Reduced-precision matmul (a setting that many turn on for speed) must not reach the gram.
    exact = torch.get_float32_matmul_precision() == "highest"
    if rows.device.type == "cpu" and rows.dtype == torch.float32 and exact and rows.shape[1] >= _BLOCK_FLOAT32:
        total = _in_float32(rows)
        if _clear(total):
            return total
    return _in_float64(rows)


def combination(weights: Tensor, rows: Tensor) -> Tensor:
    """``weights @ rows``, summed in float64 like their gram: where rows cancel, large weights leave little.

    Shapes: weights ``[T]``, rows ``[T, N]`` -> ``[N]`` in the dtype and on the device of the rows.
    """
    weights = weights.to(rows.device, torch.float64)
    return torch.cat([(weights @ block.double()).to(rows.dtype) for block in _blocks(rows)])


def cancels(weights: Tensor, gram: Tensor) -> bool:
    """Whether rows cancel so far that rounding in their own dtype would show in their combination.

    Shapes: weights ``[T]`` or ``[K, T]``, gram ``[n, n]`` or ``[K, n, n]`` of n rows, of which each T have the weights.
    """
    inner, factors = gram.numpy(), weights.numpy()
    if factors.shape[-1] < inner.shape[-1]:
        factors = np.tile(factors, inner.shape[-1] // factors.shape[-1])
    # The square of each combination, against what it would be if all its parts pointed one way.
    groups = [(factors, inner)] if inner.ndim == 2 else zip(factors, inner, strict=True)
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is reported elsewhere
        return any(w @ g @ w < (_SHORT * (np.abs(w) @ np.sqrt(g.diagonal()))) ** 2 for w, g in groups)


def _blocks(rows: Tensor) -> Sequence[Tensor]:
    return rows.split(max(_BLOCK_CPU // max(len(rows), 1), 1) if rows.device.type == "cpu" else _BLOCK, dim=1)


def _in_float64(rows: Tensor) -> Tensor:
    total = rows.new_zeros((len(rows), len(rows)), dtype=torch.float64)
    for block in _blocks(rows):
        wide = block.double()
        total.addmm_(wide, wide.T)
    return (total + total.T) / 2


def _in_float32(rows: Tensor) -> Tensor:
    done = rows.shape[1] // _BLOCK_FLOAT32 * _BLOCK_FLOAT32
    blocks = rows[:, :done].unflatten(1, (-1, _BLOCK_FLOAT32)).transpose(0, 1)
    total = torch.bmm(blocks, blocks.transpose(1, 2)).sum(0, dtype=torch.float64)
    half = total.numpy() / 2
    symmetric = torch.from_numpy(half + half.T)
    return symmetric + _in_float64(rows[:, done:]) if done < rows.shape[1] else symmetric


def _clear(gram: Tensor) -> bool:
    """Whether an error of 1e-7 in a cosine is small against what tells the rows apart, and against the shortest."""
    # In numpy: on the CPU, with a handful of numbers, calling torch would take most of the time.
    inner = gram.numpy()
    squares = inner.diagonal()
    shortest, longest = float(squares.min()), float(squares.max())
    # Beyond, products of single entries leave the range of float32, and what looks like zero need not be.
    if not _SMALLEST < shortest <= longest < 1 / _SMALLEST:
        return False
    needed = _CLEAR * math.sqrt(longest / shortest)
    # Gershgorin: no eigenvalue of the unit gram is further from 1 than the cosines of a row add up to. Mostly enough.
    inverse = 1 / np.sqrt(squares)
    if 2 - float((np.abs(inner) @ inverse * inverse).max()) > needed:
        return True
    if needed >= 1 or not np.isfinite(inner).all():
        return False
    return float(eigen(inner * inverse * inverse[:, None])[0][0]) > needed


def gram_of_parts(parts: Sequence[Sequence[Tensor]]) -> Tensor:
    """The gram of rows that are given as lists of tensors, without joining them.

    Shapes: ``T`` lists of ``K`` tensors, the k-th of one shape in all lists -> gram float64 ``[T, T]``.
    """
    total: Tensor | None = None
    for column in zip(*parts, strict=True):
        part = gram(torch.stack([tensor.reshape(-1) for tensor in column]))
        total = part if total is None else total + part
    if total is None:
        return torch.zeros((len(parts), len(parts)), dtype=torch.float64)
    return total


def cosines(gram: Tensor) -> Tensor:
    """Cosines between the rows; 0 with a row of norm 0, exactly 1 on the diagonal otherwise.

    Shapes: gram ``[T, T]`` -> ``[T, T]``.
    """
    norms = gram.diagonal().clamp(min=0).sqrt()
    scale = torch.where(norms > 0, 1 / norms, torch.zeros_like(norms))
    result = gram * scale[:, None] * scale[None, :]
    result.diagonal().copy_((norms > 0).to(gram.dtype))
    return result.clamp(-1, 1)


def to_longest(norms: Tensor) -> Tensor:
    """Factors that make every row as long as the longest; 0 for a row of norm 0. Shapes: ``[T]`` -> ``[T]``."""
    return torch.where(norms > 0, norms.max() / norms, 0)


def conflict(gram: Tensor) -> float:
    """Share of the task pairs whose gradients have a negative inner product; 0 for a single task.

    Shapes: gram ``[T, T]`` -> a number in [0, 1].
    """
    num_tasks = len(gram)
    if num_tasks < 2:
        return 0.0
    upper = torch.triu_indices(num_tasks, num_tasks, offset=1)
    return float((gram[upper[0], upper[1]] < 0).double().mean())


def cross_gram(gram: Tensor) -> Tensor:
    """From the gram of two halves' rows the inner products of the first with the second, on the scale of the whole.

    Each half's rows are about half as long as those of the whole, because its loss is a share of the whole's.

    Shapes: gram ``[2T, 2T]`` -> ``[T, T]``.
    """
    half = len(gram) // 2
    return 4 * gram[:half, half:]
