"""The dual of CAGrad: weights on the simplex whose direction is added to the mean gradient."""

from __future__ import annotations

import math

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
    dual = _Dual(gram, c, share)
    w = dual.descend()
    return dual.bracketed() if w is None else w


class _Dual:
    """One problem: the unit gram, and the vectors of its dual in which nothing is large."""

    def __init__(self, gram: Array, c: float, share: float) -> None:
        self.unit, self.norms = unit_gram(gram)
        count = len(gram)
        self.pull = gram.sum(1) * (share / count)
        self.radius = c * math.sqrt(max(share * float(self.pull.sum()) / count, 0.0))
        self.wish = self.pull / self.norms
        self.smallest = float(self.norms.min())
        self.normal = self.smallest / self.norms

    def descend(self) -> Array | None:
        """From support to support, each time to its own minimiser; ``None`` where rounding gets in the way."""
        size, best = len(self.norms), math.inf
        support, w = np.ones(size, bool), np.full(size, 1 / size)
        for _ in range(10 * size + 10):
            _, aim, away = self.root(support)
            # Where the objective falls without end: as far as the simplex goes.
            target = aim if aim is not None else None if away is None else w + away
            if target is None:
                return None
            falling = support & (target <= 0 if aim is not None else target < w)
            if falling.any():
                if best == math.inf:  # on the way to the first minimiser, all that fall go at once
                    support = support & ~falling
                    if not support.any():
                        support[np.argmin(self.pull + self.radius * self.norms)] = True
                    w = support / support.sum()
                    continue
                w, stopped = until_zero(w, target, falling, longest=math.inf)
                support = support & ~stopped
                continue
            if aim is None:
                return None
            w = aim
            scaled = w * self.norms
            seen = self.unit @ scaled
            length = math.sqrt(max(float(scaled @ seen), 0.0))
            value = float(w @ self.pull) + self.radius * length
            if length == 0 or value >= best:
                return None
            best = value
            # The slope along each row of length 1; at the minimum those outside the support are not below its level.
            slack = self.wish + (self.radius / length) * seen - value / self.norms
            slack[support] = np.inf
            worst = int(slack.argmin())
            if slack[worst] >= -_SOLVED * (self.radius + float(np.abs(self.wish).max())):
                return w
            support = support.copy()
            support[worst] = True
        return None

    def bracketed(self) -> Array:
        """The right ``t`` by a quadratic program for each, in a bracket that shrinks."""
        # No combination is longer than the longest row.
        low, high, t, longest = 0.0, math.inf, 0.0, float(self.norms.max()) / self.radius
        w: Array | None = None
        for _ in range(100):
            w = simplex_qp(self.unit, self.norms, t * self.pull, w, refine=False)
            scaled = w * self.norms
            length = math.sqrt(max(float(scaled @ self.unit @ scaled), 0.0))
            excess = length - t * self.radius
            if t > 0:  # at 0 a combination that is zero looks like the solution, which it need not be
                low, high = (t, high) if excess > 0 else (low, t)
                if abs(excess) <= _SOLVED * (length + t * self.radius) or low * (1 + 4 * _EPS) >= high:
                    break
            if high <= _EPS * longest:
                break
            t, _, _ = self.root(w > 0)
            if not low < t < high:
                t = min(2 * low, longest) if math.isinf(high) else (low + high) / 2 if low > 0 else high / 16
                t = t or longest
        assert w is not None
        return w

    def root(self, support: Array) -> tuple[float, Array | None, Array | None]:
        """The ``t > 0`` at which the minimiser on this support has length ``t * radius``, and that minimiser.

        If there is none, NaN, ``None``, and the direction in which the objective falls without end, if it does.
        """
        inside, normal, wish, norms = self.unit, self.normal, self.wish, self.norms
        if not support.all():
            inside, normal, wish, norms = inside[support][:, support], normal[support], wish[support], norms[support]
        # In v = w n / smallest norm; the right sides of the constraint, and of what is linear in t.
        sides = np.zeros((len(norms) + 1, 2))
        sides[-1, 0], sides[:-1, 1] = self.smallest, -wish
        try:
            lines = np.linalg.solve(bordered(inside, normal), sides)[:-1]
        except np.linalg.LinAlgError:
            return math.nan, None, None
        (constant, mixed), (_, square) = (lines.T @ (inside @ lines)).tolist()
        # Where the rows of the support can be combined to zero, what is left of it is rounding.
        if constant <= 64 * _EPS * len(norms) * float(lines[:, 0] @ lines[:, 0]):
            constant = mixed = 0.0
        square -= self.radius * self.radius
        under = mixed * mixed - square * constant
        # The form without cancellation; the roots have the signs of constant / square.
        q = -(mixed + math.copysign(math.sqrt(max(under, 0.0)), mixed))
        found = [
            x for x in (q / square if square else math.nan, constant / q if q else math.nan) if x > 0 and under >= 0
        ]
        w = np.zeros(len(support))
        if not found:
            w[support] = lines[:, 1] / norms
            return math.nan, None, w if square > 0 else None
        t = min(found)
        w[support] = (lines[:, 0] + t * lines[:, 1]) / norms
        return t, w, None
