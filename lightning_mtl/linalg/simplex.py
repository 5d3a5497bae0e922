"""Quadratic programs on the probability simplex."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lightning_mtl.linalg.active_set import bordered, until_zero
from lightning_mtl.linalg.dual_cone import nonnegative_guess
from lightning_mtl.linalg.unit import unit_gram

Array = np.ndarray
_EPS = float(np.finfo(np.float64).eps)
#: Rows from which on a search for the support pays.
_MANY = 8


def project_on_simplex(vector: Array) -> Array:
    """The nearest point with entries >= 0 that sum to 1.

    Shapes: ``[T]`` -> ``[T]``. Source: Held, Wolfe, Crowder, Math. Programming 6 (1974), by sorting.
    """
    # A common shift changes nothing but the rounding: beside 1e20, a sum of 1 would be lost.
    vector = vector - vector.max()
    ordered = np.sort(vector)[::-1]
    excess = np.cumsum(ordered) - 1
    count = np.arange(1, len(vector) + 1)
    last = int(np.nonzero(ordered * count > excess)[0][-1])
    result: Array = np.maximum(vector - excess[last] / (last + 1), 0)
    return result


def proportions(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weights >= 0 divided by their sum, and the sum; where that is 0, equal ones.

    Shapes: ``[P]`` -> ``[P]``, ``[]``.
    """
    total = weights.sum()
    return torch.where(total > 0, weights / total, 1 / len(weights)), total


def min_norm(gram: Array) -> Array:
    """Weights of the point of smallest norm in the convex hull of the rows.

    Exact up to rounding: an active-set method (Wolfe, Math. Programming 11, 1976) on the unit gram, which ends after
    finitely many steps. A row of zeros is that point.

    Shapes: gram ``[T, T]`` -> ``[T]``, >= 0, summing to 1.
    """
    unit, norms = unit_gram(gram)
    if not norms.all():
        return _spread_over(norms == 0)
    start = None
    if len(gram) >= _MANY:
        # Up to its sum, the point is the minimiser of |y @ rows|^2 / 2 - sum(y) over y >= 0 (if that has any), whose
        # support is found in a few rounds. It is a place to start from; what is exact comes after.
        guess = nonnegative_guess(unit, -(norms.min() / norms)[None])[0]
        start = guess if guess.any() else None
    return simplex_qp(unit, norms, np.zeros(len(gram)), start)


def simplex_qp(unit: Array, norms: Array, linear: Array, start: Array | None = None, *, refine: bool = True) -> Array:
    r"""Minimise :math:`\tfrac12 w^\top G w + b^\top w` over the simplex, :math:`G = D\,\mathrm{unit}\,D`.

    Args:
        unit: ``[T, T]``, diagonal 1.
        norms: the diagonal of ``D``, ``[T]``, > 0.
        linear: ``b``, ``[T]``.
        start: a point of the simplex to start from, ``[T]``; only its support matters.
        refine: whether one step of refinement follows.

    Returns: ``[T]``. At most ``10 T + 100`` changes of the support, of which a handful happens.
    """
    # In v = w n / smallest norm nothing is large: the constraint is c @ v = 1 with c in (0, 1].
    smallest = norms.min()
    c, b = smallest / norms, linear / (norms * smallest)
    v = _start(unit, c, b, start)
    size, best, stalled = len(c), np.inf, 0
    for _ in range(10 * size + 100):
        slope, support = unit @ v + b, v > 0
        slack = slope - (v @ slope) * c
        outside = np.where(support, np.inf, slack)
        worst = int(outside.argmin())
        value, noise = float(v @ (slope + b)), _EPS * size * float(v.max())
        # Rounding may let two supports call each other better for ever.
        stalled, best = (0, value) if value < best else (stalled + 1, best)
        if outside[worst] >= -8 * (noise + _EPS * size * abs(b[worst])) or stalled > 2:
            break
        support[worst] = True
        v = _on_support(unit, c, b, v, support)
    inside = slack[support]
    if refine and np.abs(inside).max() > noise:
        # The residual of what was solved.
        correction = _solve(unit, c, support, -inside, 1 - c @ v)
        if (v[support] + correction > 0).all():
            v[support] += correction
    w = v * c
    result: Array = w / w.sum()
    return result


def _start(unit: Array, c: Array, b: Array, start: Array | None) -> Array:
    """A point that is the minimiser on its own support."""
    support = np.ones(len(c), bool) if start is None else start > 0
    v = np.zeros(len(c))
    while support.any():
        aim = _solve(unit, c, support, -b[support], 1.0)
        if (aim > 0).all():
            v[support] = aim
            return v
        support[support] = aim > 0
    first = int(np.argmin(0.5 / c**2 + b / c))
    v[first] = 1 / c[first]
    return v


def _on_support(unit: Array, c: Array, b: Array, v: Array, support: Array) -> Array:
    """The minimiser whose support lies in the given one: on the way there, entries that reach 0 are dropped."""
    while True:
        aim = np.zeros_like(v)
        aim[support] = _solve(unit, c, support, -b[support], 1.0)
        falling = support & (aim <= 0)
        if not falling.any():
            return aim
        v, stopped = until_zero(v, aim, falling)
        support = support & ~stopped


def _solve(unit: Array, c: Array, support: Array, right: Array, total: float | Array) -> Array:
    """The stationary point of the quadratic on a support, where ``c @ v = total``."""
    inside, normal = (unit, c) if support.all() else (unit[support][:, support], c[support])
    system, sides = bordered(inside, normal), np.empty(len(right) + 1)
    sides[:-1], sides[-1] = right, total
    try:
        found: Array = np.linalg.solve(system, sides)
    except np.linalg.LinAlgError:
        found = np.linalg.lstsq(system, sides, rcond=None)[0]
    return found[:-1]


def _spread_over(mask: Array) -> Array:
    result: Array = mask / mask.sum()
    return result
