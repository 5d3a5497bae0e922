"""A gram without the lengths of its rows: what remains are cosines, on which tolerances mean the same everywhere."""

from __future__ import annotations

import numpy as np
import torch

Array = np.ndarray

#: How exact the rows behind a gram are, relatively, where nobody says: float64.
EXACT = float(np.finfo(np.float64).eps)
#: Eigenvalues of a unit gram below this (times ``T``) count as 0, of rows of float32 or better: those that depend on
#: each other leave about 1e-14 there. Of coarser rows, those below the square of their resolution.
RANK_TOLERANCE = 1e-12
_MANY = 30


def unit_gram(gram: Array) -> tuple[Array, Array]:
    """Split ``gram = diag(norms) @ unit @ diag(norms)``; a row of norm 0 has zeros in ``unit``, off the diagonal too.

    Shapes: gram ``[T, T]`` -> unit ``[T, T]`` with diagonal 1 (or 0), norms ``[T]``.
    """
    norms: Array = np.sqrt(np.maximum(gram.diagonal(), 0.0))
    there = norms > 0
    inverse = np.divide(1.0, norms, out=np.zeros(len(norms)), where=there)
    unit: Array = gram * inverse * inverse[:, None]
    unit.flat[:: len(norms) + 1] = there
    return unit, norms


def divided(numerator: Array, norms: Array) -> Array:
    """``numerator / norms``, 0 where the norm is 0. Shapes: ``[..., T]`` and ``[T]`` -> ``[..., T]``."""
    return np.divide(numerator, norms, out=np.zeros(np.broadcast(numerator, norms).shape), where=norms > 0)


def eigen(matrix: Array) -> tuple[Array, Array]:
    """Eigenvalues, ascending, and eigenvectors of a symmetric matrix ``[T, T]`` -> ``[T]``, ``[T, T]``.

    From some 30 tasks on by torch: numpy's LAPACK starts threads there, and waits milliseconds for a core that is busy.
    """
    if len(matrix) < _MANY:
        values, vectors = np.linalg.eigh(matrix)
        return values, vectors
    values, vectors = torch.linalg.eigh(torch.from_numpy(matrix))
    return values.numpy(), vectors.numpy()


def rank_tolerance(unit: Array, resolution: float) -> float:
    """Eigenvalues up to this are 0 as far as is known, of a unit gram ``[T, T]``."""
    return len(unit) * max(RANK_TOLERANCE, resolution * resolution)


def factor(unit: Array, resolution: float = EXACT) -> Array:
    """Rows of the lowest dimension with this gram: ``unit = factor @ factor.T``.

    The rank is decided here: directions that the rows' rounding may have made are dropped.

    Shapes: unit ``[T, T]`` -> ``[T, r]``.
    """
    values, vectors = eigen(unit)
    kept = values > rank_tolerance(unit, resolution)
    result: Array = vectors[:, kept] * np.sqrt(values[kept])
    return result


def solve_symmetric(unit: Array, right: Array, resolution: float = EXACT) -> Array:
    """Least-squares solution of smallest norm of ``unit @ x = right``, with one step of refinement.

    Shapes: unit ``[T, T]``, right ``[T]`` or ``[T, K]`` -> the same.
    """
    values, vectors = eigen(unit)
    kept = values > rank_tolerance(unit, resolution)
    inverse = (vectors[:, kept] / values[kept]) @ vectors[:, kept].T
    x = inverse @ right
    refined: Array = x + inverse @ (right - unit @ x)
    return refined


def equal_angles(unit: Array, resolution: float = EXACT) -> Array:
    """Weights on the unit rows whose combination has the inner product 1 with each of them, or comes closest to it.

    All zero where no combination comes closer than zero does.

    Shapes: unit ``[T, T]`` -> ``[T]``.
    """
    ones = (unit.diagonal() > 0).astype(float)
    weights = solve_symmetric(unit, ones, resolution)
    if ones @ unit @ weights <= rank_tolerance(unit, resolution):
        return np.zeros_like(ones)
    return weights
