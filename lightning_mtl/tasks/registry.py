"""The tasks of a model, by name and in a fixed order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from lightning_mtl.checks import bad_argument, listed
from lightning_mtl.tasks.names import key_of, name_of, usable
from lightning_mtl.tasks.task import Task


class TaskRegistry(nn.Module):
    """An ordered mapping of names to tasks; the order is that of every ``[T]`` tensor.

    Args:
        tasks: name -> task.

    Any non-empty string is a name, and stands as it is in batches, logs and errors. In the ``state_dict`` too, but for
    what torch cannot hold there: names with a dot, and those of a module's attributes such as ``type``, have a key that
    begins with a percent sign.

    Raises: ``ValueError`` if a name is empty, stands twice or is "loss" (or begins with "loss/"), which would make two
    meanings of a log key, as would a task "a" with a metric "b/c" beside a task "a/b" with a metric "c"; and if a task
    or a whole head stands there twice. Heads may have a layer, or a matrix of the encoder, in common. ``TypeError`` if
    a value is not a task.

    Example:
        >>> from torch import nn
        >>> from lightning_mtl.tasks import RegressionTask
        >>> tasks = TaskRegistry({"depth": RegressionTask(nn.Linear(8, 1))})
        >>> tasks.add("albedo", RegressionTask(nn.Linear(8, 3)))
        >>> list(tasks)
        ['depth', 'albedo']
    """

    def __init__(self, tasks: Mapping[str, Task] | None = None) -> None:
        super().__init__()
        self._tasks = nn.ModuleDict()
        if tasks is not None and not isinstance(tasks, Mapping | TaskRegistry):
            raise bad_argument(
                self,
                "tasks",
                "be a mapping of names to tasks",
                type(tasks).__name__,
                "Pass a dict",
                TypeError,
            )
        for name, task in (tasks or {}).items():
            self.add(name, task)

    def add(self, name: str, task: Task) -> None:
        """Append a task.

        Raises: as the constructor.
        """
        # Below "val/loss/" stand the losses of the tasks.
        if not usable(name) or name in self or f"{name}/".startswith("loss/"):
            raise bad_argument(
                self,
                "name",
                "be a new, non-empty string that is neither 'loss' nor begins with 'loss/', without 'dataloader_idx_'",
                repr(name),
                f"Rename the task (known: {listed(self)})",
            )
        if not isinstance(task, Task):
            raise bad_argument(
                self,
                f"tasks['{name}']",
                "be a Task",
                type(task).__name__,
                "Wrap the head: Task(head, loss)",
                TypeError,
            )
        for other, known in self.items():
            both = _common_keys((name, task), (other, known))
            if both:
                raise bad_argument(
                    self,
                    "name",
                    "make log keys of its own with the task's metrics",
                    f"{name!r}, of which {listed(both)} is also a metric of {other!r}",
                    "Rename the task or the metric",
                )
            same = _contains(task.head, known.head) or _contains(known.head, task.head)
            meant = getattr(task, "shares_head", False) and getattr(known, "shares_head", False)
            if task is known or (same and not meant):
                raise bad_argument(
                    self,
                    f"tasks['{name}']",
                    "have a head of its own",
                    f"that of {other!r}",
                    "Build one head per task; to share one, put it into the encoder or use MultiLabelTask.per_label",
                )
        self._tasks[key_of(name)] = task

    def remove(self, name: str) -> Task:
        """Take a task out and return it. Raises: ``ValueError`` if there is none of that name."""
        task = self[name]
        del self._tasks[key_of(name)]
        return task

    def freeze(self, name: str) -> None:
        """Stop training a task's head; its loss still trains what is shared.

        Raises: ``ValueError`` if there is no task of that name.
        """
        self[name].head.requires_grad_(False)

    def unfreeze(self, name: str) -> None:
        """Train a task's head again. Raises: ``ValueError`` if there is no task of that name."""
        self[name].head.requires_grad_(True)

    def items(self) -> Iterator[tuple[str, Task]]:
        """Names and tasks, in order."""
        return ((name_of(key), task) for key, task in self._tasks.items())  # type: ignore[misc]

    @property
    def tasks(self) -> list[Task]:
        """The tasks alone, in order."""
        return [task for _, task in self.items()]

    @property
    def names(self) -> tuple[str, ...]:
        """The names, in order."""
        return tuple(self)

    @property
    def main(self) -> tuple[str, ...]:
        """The names of the main tasks, in order."""
        return tuple(name for name, task in self.items() if task.role == "main")

    def __getitem__(self, name: str) -> Task:
        if name not in self:
            raise bad_argument(self, "name", f"be one of {listed(self)}", repr(name), "Correct the name")
        return self._tasks[key_of(name)]  # type: ignore[return-value]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and key_of(name) in self._tasks

    def __iter__(self) -> Iterator[str]:
        return map(name_of, self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)


def _contains(head: nn.Module, other: nn.Module) -> bool:
    """Whether one is the other or has it inside. To have a layer or a tied matrix in common is another matter."""
    trained = any(True for _ in other.parameters())
    return trained and any(module is other for module in head.modules())


def _common_keys(*named: tuple[str, Task]) -> list[str]:
    """The log keys that are metrics of both tasks: "a/b/c" of the task "a" and of the task "a/b"."""
    (one, _), (other, _) = named
    if not (one.startswith(f"{other}/") or other.startswith(f"{one}/")):
        return []
    first, second = ({f"{name}/{metric}" for metric in task.metric_names} for name, task in named)
    return sorted(first & second)
