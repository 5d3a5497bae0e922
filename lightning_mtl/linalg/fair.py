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
#: A Newton step that changes no weight by more than this share is taken whole, if it brings the equation nearer.
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
    """Minimise ``z S z / 2 - sum r phi(z)``, ``phi' = z^-p``, and say how far ``(S z) z^p / r`` is from 1."""
    # Solved in a variable in which the system has a unit diagonal.
    root = np.sqrt(system.diagonal())
    unit = system / np.outer(root, root)
    z = np.ones(len(r))
    best, error, idle = z, np.inf, 0
    for _ in range(_ROUNDS):
        pull, seen = z**-power, system @ z
        residual = seen - r * pull
        now = float(np.abs(seen / (r * pull) - 1).max())
        idle = 0 if now < error else idle + 1
        if now < error:
            best, error = z, now
        # Towards a combination that cancels the weights grow for ever.
        if idle > _PATIENCE or z.max() > _ENDLESS:
            break
        # At the solution Newton's steps are rounding, and go on for ever.
        if error <= _PRECISE or (error <= _SOLVED and idle > 2) or (error <= _NEARLY and idle > 0):
            break
        try:
            move = -np.linalg.solve(unit + np.diag(power * r * pull / z / root**2), residual / root) / root
        except np.linalg.LinAlgError:
            break
        if not np.isfinite(move).all():
            break
        z = z + _step(system, r, z, move, float(residual @ move), power, now) * move
    return best, error


def _step(system: Array, r: Array, z: Array, move: Array, slope: float, power: float, now: float) -> float:
    """How far to go: at most nine tenths of the way to 0, which the barrier forbids, and downhill."""
    share = move / z
    falling = float(share.min())
    if max(-falling, float(share.max())) <= _NEAR and _error(system, r, z + move, power) < now:
        return 1.0
    step = min(1.0, 0.9 / -falling) if falling < 0 else 1.0
    value = _objective(system, r, z, power)
    if -slope <= 1e-12 * (abs(value) + float(z @ np.abs(system) @ z)):
        # The objective, in which large tasks drown the small, cannot tell any more: the equations themselves can.
        tried = [step * 0.5**halving for halving in range(8)]
        return min(tried, key=lambda part: _error(system, r, z + part * move, power))
    for _ in range(40):
        if _objective(system, r, z + step * move, power) <= value + 1e-4 * step * slope:
            break
        step *= 0.5
    return step


def _error(system: Array, r: Array, z: Array, power: float) -> float:
    return float(np.abs((system @ z) / r * z**power - 1).max())


def _objective(system: Array, r: Array, z: Array, power: float) -> float:
    integral = np.log(z) if power == 1 else z ** (1 - power) / (1 - power)
    return float(0.5 * z @ system @ z - r @ integral)
