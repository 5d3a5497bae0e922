"""What the gram balancers guarantee, as residuals over a grid: tasks, ratios of lengths, ranks, precisions of the rows.

The residuals are computed from the rows in float64 and share no code with the solvers: conditions of optimality, closed
forms, SciPy. A linear program says where the tasks' gradients cancel (a combination with weights >= 0 is zero), which
makes most guarantees void; then the update must be finite, and zero where the method says so.

``test_guarantees.py`` runs a few problems per cell, ``python benchmarks/guarantees.py`` 50, and prints the worst.

Two residuals are relative to what cancels. A gram in float64 knows the squared length of an update up to rounding of
``(sum of |w_t g_t|) ** 2``, so an update shorter than 1e-8 of ``sum of |w_t g_t|`` has no direction: cosines and gaps
are relative to the longer of the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from scipy.optimize import linprog

from lightning_mtl.balancers import load
from lightning_mtl.linalg import gram

Array = np.ndarray
SIZES = (2, 3, 8, 20, 40)
RATIOS = (1.0, 1e2, 1e4, 1e6)
DTYPES = (torch.float64, torch.float32)
BARS = {torch.float64: 1e-8, torch.float32: 1e-5}
COSINE_BARS = {torch.float64: 1e-7, torch.float32: 1e-5}
#: Below this an update is as long as rounding makes one, against the sum of the lengths of its parts.
NOTHING = 1e-8
#: Below this margin (of unit gradients, per coordinate) gradients count as cancelling.
MARGIN = 1e-6


@dataclass(frozen=True)
class Problem:
    """Rows of a known rank and ratio of lengths, in float64 though rounded to ``dtype``."""

    num_tasks: int
    rank: int
    ratio: float
    dtype: torch.dtype
    index: int

    @property
    def rows(self) -> Array:
        return _rows(self.num_tasks, self.rank, self.ratio, self.dtype, self.index)

    @property
    def units(self) -> Array:
        return self.rows / np.linalg.norm(self.rows, axis=1)[:, None]

    @property
    def margin(self) -> float:
        """How far along all tasks one direction can lead at once; 0 where gradients cancel."""
        return _margin(self.num_tasks, self.rank, self.dtype, self.index)

    def solve(self, key: str, **options: Any) -> Array:
        """The weights that the balancer gives."""
        balancer = load(key, self.num_tasks, **options)
        inner = gram(torch.from_numpy(self.rows).to(self.dtype))
        resolution = torch.finfo(self.dtype).eps
        weights = balancer(inner[None] if balancer.grouped else inner, torch.ones(self.num_tasks), None, resolution)
        return weights.view(-1).numpy()


#: Columns of the rows: in float32 enough for the products that the CPU takes in float32.
COLUMNS = {torch.float64: 150, torch.float32: 2100}


@lru_cache(maxsize=512)
def _unit_rows(num_tasks: int, rank: int, dtype: torch.dtype, index: int) -> Array:
    generator = np.random.default_rng([num_tasks, rank, index])
    rows = generator.standard_normal((num_tasks, rank)) @ generator.standard_normal((rank, COLUMNS[dtype]))
    return rows / np.linalg.norm(rows, axis=1)[:, None]


@lru_cache(maxsize=512)
def _rows(num_tasks: int, rank: int, ratio: float, dtype: torch.dtype, index: int) -> Array:
    lengths = np.geomspace(1, ratio, num_tasks)
    np.random.default_rng(index).shuffle(lengths)
    rows = torch.from_numpy(lengths[:, None] * _unit_rows(num_tasks, rank, dtype, index))
    return rows.to(dtype).double().numpy()


@cache
def _margin(num_tasks: int, rank: int, dtype: torch.dtype, index: int) -> float:
    return margin(torch.from_numpy(_unit_rows(num_tasks, rank, dtype, index)).to(dtype).double().numpy(), rank)


def margin(units: Array, rank: int) -> float:
    """The largest ``t`` with ``units @ x >= t`` for some ``|x| <= 1`` (each coordinate), a linear program."""
    # In coordinates of the span of the rows.
    points = units @ np.linalg.svd(units, full_matrices=False)[2][:rank].T
    num_tasks = len(points)
    found = linprog(
        np.append(np.zeros(rank), -1.0),
        A_ub=np.hstack([-points, np.ones((num_tasks, 1))]),
        b_ub=np.zeros(num_tasks),
        bounds=[(-1, 1)] * rank + [(None, None)],
    )
    return float(found.x[-1])


def ranks(num_tasks: int) -> list[int]:
    return sorted({1, (num_tasks + 1) // 2, max(num_tasks - 1, 1), num_tasks})


def cells(num_tasks: int, problems: int) -> Iterator[Problem]:
    for ratio in RATIOS:
        for dtype in DTYPES:
            for rank in ranks(num_tasks):
                for index in range(problems):
                    yield Problem(num_tasks, rank, ratio, dtype, index)


# Residuals. Each yields pairs of a name and a number that should be 0; a name with "cosine" has the bar of cosines.

Residuals = Iterator[tuple[str, float]]


def parts(rows: Array, weights: Array) -> tuple[Array, float, float]:
    """The update, the sum of the lengths of its parts, and its length or what rounding leaves, if that is more."""
    update = rows.T @ weights
    total = float(np.abs(weights) @ np.linalg.norm(rows, axis=1))
    return update, total, max(float(np.linalg.norm(update)), NOTHING * total)


def cancelled(rows: Array, weights: Array) -> Array:
    """Per task, by how much more than 1e7 the terms of its gain are larger than the gain; 1 if they are not.

    A sum of terms that are 1e7 times as large as itself is known to 1e-9 at best: a gram in float64 says no more, even
    when it is solved in 60 digits.
    """
    products = rows @ rows.T
    return np.maximum(np.abs(products) @ np.abs(weights) / np.abs(products @ weights) / 1e7, 1)


def cosines_below_zero(rows: Array, weights: Array) -> float:
    update, _, length = parts(rows, weights)
    return float(-(rows @ update / np.linalg.norm(rows, axis=1)).min() / length) if length > 0 else 0.0


def mgda(problem: Problem) -> Residuals:
    rows, weights = problem.rows, problem.solve("mgda")
    update, total, length = parts(rows, weights)
    norms = np.linalg.norm(rows, axis=1)
    yield "sum of weights", abs(weights.sum() - 1)
    yield "negative weight", -weights.min()
    if problem.margin <= MARGIN:
        yield "length at a stationary point", float(np.linalg.norm(update)) / total
        return
    gap = update @ update - rows @ update
    yield "gap", float((gap / (length * np.maximum(length, norms))).max())
    yield "complementarity", float(weights @ np.abs(gap) / (length * total))
    # The products that are compared are rounded relative to the longest gradient.
    if length**2 >= 1e-6 * total * norms.max():
        yield "gap / squared length", float(gap.max()) / length**2
    if problem.num_tasks == problem.rank == 2:
        difference = rows[1] - rows[0]
        first = np.clip(rows[1] @ difference / (difference @ difference), 0, 1)
        yield "closed form", abs(weights[0] - first)


def imtl_g(problem: Problem) -> Residuals:
    yield from one_line(problem, problem.solve("imtl_g"), oriented=False)


def config(problem: Problem) -> Residuals:
    weights = problem.solve("config")
    yield from one_line(problem, weights, oriented=True)
    update, _, length = parts(problem.rows, weights)
    if length == 0:
        return
    yield "length", abs((problem.rows @ update).sum() / length - length) / length


def one_line(problem: Problem, weights: Array, oriented: bool) -> Residuals:
    """Equal cosines; with dependent gradients the least-squares direction of the known rank."""
    update, total, length = parts(problem.rows, weights)
    if problem.rank == problem.num_tasks:
        cosines = problem.units @ update / length
        spread = float((cosines.max() - cosines.min()) / abs(cosines.mean()))
        yield "spread of cosines", spread / float(cancelled(problem.rows, weights).max())
    left, singular, right = np.linalg.svd(problem.units, full_matrices=False)
    kept = problem.rank
    seen = left[:, :kept].sum(0)
    if np.linalg.norm(seen) <= MARGIN:
        # No direction has equal cosines, not even in least squares.
        yield "length where there is no direction", float(np.linalg.norm(update)) / (total or 1.0)
        return
    aim = right[:kept].T @ (seen / singular[:kept])
    aim /= np.linalg.norm(aim)
    sign = np.sign((problem.rows @ aim).sum() if oriented else update @ aim)
    yield "angle to least squares", float(np.linalg.norm(update / length - sign * aim))


def fair(key: str, power: float) -> Callable[[Problem], Residuals]:
    def residuals(problem: Problem) -> Residuals:
        options = {} if key == "nash" else {"alpha": power}
        rows, weights = problem.rows, problem.solve(key, **options)
        yield "not finite", float(not np.isfinite(weights).all())
        if problem.margin <= MARGIN:
            return
        gains = rows @ (rows.T @ weights)
        yield "negative gain", float(-min(gains.min(), 0))
        yield "equation", float((np.abs(weights * np.abs(gains) ** power - 1) / cancelled(rows, weights)).max())
        if key == "nash" and problem.num_tasks == 2:
            norms, cosine = np.linalg.norm(rows, axis=1), problem.units[0] @ problem.units[1]
            yield "closed form", float(np.abs(weights * norms * np.sqrt(1 + cosine) - 1).max())

    return residuals


def cagrad(problem: Problem) -> Residuals:
    c = 0.4
    rows, weights = problem.rows, problem.solve("cagrad", c=c)
    mean, norms = rows.mean(0), np.linalg.norm(rows, axis=1)
    dual = weights - 1 / len(rows)
    update, _, length = parts(rows, weights)
    pushed, pieces, _ = parts(rows, dual)
    # Rows that cancel in the mean leave no ball; then the parts of the mean are the measure.
    radius = c * max(float(np.linalg.norm(mean)), NOTHING * float(norms.mean()))
    yield "outside the ball", float(np.linalg.norm(pushed)) / radius - 1
    yield "negative dual weight", -float((dual * norms).min()) / (pieces or 1.0)
    if problem.rank == 1:
        # On a line the least gain is largest at an end of the ball.
        signed = norms * np.sign(rows @ rows[0])
        ends = signed.mean() * np.array([1 - c, 1 + c])
        best = ends[np.argmax([(signed * end).min() for end in ends])]
        if abs(signed.mean()) > NOTHING * norms.mean():
            yield "closed form on a line", abs(float(signed @ weights) / best - 1)
    if problem.margin <= MARGIN:
        return
    yield "inside the ball", 1 - float(np.linalg.norm(pushed)) / radius
    slopes = rows @ update
    least = float(dual @ slopes / dual.sum())
    yield "a task below the least", float(((least - slopes) / (norms * length)).max())
    yield "complementarity", float(dual @ np.abs(slopes - least) / (pieces * length))


def aligned(problem: Problem) -> Residuals:
    if problem.num_tasks > 8 and problem.index > 0:
        return
    mixed = [problem.solve("aligned", preference=one.tolist()) for one in np.eye(problem.num_tasks)]
    singular = np.linalg.svd(np.stack(mixed) @ problem.rows, compute_uv=False)
    kept = singular[: problem.rank]
    yield "condition number - 1", float(kept[0] / kept[-1] - 1)
    yield "length outside the span", float((singular[problem.rank :] / kept[0]).max(initial=0))
    yield (
        "weights of the default",
        float(np.abs(problem.solve("aligned") - np.sum(mixed, 0)).max() / np.abs(mixed).max()),
    )


def dualproj(problem: Problem) -> Residuals:
    weights = problem.solve("dualproj")
    yield from projection(problem, weights, np.full(problem.num_tasks, 1 / problem.num_tasks))


def upgrad(problem: Problem) -> Residuals:
    weights = problem.solve("upgrad")
    yield "negative cosine", cosines_below_zero(problem.rows, weights)
    yield "negative weight", -float(weights.min() / np.abs(weights).max(initial=1e-300))
    one = np.zeros(problem.num_tasks)
    one[problem.index % problem.num_tasks] = 1
    yield from projection(problem, problem.solve("upgrad", preference=one.tolist()), one)


def projection(problem: Problem, weights: Array, of: Array) -> Residuals:
    """The conditions of the nearest point of the dual cone to ``rows.T @ of``."""
    rows = problem.rows
    norms = np.linalg.norm(rows, axis=1)
    yield "negative cosine", cosines_below_zero(rows, weights)
    scale = float(np.abs(of) @ norms)
    if not weights.any():
        # Zero is nearest if the vector lies in the polar cone: no direction of the dual cone helps it.
        yield "zero, but the nearest is not", distance_to_cone(rows, -rows.T @ of) / scale
        return
    pushes = (weights - of) * norms
    update, total, length = parts(rows, weights)
    yield "negative push", -float(pushes.min()) / total
    yield "complementarity", float(np.abs(pushes @ (rows @ update / norms))) / (total * length)


def distance_to_cone(rows: Array, point: Array) -> float:
    """From a point to the cone that the rows span."""
    from scipy.optimize import nnls

    units = rows / np.linalg.norm(rows, axis=1)[:, None]
    basis = np.linalg.svd(units, full_matrices=False)[2]
    return float(nnls((units @ basis.T).T, basis @ point)[1])


def pcd(problem: Problem) -> Residuals:
    tau = 0.02
    units, rows = problem.units, problem.rows
    norms = np.linalg.norm(rows, axis=1)
    weights = problem.solve("pcd", tau=tau)
    update, _, _ = parts(rows, weights)
    yield "length", abs(float(np.linalg.norm(update)) / norms[0] - 1)
    pushes = weights * norms / (weights[0] * norms[0])
    if margin(units[1:], min(problem.rank, problem.num_tasks - 1)) <= MARGIN:
        return
    direction, total, length = parts(units, pushes)
    slack = units[1:] @ direction - tau
    yield "negative cosine", -float(slack.min()) / length
    yield "negative push", -float(pushes[1:].min(initial=0)) / total
    yield "complementarity", float(np.abs(pushes[1:] @ slack)) / (total * length)


def lengths(problem: Problem) -> Residuals:
    """DB-MTL: every gradient as long as the longest."""
    found = problem.solve("db_mtl") * np.linalg.norm(problem.rows, axis=1)
    yield "lengths", float(found.max() / found.min() - 1)
    # The losses are 1, and their logarithms have the offset 1e-8.
    yield "longest", abs((1 + 1e-8) * float(found.max() / np.linalg.norm(problem.rows, axis=1).max()) - 1)


def cut(key: str, **options: Any) -> Callable[[Problem], Residuals]:
    """PCGrad, and GradVac in its first step: closed form for two tasks."""

    def residuals(problem: Problem) -> Residuals:
        rows, weights = problem.rows, problem.solve(key, **options)
        yield "not finite", float(not np.isfinite(weights).all())
        if problem.num_tasks == 2:
            inner = min(float(rows[0] @ rows[1]), 0.0)
            expected = 1 - inner / np.square(np.linalg.norm(rows, axis=1))
            yield "closed form", float(np.abs(weights / expected - 1).max())

    return residuals


METHODS: dict[str, Callable[[Problem], Residuals]] = {
    "mgda": mgda,
    "nash": fair("nash", 1.0),
    "fairgrad, alpha 0.5": fair("fairgrad", 0.5),
    "fairgrad, alpha 1": fair("fairgrad", 1.0),
    "fairgrad, alpha 2": fair("fairgrad", 2.0),
    "cagrad": cagrad,
    "imtl_g": imtl_g,
    "config": config,
    "aligned": aligned,
    "upgrad": upgrad,
    "dualproj": dualproj,
    "pcd": pcd,
    "db_mtl": lengths,
    "pcgrad": cut("pcgrad"),
    "gradvac": cut("gradvac", beta=0.0),
}


def bar(name: str, dtype: torch.dtype) -> float:
    return (COSINE_BARS if "cosine" in name and "spread" not in name else BARS)[dtype]


def worst(method: str, num_tasks: int, problems: int) -> dict[tuple[str, torch.dtype], tuple[float, Problem]]:
    """The worst of each residual, for each precision of the rows."""
    found: dict[tuple[str, torch.dtype], tuple[float, Problem]] = {}
    for problem in cells(num_tasks, problems):
        for name, value in METHODS[method](problem):
            number = float("inf") if np.isnan(value) else max(float(value), 0.0)
            if number >= found.get((name, problem.dtype), (-1.0,))[0]:
                found[name, problem.dtype] = (number, problem)
    return found
