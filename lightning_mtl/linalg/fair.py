"""Bargaining weights: the gradient of each task, seen by the update, equals a power of its weight."""

from __future__ import annotations

import math

import numpy as np

from lightning_mtl.linalg.dual_cone import cancelling, is_nothing
from lightning_mtl.linalg.unit import EXACT, solve_symmetric, unit_gram

Array = np.ndarray
_TINY = float(np.finfo(np.float64).smallest_subnormal)
_ROUNDS = 200
#: Rounds without a smaller residual at which there is no solution.
_PATIENCE = 40
#: As a power of 10, weights against those without interaction at which there is none, for powers from 1 on.
_ENDLESS = 9.0
#: How far a power may be from 1, or from the one before, as a logarithm.
_FAR = 0.8
#: A whole Newton step is tried if no weight loses more than this share,
_INSIDE = 0.9
#: and taken if it leaves at most this share of the residual.
_CLEARLY = 0.5
#: Relative residual from which on rounding may be most of it, and a sum over its terms below which it is.
_ROUGH, _DIGITS = 1e-4, 1e-7
#: Relative residual at which the equation counts as solved,
_SOLVED = 1e-5
#: from which on steps go whole,
_NEARLY = 1e-6
#: at which what is left is rounding if a step does not help,
_FINE = 1e-10
#: and at which Newton has nothing to add.
_PRECISE = 1e-12
#: Cosine of a task with the update from which on, or four times the rows' resolution, it may be rounding.
_DOUBTFUL = 1e-6


def fair_weights(gram: Array, power: float, resolution: float = EXACT) -> Array:
    r"""Solve the equations of a fair bargain.

    :math:`(G w)_t = w_t^{-p}` for :math:`w > 0`: Nash bargaining for ``p = 1``, alpha-fairness for ``p = 1 / alpha``.

    The solution is the minimiser of the convex :math:`\tfrac12 w^\top G w - \sum_t \int w_t^{-p}`, found by damped
    Newton from where it would be if no gradient saw another. Where some rows can be combined to zero with weights > 0
    there is no solution; then the limit of those to the gram with an ever smaller multiple of 1 added to its diagonal:
    the other tasks bargain at a right angle to all these rows, whose tasks gain nothing. A row of zeros gets weight 0.

    Shapes: gram ``[T, T]``, power > 0 -> ``[T]``.
    """
    unit, norms = unit_gram(gram)
    # With a power far from 1 a point that is tried may overflow; it is then no nearer than the one before.
    with np.errstate(divide="ignore", over="ignore", under="ignore", invalid="ignore"):
        if norms.all():
            return np.maximum(_weights(unit, norms, power, resolution), _TINY)
        weights, there = np.zeros(len(gram)), norms > 0
        if there.any():
            weights[there] = np.maximum(_weights(unit[there][:, there], norms[there], power, resolution), _TINY)
        return weights


def _weights(unit: Array, norms: Array, power: float, resolution: float) -> Array:
    # In y = w n, without lengths: U y = r y^-p with r = n^(p - 1), for norms n around 1 (a power of 2 rounds nothing).
    size = np.exp2(round((math.log2(norms.min()) + math.log2(norms.max())) / 2))
    n = norms / size
    y, seen, error = _bargain(unit, n, power)
    doubtful = max(_DOUBTFUL, 4 * resolution) * math.sqrt(max(float(y @ seen), 0.0))
    if not (error <= _SOLVED and np.minimum.reduce(seen) > doubtful):
        together = cancelling(unit, resolution)
        if together.any():
            y = _beside(unit, n, power, resolution, together)
    return size ** (-2 / (1 + power)) * y / n


def _alone(n: Array, power: float) -> Array:
    """What solves the equations without interaction."""
    found: Array = n ** ((power - 1) / (power + 1))
    return found


def _bargain(unit: Array, n: Array, power: float) -> tuple[Array, Array, float]:
    """Where Newton ends, what each task sees of it, and how far the equation is from being solved."""
    # Powers far from 1 start at the solution for a nearer one.
    if abs(math.log(power)) > _FAR:
        nearer = power * math.exp(-math.copysign(_FAR, math.log(power)))
        start = n * ((_bargain(unit, n, nearer)[0] / n) ** ((1 + nearer) / (1 + power)))
    else:
        start = _alone(n, power)
    return _newton(unit, n ** (power - 1), start, power)


