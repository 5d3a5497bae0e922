"""Projection on the cone of directions that no row opposes."""

from __future__ import annotations

import math

import numpy as np

from lightning_mtl.linalg.active_set import until_zero
from lightning_mtl.linalg.unit import EXACT

Array = np.ndarray
_EPS = float(np.finfo(np.float64).eps)
#: How far a push may let a constraint give way in one round, where rows depend on each other: as far as the rows'
#: rounding, and this, because a gram in float64 tells no more.
_RIDGE = 1e-10
#: Rounds at most, and how little pushes move in the last, against what is asked for.
_ROUNDS, _STILL = 10, 1e-3


def project_on_dual_cone(unit: Array, vectors: Array, resolution: float = EXACT) -> Array:
    r"""The nearest vectors :math:`v` with :math:`Jv \ge 0`, for vectors in the span of the rows.

    Shapes: unit gram ``[T, T]`` of the rows, vectors ``[B, T]`` as weights on the unit rows -> ``[B, T]``, the same.
    """
    size = np.abs(vectors).max(1, keepdims=True)
    scaled = np.divide(vectors, size, out=np.zeros_like(vectors), where=size > 0)
    pushed: Array = scaled + nonnegative_qp(unit, scaled @ unit, resolution)
    pushed[is_nothing(unit, pushed, resolution)] = 0
    pushed *= size
    return pushed


def cancelling(unit: Array, resolution: float = EXACT) -> Array:
    """Weights whose combination of the rows is zero; > 0 for each row that is part of such a one, with weights >= 0.

    Shapes: unit gram ``[T, T]``, diagonal 1 -> ``[T]``, >= 0.
    """
    together, left = np.zeros(len(unit)), np.ones(len(unit), bool)
    while left.any():
        # The shortest combination with weights >= 1. What is at an acute angle to it is part of none that is zero.
        inside = unit[left][:, left]
        weights = 1 + _pivoting(inside + _noise(unit, resolution) * np.eye(len(inside)), inside.sum(0)[None], None)[0]
        if is_nothing(inside, weights[None], resolution)[0]:
            together[left] = weights
            break
        seen = inside @ weights
        bound = _noise(unit, resolution) ** 0.25 * math.sqrt(float(weights @ seen))
        left[left] = seen < min(bound, float(seen.max()))
    return together


def is_nothing(unit: Array, vectors: Array, resolution: float) -> Array:
    """Which vectors are what rounding leaves of zero.

    Shapes: unit ``[T, T]``, vectors ``[B, T]`` as weights on the unit rows -> bool ``[B]``.
    """
    squares, parts = (vectors @ unit * vectors).sum(1), (vectors * vectors).sum(1)
    nothing: Array = squares <= _noise(unit, resolution) * np.maximum(parts, 1)
    return nothing


def _noise(unit: Array, resolution: float) -> float:
    """What rounding, of the gram or of the rows, leaves of the square of a combination with weights of norm 1."""
    return max(64 * _EPS * len(unit), resolution * resolution)


def nonnegative_qp(unit: Array, linear: Array, resolution: float = EXACT) -> Array:
    r"""Minimise :math:`\tfrac12 y^\top C y + q^\top y` over :math:`y \ge 0`, a batch of them at once.

    Block principal pivoting (Judice and Pires, Computers & OR 21, 1994) on the whole batch. Where ``y`` is so large
    that the rounding of the rows shows in it, or there is no minimum, because ``q`` asks for what the rows forbid,
    a few rounds of the proximal point method instead (Rockafellar, SIAM J. Control Optim. 14, 1976): in each ``y`` may
    move at a price. It comes to what the rows clearly ask for, and hardly moves where only their rounding asks.

    Shapes: unit ``[T, T]``, diagonal 1 or 0, linear ``[B, T]`` -> ``[B, T]``.
    """
    if (linear >= 0).all():
        return np.zeros_like(linear)
    found, solved = _block_pivoting(unit, linear)
    solved &= found.max(1) <= np.abs(linear).max(1) / math.sqrt(max(resolution, _RIDGE))
    if not solved.all():
        found[~solved] = _proximal(unit, linear[~solved], resolution)
    return found


