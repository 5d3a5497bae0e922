"""The dual of CAGrad: weights on the simplex whose direction is added to the mean gradient."""

from __future__ import annotations

import numpy as np

from lightning_mtl.linalg.active_set import bordered, until_zero
from lightning_mtl.linalg.simplex import simplex_qp
from lightning_mtl.linalg.unit import unit_gram

Array = np.ndarray
_EPS = float(np.finfo(np.float64).eps)
#: How near the length must come to its share of the pull, relatively.
_SOLVED = 1e-12


def cagrad_dual(gram: Array, c: float, share: float = 1.0) -> Array:
    r"""Minimise :math:`g_w^\top g_0 + c \|g_0\| \|g_w\|` over the simplex, :math:`g_w = J^\top w`.

    :math:`g_0` is ``share`` times the mean row: the mean over more rows, the others zero.

    The minimiser also minimises :math:`\tfrac12 \|g_w\|^2 + t\, g_w^\top g_0` for the ``t`` at which
    :math:`\|g_w\| = t c \|g_0\|`. For a given ``t`` that is a quadratic program; on its support ``w`` is linear in
    ``t``, so the right ``t`` is the root of a quadratic equation. A handful of rounds finds support and ``t``, with
    bisection as a safeguard.

    Shapes: gram ``[T, T]`` without rows of zeros, c > 0 -> ``[T]``, >= 0, summing to 1.
    """
    unit, norms = unit_gram(gram)
    pull = share * gram.mean(1)
    radius = c * np.sqrt(max(share * float(pull.mean()), 0.0))
    w = _descend(unit, norms, pull, radius)
    return _bracketed(unit, norms, pull, radius) if w is None else w


def _descend(unit: Array, norms: Array, pull: Array, radius: float) -> Array | None:
    """From support to support, each time to its own minimiser; ``None`` where rounding gets in the way."""
    size, best = len(norms), np.inf
    support, w = np.ones(size, bool), np.full(size, 1 / size)
    for _ in range(10 * size + 10):
        _, aim, away = _root(unit, norms, pull, support, radius)
        # Where the objective falls without end: as far as the simplex goes.
        target = aim if aim is not None else None if away is None else w + away
        if target is None:
            return None
        falling = support & (target <= 0 if aim is not None else target < w)
        if falling.any():
            if best == np.inf:  # on the way to the first minimiser, all that fall go at once
                support = support & ~falling
                if not support.any():
                    support[np.argmin(pull + radius * norms)] = True
                w = support / support.sum()
                continue
            w, stopped = until_zero(w, target, falling, longest=np.inf)
            support = support & ~stopped
            continue
        if aim is None:
            return None
        w = aim
        length = _length(unit, norms, w)
        value = float(w @ pull) + radius * length
        if length == 0 or value >= best:
            return None
        best = value
        # The slope along each row of length 1; at the minimum those outside the support are not below its level.
        slope = pull / norms + radius / length * (unit @ (w * norms))
        slack = slope - value / norms
        slack[support] = np.inf
        worst = int(np.argmin(slack))
        if slack[worst] >= -_SOLVED * (radius + np.abs(pull / norms).max()):
            return w
        support = support.copy()
        support[worst] = True
    return None


def _bracketed(unit: Array, norms: Array, pull: Array, radius: float) -> Array:
    """The right ``t`` by a quadratic program for each, in a bracket that shrinks."""
    low, high, t = 0.0, np.inf, 0.0
    w: Array | None = None
    for _ in range(100):
        w = simplex_qp(unit, norms, t * pull, w, refine=False)
        length = _length(unit, norms, w)
        excess = length - t * radius
        low, high = (t, high) if excess > 0 else (low, t)
        if abs(excess) <= _SOLVED * (length + t * radius) or low * (1 + 4 * _EPS) >= high:
            break
        t, _, _ = _root(unit, norms, pull, w > 0, radius)
        if not low < t < high:
            t = (low + high) / 2 if np.isfinite(high) else 2 * low + length / radius
    assert w is not None
    return w


def _length(unit: Array, norms: Array, w: Array) -> float:
    scaled = w * norms
    return float(np.sqrt(max(scaled @ unit @ scaled, 0.0)))


def _root(
    unit: Array, norms: Array, pull: Array, support: Array, radius: float
) -> tuple[float, Array | None, Array | None]:
    """The ``t > 0`` at which the minimiser on this support has length ``t * radius``, and that minimiser.

    If there is none, NaN, ``None``, and the direction in which the objective falls without end, if it does.
    """
    nothing = float("nan"), None, None
    n, b = norms[support], pull[support]
    count, smallest = len(n), n.min()
    system = bordered(unit[support][:, support], smallest / n)
    sides = np.zeros((count + 1, 2))
    sides[count, 0] = smallest
    sides[:count, 1] = -b / n
    try:
        fixed, moving = np.linalg.solve(system, sides)[:count].T
    except np.linalg.LinAlgError:
        return nothing
    inside = system[:count, :count]
    square = float(moving @ inside @ moving) - radius**2
    mixed = float(fixed @ inside @ moving)
    constant = float(fixed @ inside @ fixed)
    root = mixed**2 - square * constant
    # The form without cancellation; the roots have the signs of constant / square.
    q = -(mixed + np.copysign(np.sqrt(max(root, 0.0)), mixed))
    found = [x for x in (q / square if square else np.nan, constant / q if q else np.nan) if x > 0 and root >= 0]
    w = np.zeros(len(norms))
    if not found:
        w[support] = moving / n
        return float("nan"), None, w if square > 0 else None
    w[support] = (fixed + min(found) * moving) / n
    return min(found), w, None
