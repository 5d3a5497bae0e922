"""What every balancer is: numbers in, numbers out, and what it remembers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from lightning_mtl.balancers.base.state import State
from lightning_mtl.checks import (
    bad_argument,
    check_num_tasks,
    listed,
)

# What a method indexes its [T] state with: the present tasks. A slice when all are present (no copy, no sync).
Tasks = slice | Tensor
ALL: Tasks = slice(None)


def in_numpy(tasks: Tasks) -> Any:
    """The same index, for arrays."""
    return tasks if isinstance(tasks, slice) else tasks.numpy()


class Balancer(State):
    """A method that turns the losses or gradients of ``T`` tasks into ``T`` weights.

    It never sees a module, autograd, the trainer or a process group: what it is given is already reduced over
    ranks. State is made in ``__init__`` in its final size, as parameters and by ``register_buffer``; see
    :class:`State`.

    Args:
        num_tasks: ``T``.

    Raises: ``ValueError`` if ``num_tasks`` is not an integer >= 1.
    """

    #: Levels at which the method is defined.
    levels: ClassVar[tuple[str, ...]] = ("parameters", "features")
    #: What a memory per parameter is of: keys in their order, each with its width. The engine keeps it.
    followed: Mapping[object, int] | None = None

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        check_num_tasks(num_tasks, self)
        self.num_tasks = num_tasks
        self.names: tuple[str, ...] | None = None
        self._settings: dict[str, tuple[object, float, float, float]] = {}
        self._unbound: set[str] = set()
        self._placed: set[str] = set()
        self._main: tuple[str, ...] = ()

    def bind(self, names: Sequence[str]) -> None:
        """Learn the task names, in the order of every ``[T]`` tensor.

        Raises: ``ValueError`` if there are not ``num_tasks`` of them.
        """
        if len(names) != self.num_tasks:
            raise bad_argument(
                self,
                "num_tasks",
                f"equal the number of tasks ({listed(names)})",
                self.num_tasks,
                f"Build it with num_tasks={len(names)}, or pass the balancer's name and let the module build it",
            )
        self.names, self._main = tuple(names), ()
        self._check_places()
        for name in self._settings:
            getattr(self, name).copy_(self._setting_values(name))

    def bind_roles(self, main: Sequence[str]) -> None:
        """Learn which of the bound names are main tasks; none or all of them say nothing.

        A method that puts one task before the others then takes the first main task, unless it was told which.

        Raises: ``ValueError`` if a name is unknown, or if the method was told to put an auxiliary task first.
        """
        unknown = [name for name in main if name not in (self.names or ())]
        if unknown:
            raise bad_argument(
                self, "main", f"name tasks among {listed(self.names or ())}", listed(unknown), "Correct the name"
            )
        self._main = tuple(main)
        self._check_places()

    def _check_places(self) -> None:
        """Raises: ``ValueError`` if an argument that names one task does not fit what is known of the tasks."""
        for arg in sorted(self._placed):
            self._place(getattr(self, arg), arg)

    def _setting(
        self, name: str, given: object, default: float, low: float = -math.inf, high: float = math.inf
    ) -> None:
        """An argument with one number per task, kept as ``name`` ``[T]``: a setting, not state."""
        self._settings[name] = (dict(given) if isinstance(given, Mapping) else given), default, low, high
        self.register_buffer(name, self._setting_values(name), persistent=False)

    def _or_equal_shares(self, name: str, tasks: Tasks) -> np.ndarray:
        """A setting of the present tasks, not to be written to; equal shares where not given. Shapes: ``[P]``."""
        values: np.ndarray = getattr(self, name).numpy()[in_numpy(tasks)]
        return values / len(values) if self._settings[name][0] is None else values

    def _setting_values(self, name: str) -> Tensor:
        given, default, low, high = self._settings[name]
        values = torch.tensor(self._by_task(given, default, name, float), dtype=torch.float64)
        if not bool((torch.isfinite(values) & (values >= low) & (values <= high)).all()):
            bound = "be finite" if math.isinf(low) else f"be finite and >= {low:g}"
            bound += "" if math.isinf(high) else f" and <= {high:g}"
            raise bad_argument(self, name, bound, values.tolist(), "Change the entry that is not")
        return values

    def combine(self, rows: Tensor, losses: Tensor, present: Tensor | None = None) -> Tensor:
        """The update of the shared parameters, whatever the family of the method; counts as one step.

        Shapes: rows ``[T, N]``, losses ``[T]``, present bool ``[T]`` -> ``[N]`` in the dtype of ``rows``.
        """
        raise NotImplementedError

    def _check_bound(self) -> None:
        """Raises: ``ValueError`` if an argument names tasks, and the names are not known."""
        if self.names is not None:
            return
        named = self._unbound | {name for name, (given, *_) in self._settings.items() if isinstance(given, dict)}
        if named:
            raise bad_argument(
                self,
                min(named),
                "be numbers in task order where the task names are not known",
                "names",
                "Call bind(names) first, or pass numbers",
            )

    def check_level(self, level: str) -> None:
        """Raises: ``ValueError`` if the method is not defined at this level."""
        if level not in self.levels:
            raise bad_argument(
                self,
                "level",
                f"be {' or '.join(map(repr, self.levels))} for this method",
                repr(level),
                "Change it, or choose another balancer",
            )

    def _place(self, task: int | str | None, arg: str) -> int:
        """Where a task stands in the order; 0 as long as its name cannot be looked up. ``None``: the first main task.

        The argument must be an attribute of the same name, which is looked at again when names and roles are bound.
        """
        self._placed.add(arg)
        if task is None:
            return (self.names or ()).index(self._main[0]) if self._main else 0
        known = self.names if isinstance(task, str) else range(self.num_tasks)
        if isinstance(task, str) and self.names is None:
            self._unbound.add(arg)
            return 0
        if isinstance(task, bool) or known is None or task not in known:
            raise bad_argument(
                self,
                arg,
                f"be a task's name or a place in their order, 0 to {self.num_tasks - 1}",
                repr(task),
                f"The tasks are {listed(self.names or ())}",
            )
        place = task if isinstance(task, int) else list(known).index(task)
        if self._main and self.names is not None and self.names[place] not in self._main:
            raise bad_argument(
                self,
                arg,
                f"be a main task ({listed(self._main)})",
                f"{self.names[place]!r}, an auxiliary one",
                "Leave it out, or change the roles",
            )
        return place

    def end_epoch(self) -> None:
        """A training epoch has ended (for methods that compare epochs). Modules call it; plain loops call it too."""

    def _by_task(self, values: object, default: Any, arg: str, convert: Callable[[Any], Any]) -> list[Any]:
        """``values`` per task, in task order: from None, one value, a sequence, or a mapping of the bound names."""
        if values is None:
            return [default] * self.num_tasks
        if isinstance(values, dict):
            names = self.names or ()
            unknown = [name for name in values if name not in names]
            if unknown and self.names is not None:
                raise bad_argument(
                    self,
                    arg,
                    f"name tasks among {listed(names)}",
                    listed(unknown),
                    "Correct the name; tasks left out keep the default",
                )
            return [self._entry(values.get(name, default), arg, convert) for name in names] or [
                default
            ] * self.num_tasks
        if isinstance(values, Tensor):
            values = values.tolist()
        if isinstance(values, str) or not isinstance(values, Sequence):
            return [self._entry(values, arg, convert)] * self.num_tasks
        if len(values) != self.num_tasks:
            raise bad_argument(
                self,
                arg,
                f"have one entry per task ({self.num_tasks})",
                f"{len(values)} entries",
                "Give one entry per task, in task order, or a mapping of task names",
            )
        return [self._entry(value, arg, convert) for value in values]

    def _entry(self, value: object, arg: str, convert: Callable[[Any], Any]) -> Any:
        try:
            return convert(value)
        except (TypeError, ValueError) as error:
            raise bad_argument(
                self,
                arg,
                "hold one number per task",
                repr(value),
                "Give a number, a sequence in task order, or a mapping of task names",
                type(error),
            ) from error
