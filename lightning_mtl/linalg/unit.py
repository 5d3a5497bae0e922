"""A gram without the lengths of its rows: what remains are cosines, on which tolerances mean the same everywhere."""

from __future__ import annotations

import numpy as np
import torch

Array = np.ndarray

#: Eigenvalues of a unit gram below this (times ``T``) count as 0. Float32 rows that depend on each other leave about
#: 1e-14 there.
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


def factor(unit: Array) -> Array:
    """Rows of the lowest dimension with this gram: ``unit = factor @ factor.T``.

    The rank is decided here: directions with an eigenvalue below ``RANK_TOLERANCE * T`` are dropped.

    Shapes: unit ``[T, T]`` -> ``[T, r]``.
    """
    values, vectors = eigen(unit)
    kept = values > RANK_TOLERANCE * len(unit)
    result: Array = vectors[:, kept] * np.sqrt(values[kept])
    return result


def solve_symmetric(unit: Array, right: Array) -> Array:
    """Least-squares solution of smallest norm of ``unit @ x = right``, with one step of refinement.

    Shapes: unit ``[T, T]``, right ``[T]`` -> ``[T]``.
    """
    values, vectors = eigen(unit)
    kept = values > RANK_TOLERANCE * len(unit)
    inverse = (vectors[:, kept] / values[kept]) @ vectors[:, kept].T
    x = inverse @ right
    refined: Array = x + inverse @ (right - unit @ x)
    return refined


def equal_angles(unit: Array) -> Array:
    """Weights on the unit rows whose combination has the inner product 1 with each of them, or comes closest to it.

    All zero where no combination comes closer than zero does.

    Shapes: unit ``[T, T]`` -> ``[T]``.
    """
    ones = (unit.diagonal() > 0).astype(float)
    weights = solve_symmetric(unit, ones)
    if ones @ unit @ weights <= RANK_TOLERANCE * len(unit):
        return np.zeros_like(ones)
    return weights
