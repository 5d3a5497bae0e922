"""Delta m: by how many percent a multi-task model is worse than one model per task."""

import math
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from typing import SupportsFloat, TypeVar

from lightning_mtl.checks import bad_argument, listed

Value = TypeVar("Value")


def delta_m(
    result: Mapping[str, SupportsFloat] | Sequence[SupportsFloat],
    base: Mapping[str, SupportsFloat] | Sequence[SupportsFloat],
    higher: Mapping[str, bool] | Sequence[bool],
    groups: Mapping[str, Hashable] | Sequence[Hashable] | None = None,
    *,
    auxiliary: Collection[Hashable] = (),
) -> float:
    r"""Average the relative loss against single-task models, in percent: **lower is better**, 0 is a draw.

    :math:`\Delta m = \frac{100}{S} \sum_i (-1)^{s_i} \frac{M_i - B_i}{B_i}`, with :math:`s_i = 1` where a
    higher value of metric ``i`` is better and 0 elsewhere. A ``result`` that is NaN gives NaN: a diverged run
    must not look like a good one.

    Args:
        result: ``M``, the ``S`` metrics of the multi-task model, by name or in order.
        base: ``B``, the same metrics of the single-task models. Each is positive and finite.
        higher: per metric, whether a higher value is better.
        groups: per metric, the task it belongs to. If given, the mean is over the tasks and, within a task,
            over its metrics: a task with many metrics weighs no more than one with a single metric.
        auxiliary: what does not count, because it is only there to help the others: tasks as named in ``groups``, or,
            without ``groups``, metrics. They must be known all the same, but their base may be any number.

    Shapes: ``S`` metrics in each argument -> one number. All arguments are mappings with the same names, or
    all are sequences in the same order.

    Raises: ``TypeError`` or ``ValueError`` if the arguments do not describe the same metrics, if a base value cannot be
    divided by, or if nothing is left that counts.

    Paper: Maninis, Radosavovic, Kokkinos, CVPR 2019, arXiv:1904.08918, with the sign of the tables since
    CAGrad (Liu et al., NeurIPS 2021, arXiv:2110.14048). LibMTL reports the opposite sign. ``groups`` is the
    task-weighted form of Aligned-MTL (Senushkin et al., CVPR 2023, arXiv:2305.19000).

    Example:
        Accuracy falls from 0.80 to 0.76 (5 % worse) and the error falls from 0.50 to 0.45 (10 % better):

        >>> result, base = {"accuracy": 0.76, "error": 0.45}, {"accuracy": 0.80, "error": 0.50}
        >>> round(delta_m(result, base, higher={"accuracy": True, "error": False}), 6)
        -2.5
        >>> round(delta_m(result, base, higher={"accuracy": True, "error": False}, auxiliary={"error"}), 6)
        5.0
    """
    results = _by_key(result, "result")
    bases = _by_key(base, "base")
    highers = _by_key(higher, "higher")
    _check_same_metrics(bases, results, "base")
    _check_same_metrics(highers, results, "higher")
    # Without groups each metric is a task of its own.
    tasks = {key: key for key in results} if groups is None else _by_key(groups, "groups")
    _check_same_metrics(tasks, results, "groups")
    _check_auxiliary(auxiliary, set(tasks.values()))
    by_task: dict[Hashable, list[float]] = {}
    for key, value in results.items():
        if tasks[key] not in auxiliary:
            percent = _percent_worse(float(value), float(bases[key]), _as_bool(highers[key], key), key)
            by_task.setdefault(tasks[key], []).append(percent)
    return _mean(map(_mean, by_task.values()))


def _by_key(values: Mapping[str, Value] | Sequence[Value], name: str) -> dict[Hashable, Value]:
    """Metrics by name, or by their place in a sequence."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        expected = "be a mapping of metric names or a sequence"
        raise bad_argument("delta_m", name, expected, repr(values), "Pass one entry per metric", TypeError)
    pairs: Iterable[tuple[Hashable, Value]] = values.items() if isinstance(values, Mapping) else enumerate(values)
    keyed = dict(pairs)
    if not keyed:
        raise bad_argument("delta_m", name, "have at least one metric", values, "Pass one entry per metric")
    return keyed


def _check_same_metrics(found: Iterable[Hashable], expected: Iterable[Hashable], name: str) -> None:
    if set(found) != set(expected):
        raise bad_argument(
            "delta_m",
            name,
            f"have the metrics of `result` ({listed(expected)})",
            listed(found),
            "Give every argument the same names, or the same number of values in the same order",
        )


def _check_auxiliary(found: Collection[Hashable], tasks: set[Hashable]) -> None:
    # Of a single name every letter would be taken for one.
    several = isinstance(found, Collection) and not isinstance(found, str)
    known = list(tasks)  # a name that cannot be hashed is merely unknown
    if not several or any(name not in known for name in found) or all(task in found for task in known):
        raise bad_argument(
            "delta_m",
            "auxiliary",
            f"be a collection of some, and not all, of {listed(known)}",
            listed(found) if several else repr(found),
            "Correct the names; at least one must be left that counts",
            ValueError if several or isinstance(found, str) else TypeError,
        )


def _as_bool(value: bool, key: Hashable) -> bool:
    # A list of the metrics' names is a likely mistake, and every name would count as True.
    if isinstance(value, str):
        raise bad_argument(
            "delta_m",
            f"higher[{key!r}]",
            "be True or False",
            repr(value),
            "Say per metric whether a higher value is better",
            TypeError,
        )
    return bool(value)


def _percent_worse(result: float, base: float, higher: bool, key: Hashable) -> float:
    if not (math.isfinite(base) and base > 0):
        raise bad_argument(
            "delta_m",
            f"base[{key!r}]",
            "be positive and finite",
            base,
            "A relative change needs such a base: use another metric, or leave this one out",
        )
    return 100 * (base - result if higher else result - base) / base


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return math.fsum(numbers) / len(numbers)