def _proximal(unit: Array, linear: Array, resolution: float) -> Array:
    """See :func:`nonnegative_qp`: the minimum with ``ridge / 2`` times the square of the way from the ``y`` before."""
    ridge = max(resolution, _RIDGE)
    raised, y, still = unit + ridge * np.eye(len(unit)), np.zeros_like(linear), _STILL * float(np.abs(linear).max())
    for count in range(_ROUNDS):
        before, y = y, _pivoting(raised, linear - ridge * y, y > 0 if count else None)
        if float(np.abs(y - before).max()) <= still:
            break
    return y


def _pivoting(raised: Array, linear: Array, support: Array | None) -> Array:
    """The minimisers, which are unique for rows that do not depend on each other; found faster near their support."""
    found, solved = _block_pivoting(raised, linear, support)
    for index in np.flatnonzero(~solved):
        found[index] = _single_pivoting(raised, linear[index])
    return found


def nonnegative_guess(unit: Array, linear: Array) -> Array:
    """What :func:`nonnegative_qp` looks for, after the fast rounds only: nearly always right, never slow."""
    return _block_pivoting(unit, linear)[0]


def _tolerance(largest: Array | float, y: Array) -> Array:
    """What rounding leaves in ``C y + q``, ``q`` as large as given."""
    bound: Array = (32 * _EPS) * (largest + np.abs(y).sum(-1, keepdims=True))
    return bound


def _block_pivoting(unit: Array, linear: Array, support: Array | None = None) -> tuple[Array, Array]:
    """The last point of each of the batch, ``[B, T]``, and whether it is the minimiser, ``[B]``."""
    batch, size = linear.shape
    result, solved = np.zeros_like(linear), np.zeros(batch, bool)
    fewest, patience, left = np.full(batch, size + 1), np.full(batch, 3), np.arange(batch)
    chosen = linear < 0 if support is None else support
    aim, largest, eye = linear, np.abs(linear).max(1, keepdims=True), np.eye(size)
    # Where rows depend on each other it may not end; a dozen rounds are many.
    for _ in range(30):
        # Outside the chosen the system is the identity, so that y is 0 there to the last bit.
        system = np.where(chosen[:, :, None] & chosen[:, None, :], unit, eye)
        try:
            y = np.linalg.solve(system, np.where(chosen, -aim, 0)[..., None])[..., 0]
        except np.linalg.LinAlgError:
            break
        slope = y @ unit + aim
        bound = _tolerance(largest, y)
        wrong = np.where(chosen, y, slope + bound) < 0
        count = wrong.sum(1)
        done = count == 0
        # Not so where the system was too near to singular to be solved well.
        fine = done & (np.abs(slope * chosen) <= bound).all(1)
        result[left], solved[left] = y, fine
        if done.all():
            break
        improved = count < fewest
        fewest = np.minimum(count, fewest)
        patience = np.where(improved, 3, patience - 1)
        # Without progress for three rounds only the last wrong index moves, which cannot cycle (Murty 1974).
        last = size - 1 - wrong[:, ::-1].argmax(1)
        only_last = wrong & (np.arange(size) == last[:, None])
        chosen = chosen ^ np.where((patience > 0)[:, None], wrong, only_last)
        more = ~done
        left, chosen, aim = left[more], chosen[more], aim[more]
        largest, fewest, patience = largest[more], fewest[more], patience[more]
    return result, solved


def _single_pivoting(unit: Array, linear: Array) -> Array:
    """Slower, and sure to end: row by row (Lawson and Hanson 1974, chapter 23)."""
    size = len(linear)
    y, free, largest = np.zeros(size), np.zeros(size, bool), float(np.abs(linear).max())
    for _ in range(10 * size + 50):
        slope = unit @ y + linear
        slope[free] = np.inf
        worst = int(np.argmin(slope))
        if slope[worst] >= -_tolerance(largest, y)[0]:
            break
        free[worst] = True
        while True:
            aim = np.zeros(size)
            aim[free] = np.linalg.solve(unit[free][:, free], -linear[free])
            falling = free & (aim <= 0)
            if not falling.any():
                y = aim
                break
            y, stopped = until_zero(y, aim, falling)
            free &= ~stopped
    return y