def _beside(unit: Array, n: Array, power: float, resolution: float, together: Array) -> Array:
    """The limit where some rows cancel: the others' bargain, without what lies in the span of those."""
    gone, alone = together > 0, _alone(n, power)
    # What of each of the others is at a right angle to the rows that cancel; of one in their span, nothing.
    parts = np.eye(len(n))[~gone]
    parts[:, gone] = -solve_symmetric(unit[gone][:, gone], unit[gone][:, ~gone], resolution).T
    weights, left = alone[~gone], ~is_nothing(unit, parts, resolution)
    if left.any():
        lengths, inside = n[~gone][left], parts[left]
        weights[left] = lengths * fair_weights(inside @ unit @ inside.T * lengths * lengths[:, None], power, resolution)
    y = weights @ parts
    # As much of the combination that is zero as leaves no weight smaller than the task would have alone.
    y[gone] += together[gone] * ((alone - y)[gone] / together[gone]).max()
    return y


def _newton(unit: Array, r: Array, start: Array, power: float) -> tuple[Array, Array, float]:
    # From the best multiple of the start.
    ratio = float((unit @ start / (r * start**-power)).mean())
    y = start * (min(1 / ratio, 10.0) ** (1 / (1 + power)) if ratio > 0 else 1.0)
    # The smaller the power, the further apart weights are that belong to a bargain.
    endless = 10.0 ** min(_ENDLESS * max(1 / power, 1.0), 300.0) * start
    seen, pull, now = _look(unit, r, y, power)
    best, gains, error, idle = y, seen, now, 0
    for _ in range(_ROUNDS):
        # Towards a combination that cancels the weights grow for ever.
        if error <= _PRECISE or idle > _PATIENCE or (now > 0.1 and (y > endless).any()):
            break
        # Near the solution a step that does not help is rounding; where that is much, the next may have more luck.
        if error <= _NEARLY and idle > (0 if error <= _FINE else 3):
            break
        matrix = unit.copy()
        matrix.reshape(-1)[:: len(r) + 1] += power * pull / y
        try:
            lack = pull - seen
            move = np.linalg.solve(matrix, lack)
        except np.linalg.LinAlgError:
            break
        # The whole step, if it stays inside and brings the equation clearly nearer.
        tried = y + move
        found = _look(unit, r, tried, power) if np.minimum.reduce(move / y) > -_INSIDE else None
        if found is None or not (found[2] < _CLEARLY * now or error <= _NEARLY):
            part = _step(unit, r, y, move, -float(lack @ move), power)
            if found is None or part != 1:
                tried = y + part * move
                found = _look(unit, r, tried, power)
        y, (seen, pull, now) = tried, found
        if math.isnan(now):
            break
        idle = 0 if now < error else idle + 1
        if now < error:
            best, gains, error = y, seen, now
    return best, gains, error


def _look(unit: Array, r: Array, y: Array, power: float) -> tuple[Array, Array, float]:
    """Both sides of the equation at a point, and how far they are apart, relative to what can be known."""
    seen, pull = unit @ y, r / y if power == 1 else r * y**-power
    off = np.abs(seen / pull - 1)
    error = float(np.maximum.reduce(off))
    if _FINE < error < _ROUGH:
        # Of a sum whose terms are many times as large as itself the last digits are rounding.
        error = float((off / np.maximum(np.abs(unit) @ y / np.abs(seen) * _DIGITS, 1)).max())
    return seen, pull, error


def _step(unit: Array, r: Array, y: Array, move: Array, slope: float, power: float) -> float:
    falling = float((move / y).min())
    step = min(1.0, 0.9 / -falling) if falling < 0 else 1.0
    value = _objective(unit, r, y, power)
    if -slope <= 1e-12 * (abs(value) + float(y @ np.abs(unit) @ y)):
        # The objective, in which large tasks drown the small, cannot tell any more: the equations themselves can.
        tried = [step * 0.5**halving for halving in range(8)]
        return min(tried, key=lambda part: _look(unit, r, y + part * move, power)[2])
    for _ in range(40):
        if _objective(unit, r, y + step * move, power) <= value + 1e-4 * step * slope:
            break
        step *= 0.5
    return step


def _objective(unit: Array, r: Array, y: Array, power: float) -> float:
    integral = np.log(y) if power == 1 else y ** (1 - power) / (1 - power)
    return float(0.5 * y @ unit @ y - r @ integral)
