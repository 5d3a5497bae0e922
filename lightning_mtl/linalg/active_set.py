"""What active-set methods share: the way to a boundary, and a quadratic under one linear constraint."""

from __future__ import annotations

import numpy as np

Array = np.ndarray


def until_zero(point: Array, aim: Array, falling: Array, longest: float = 1.0) -> tuple[Array, Array]:
    """Go from a point >= 0 towards an aim, until the first of the falling entries is 0.

    Args:
        point: ``[T]``.
        aim: ``[T]``.
        falling: bool ``[T]``, not all False: the entries that must stay >= 0 and are smaller at the aim, or 0.
        longest: how often the whole way may be gone.

    Returns: where one arrives, ``[T]``, and which entries have become 0, bool ``[T]``.
    """
    ways = np.divide(point, point - aim, out=np.zeros_like(point), where=point > aim)
    step = min(float(ways[falling].min()), longest)
    stopped = falling & (ways <= step)
    arrived: Array = point + step * (aim - point)
    arrived[stopped] = 0
    return arrived, stopped


def bordered(inside: Array, normal: Array) -> Array:
    """The matrix of the stationary point of a quadratic where ``normal @ v`` is given.

    Shapes: ``[P, P]``, ``[P]`` -> ``[P + 1, P + 1]``.
    """
    count = len(normal)
    system: Array = np.zeros((count + 1, count + 1))
    system[:count, :count] = inside
    system[:count, count] = system[count, :count] = normal
    return system
