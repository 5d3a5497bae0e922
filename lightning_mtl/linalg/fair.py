"""Bargaining weights: the gradient of each task, seen by the update, equals a power of its weight."""

from __future__ import annotations

import numpy as np

from lightning_mtl.linalg.unit import unit_gram

Array = np.ndarray
_ROUNDS = 200
#: Rounds without a smaller residual, and weights against those without interaction, at which there is no solution.
_PATIENCE, _ENDLESS = 40, 1e9
#: How far a power may be from 1, or from the one before, as a logarithm.
_FAR = 0.8
#: A Newton step that changes no weight by more than this share is tried whole.
_NEAR = 0.3
#: Relative residual at which the equation counts as solved.
_SOLVED = 1e-5
#: Relative residual at which Newton has nothing to add, and at which a step that does not help is the last.
_PRECISE, _NEARLY = 1e-14, 1e-11
#: Added to the diagonal where no solution exists (the tasks' gradients cancel): the limit that it leads to is finite.
_RIDGE = 1e-10


def fair_weights(gram: Array, power: float) -> Array:
    r"""Solve the equations of a fair bargain.

    :math:`(G w)_t = w_t^{-p}` for :math:`w > 0`: Nash bargaining for ``p = 1``, alpha-fairness for ``p = 1 / alpha``.

    The solution is the minimiser of the convex :math:`\tfrac12 w^\top G w - \sum_t \int w_t^{-p}`, found by damped
    Newton from where it would be if no gradient saw another. Where the rows can be combined to zero with weights > 0
    there is no solution; then the diagonal of the unit gram is raised by 1e-10, and the weights are finite and large
    for the tasks that cancel. A row of zeros gets weight 0.

    Shapes: gram ``[T, T]``, power > 0 -> ``[T]``.
    """
    unit, norms = unit_gram(gram)
    weights, there = np.zeros(len(gram)), norms > 0
    if not there.any():
        return weights
    unit, norms = unit[there][:, there], norms[there]
    # With a power far from 1 a point that is tried may overflow; it is then no nearer than the one before.
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        weights[there] = _weights(unit, norms, power)
    return weights


def _weights(unit: Array, norms: Array, power: float) -> Array:
    # Without interaction w = norms^(-2 / (1 + p)). Powers far from 1 start at the solution for a nearer one.
    if abs(np.log(power)) > _FAR:
        nearer = float(power * np.exp(-np.sign(np.log(power)) * _FAR))
        scale = _weights(unit, norms, nearer) ** ((1 + nearer) / (1 + power))
    else:
        scale = norms ** (-2 / (1 + power))
    # In z = w / scale, S z = r z^-p, of the size of 1.
    system = unit * np.outer(norms * scale, norms * scale)
    right = scale ** (1 - power)
    z, error = _newton(system, right, power)
    if not error <= _SOLVED:
        z, _ = _newton(system + _RIDGE * np.diag(system.diagonal()), right, power)
    return scale * z


def _newton(system: Array, r: Array, power: float) -> tuple[Array, float]:
    # Solved in a variable in which the system has a unit diagonal.
    squares = system.diagonal()
    root = np.sqrt(squares)
    unit = system / np.outer(root, root)
    # From the best point with equal entries.
    ratio = float((system.sum(1) / r).mean())
    z = np.full(len(r), min(1 / ratio, 10.0) ** (1 / (1 + power)) if ratio > 0 else 1.0)
    seen, pull, now = _look(system, r, z, power)
    best, error, idle = z, now, 0
    for _ in range(_ROUNDS):
        # Towards a combination that cancels the weights grow for ever.
        if idle > _PATIENCE or z.max() > _ENDLESS:
            break
        # At the solution Newton's steps are rounding, and go on for ever.
        if error <= _PRECISE or (error <= _SOLVED and idle > 2) or (error <= _NEARLY and idle > 0):
            break
        matrix = unit.copy()
        matrix.flat[:: len(r) + 1] += power * pull / z / squares
        try:
            move = np.linalg.solve(matrix, (pull - seen) / root) / root
        except np.linalg.LinAlgError:
            break
        # Near the solution the whole step, if it brings the equation nearer.
        tried = z + move
        found = _look(system, r, tried, power) if np.abs(move / z).max() <= _NEAR else None
        if found is None or not found[2] < now:
            tried = z + _step(system, r, z, move, float((seen - pull) @ move), power) * move
            found = _look(system, r, tried, power)
        z, (seen, pull, now) = tried, found
        if np.isnan(now):
            break
        idle = 0 if now < error else idle + 1
        if now < error:
            best, error = z, now
    return best, error


def _look(system: Array, r: Array, z: Array, power: float) -> tuple[Array, Array, float]:
    """Both sides of the equation at a point, and how far they are apart, relatively."""
    seen, pull = system @ z, r / z if power == 1 else r * z**-power
    return seen, pull, float(np.abs(seen / pull - 1).max())


def _step(system: Array, r: Array, z: Array, move: Array, slope: float, power: float) -> float:
    falling = float((move / z).min())
    step = min(1.0, 0.9 / -falling) if falling < 0 else 1.0
    value = _objective(system, r, z, power)
    if -slope <= 1e-12 * (abs(value) + float(z @ np.abs(system) @ z)):
        # The objective, in which large tasks drown the small, cannot tell any more: the equations themselves can.
        tried = [step * 0.5**halving for halving in range(8)]
        return min(tried, key=lambda part: _look(system, r, z + part * move, power)[2])
    for _ in range(40):
        if _objective(system, r, z + step * move, power) <= value + 1e-4 * step * slope:
            break
        step *= 0.5
    return step


def _objective(system: Array, r: Array, z: Array, power: float) -> float:
    integral = np.log(z) if power == 1 else z ** (1 - power) / (1 - power)
    return float(0.5 * z @ system @ z - r @ integral)
