"""Projection on the cone of directions that no row opposes."""

from __future__ import annotations

import numpy as np

from lightning_mtl.linalg.active_set import until_zero

Array = np.ndarray
_EPS = float(np.finfo(np.float64).eps)
#: Where the constraints contradict each other, how far (as a cosine, squared) they may give way.
_RIDGE = 1e-10


def project_on_dual_cone(unit: Array, vectors: Array) -> Array:
    r"""The nearest vectors :math:`v` with :math:`Jv \ge 0`, for vectors in the span of the rows.

    Shapes: unit gram ``[T, T]`` of the rows, vectors ``[B, T]`` as weights on the unit rows -> ``[B, T]``, the same.
    """
    size = np.abs(vectors).max(1, keepdims=True)
    scaled = np.divide(vectors, size, out=np.zeros_like(vectors), where=size > 0)
    pushed: Array = scaled + nonnegative_qp(unit, scaled @ unit)
    # What is left of a vector that was cut to nothing is rounding.
    length = (pushed @ unit * pushed).sum(1)
    noise = 64 * _EPS * len(unit) * np.maximum((pushed * pushed).sum(1), 1)
    pushed[length <= noise] = 0
    pushed *= size
    return pushed


def nonnegative_qp(unit: Array, linear: Array) -> Array:
    r"""Minimise :math:`\tfrac12 y^\top C y + q^\top y` over :math:`y \ge 0`, a batch of them at once.

    Block principal pivoting (Judice and Pires, Computers & OR 21, 1994) on the whole batch. Where rows depend on each
    other, single pivots (Lawson and Hanson 1974, chapter 23). Where there is no minimum, because ``q`` asks for what
    the rows forbid, the minimum with ``C`` a little raised on its diagonal.

    Shapes: unit ``[T, T]``, diagonal 1 or 0, linear ``[B, T]`` -> ``[B, T]``.
    """
    if (linear >= 0).all():
        return np.zeros_like(linear)
    found, solved = _block_pivoting(unit, linear)
    for index in np.flatnonzero(~solved):
        row = linear[index : index + 1]
        single = _single_pivoting(unit, row[0])[None]
        if not _optimal(unit, row, single)[0]:
            single = _single_pivoting(unit + _RIDGE * np.eye(len(unit)), row[0])[None]
        found[index] = single[0]
    return found


def nonnegative_guess(unit: Array, linear: Array) -> Array:
    """What :func:`nonnegative_qp` looks for, after the fast rounds only: nearly always right, never slow."""
    return _block_pivoting(unit, linear)[0]


def _solve(inside: Array, right: Array) -> Array:
    """Rows that push are independent but for rounding; where that matters, least squares."""
    try:
        found = np.linalg.solve(inside, right)
        if np.isfinite(found).all() and np.abs(inside @ found - right).max(initial=0.0) <= 1e-12:
            return np.asarray(found)
    except np.linalg.LinAlgError:
        pass
    return np.asarray(np.linalg.lstsq(inside, right, rcond=_EPS * len(right))[0])


def _tolerance(largest: Array | float, y: Array) -> Array:
    """What rounding leaves in ``C y + q``, ``q`` as large as given."""
    bound: Array = (32 * _EPS) * (largest + np.abs(y).sum(-1, keepdims=True))
    return bound


def _optimal(unit: Array, linear: Array, y: Array) -> Array:
    slope = y @ unit + linear
    bound = _tolerance(np.abs(linear).max(-1, keepdims=True), y)
    with np.errstate(invalid="ignore"):
        fine: Array = ((y >= 0) & (slope >= -bound) & ((y == 0) | (slope <= bound))).all(1)
    return fine


def _block_pivoting(unit: Array, linear: Array) -> tuple[Array, Array]:
    """The last point of each of the batch, ``[B, T]``, and whether it is the minimiser, ``[B]``."""
    batch, size = linear.shape
    result, solved = np.zeros_like(linear), np.zeros(batch, bool)
    fewest, patience, left = np.full(batch, size + 1), np.full(batch, 3), np.arange(batch)
    chosen, aim, largest, eye = linear < 0, linear, np.abs(linear).max(1, keepdims=True), np.eye(size)
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
            aim[free] = _solve(unit[free][:, free], -linear[free])
            falling = free & (aim <= 0)
            if not falling.any():
                y = aim
                break
            y, stopped = until_zero(y, aim, falling)
            free &= ~stopped
    return y
