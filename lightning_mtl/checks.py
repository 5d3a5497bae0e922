"""Every check of the package, and the one form of its errors."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn


def bad_argument(
    who: object, arg: str, expected: str, got: object, cure: str, kind: type[Exception] = ValueError
) -> Exception:
    """Build the error that the caller raises.

    Its text is ``Who: `arg` must <expected>, got <value>. <Cure>.``

    Args:
        who: the object whose argument is wrong (its class name is printed) or a name.
        arg: the argument as the user wrote it.
        expected: what follows "must".
        got: what came.
        cure: one sentence that says what to do, without its full stop.
        kind: class of the error.
    """
    name = who if isinstance(who, str) else type(who).__name__
    return kind(f"{name}: `{arg}` must {expected}, got {got}. {cure}.")


def shape(tensor: object) -> str:
    """A tensor's shape as ``[2, 3]``; the type's name for anything else."""
    return str(list(tensor.shape)) if isinstance(tensor, Tensor) else type(tensor).__name__


def listed(names: Iterable[object]) -> str:
    """Names for a message, sorted as given: ``'a', 'b'``; "none" if empty."""
    return ", ".join(repr(name) for name in names) or "none"


def carried(name: object) -> bool:
    """Whether logs and batches can carry the name: any non-empty string."""
    return isinstance(name, str) and bool(name)


def check_num_tasks(num_tasks: int, owner: object) -> None:
    """``T`` must be an integer >= 1."""
    if not isinstance(num_tasks, int) or isinstance(num_tasks, bool) or num_tasks < 1:
        raise bad_argument(owner, "num_tasks", "be an integer >= 1", repr(num_tasks), "Pass the number of tasks")


def check_losses(losses: Tensor, num_tasks: int, owner: object) -> None:
    """One number per task."""
    if not isinstance(losses, Tensor) or losses.shape != (num_tasks,):
        raise bad_argument(
            owner,
            "losses",
            f"have shape [T] = [{num_tasks}]",
            shape(losses),
            "Stack one scalar loss per task",
        )


def check_gram(gram: Tensor, num_tasks: int, owner: object, *, grouped: bool = False) -> None:
    """Inner products, ``[T, T]``, or ``[K, T, T]`` in groups."""
    fine = isinstance(gram, Tensor) and gram.shape[-2:] == (num_tasks, num_tasks) and gram.ndim == 2 + grouped
    if not fine:
        raise bad_argument(
            owner,
            "gram",
            f"have shape [T, T] = [{num_tasks}, {num_tasks}]",
            shape(gram),
            "Pass the inner products of the task gradients (rows @ rows.T), not the rows themselves",
        )


def check_rows(rows: Tensor, num_tasks: int, owner: object) -> None:
    """One row per task, ``[T, N]``."""
    if not isinstance(rows, Tensor) or rows.ndim != 2 or len(rows) != num_tasks:
        raise bad_argument(
            owner,
            "rows",
            f"have shape [T, N] with T = {num_tasks}",
            shape(rows),
            "Flatten and stack one gradient per task",
        )


def check_present(present: Tensor, num_tasks: int, owner: object) -> None:
    """One bool per task."""
    if present.shape != (num_tasks,) or present.dtype != torch.bool:
        raise bad_argument(
            owner,
            "present",
            f"be a bool tensor of shape [T] = [{num_tasks}]",
            f"{present.dtype} {shape(present)}",
            "Pass True for each task that has a label in the batch",
        )


def check_choice(value: object, choices: Sequence[str], arg: str, owner: object) -> None:
    """One of a few strings."""
    if value not in choices:
        raise bad_argument(owner, arg, f"be one of {listed(choices)}", repr(value), "Choose one of these")


def check_number(
    value: object,
    arg: str,
    owner: object,
    *,
    low: float | None = None,
    high: float | None = None,
    exclusive: bool = False,
) -> None:
    """A finite real number, at least (or, if ``exclusive``, above) ``low`` and at most ``high``."""
    fine = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if fine and low is not None:
        fine = value > low if exclusive else value >= low  # type: ignore[operator]
    if fine and high is not None:
        fine = value <= high  # type: ignore[operator]
    if not fine:
        bound = "" if low is None else f" {'>' if exclusive else '>='} {low:g}"
        bound += "" if high is None else f" and <= {high:g}"
        raise bad_argument(owner, arg, f"be a finite number{bound}", repr(value), "Choose another value")


def weights_of(
    values: Iterable[float] | Tensor, num: int, arg: str, owner: object, *, some: bool = False
) -> tuple[float, ...]:
    """``num`` finite numbers >= 0, and if asked not all of them 0, as a tuple."""
    numbers = values.tolist() if isinstance(values, Tensor) else values
    found = tuple(numbers) if isinstance(numbers, Iterable) and not isinstance(numbers, str) else ()
    fine = all(isinstance(x, int | float) and not isinstance(x, bool) and 0 <= x < math.inf for x in found)
    if not fine or len(found) != num or (some and not any(found)):
        raise bad_argument(
            owner,
            arg,
            f"be {num} finite numbers >= 0" + (", not all of them 0" if some else ""),
            repr(values),
            "Give one number for each, in their order",
        )
    return tuple(float(x) for x in found)


def check_integer(value: object, arg: str, owner: object, *, low: int) -> None:
    """An integer, at least ``low``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise bad_argument(owner, arg, f"be an integer >= {low}", repr(value), "Choose another value")


def check_tensor(value: object, arg: str, owner: object) -> None:
    """A tensor."""
    if not isinstance(value, Tensor):
        raise bad_argument(
            owner, arg, "be a tensor", type(value).__name__, "Change the head, the dataset or its collate", TypeError
        )


def check_head(head: object, owner: object) -> None:
    """A head must be a module."""
    if not isinstance(head, nn.Module):
        raise bad_argument(
            owner, "head", "be an nn.Module", type(head).__name__, "For no head pass torch.nn.Identity()", TypeError
        )


def check_task_loss(loss: object, name: str, owner: object) -> None:
    """A task's loss must be a real scalar."""
    if not isinstance(loss, Tensor):
        raise bad_argument(
            owner,
            f"losses['{name}']",
            "be a scalar tensor",
            type(loss).__name__,
            "Return one loss; add up the parts of a criterion, or make them tasks of their own",
            TypeError,
        )
    if loss.ndim != 0:
        raise bad_argument(
            owner,
            f"losses['{name}']",
            "be a scalar (shape [])",
            shape(loss),
            "Reduce it with .mean() or .sum()",
        )
    if loss.requires_grad and not loss.is_floating_point():
        raise bad_argument(
            owner,
            f"losses['{name}']",
            "be a real scalar",
            str(loss.dtype),
            "Take its absolute value or its real part",
        )


def warn_once(owner: object, text: str, memory: object | None = None) -> None:
    """Warn, unless this owner, or what remembers for it where it is a name, has said the same before."""
    said = vars(owner if memory is None else memory).setdefault("_said", set())
    if text not in said:
        said.add(text)
        warnings.warn(f"{owner if isinstance(owner, str) else type(owner).__name__}: {text}", stacklevel=3)
