"""The tasks of a model, by name and in a fixed order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from lightning_mtl.checks import bad_argument, listed
from lightning_mtl.tasks.task import Task, usable_name


class TaskRegistry(nn.Module):
    """An ordered mapping of names to tasks; the order is that of every ``[T]`` tensor.

    Args:
        tasks: name -> task.

    Raises: ``ValueError`` if a name cannot be carried by a ModuleDict or a logger, stands twice, or if two tasks
    share one head by mistake; ``TypeError`` if a value is not a task.

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
        # "loss" would make two meanings of the log key "val/loss/...".
        if not usable_name(name, self._tasks) or name == "loss":
            raise bad_argument(
                self,
                "name",
                "be a new, non-empty string without dot, slash or space, not 'loss' and no attribute of a module",
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
            common = {id(p) for p in known.parameters()} & {id(p) for p in task.parameters()}
            meant = getattr(task, "shares_head", False) and getattr(known, "shares_head", False)
            if task is known or (common and not meant):
                raise bad_argument(
                    self,
                    f"tasks['{name}']",
                    "have a head of its own",
                    f"that of {other!r}",
                    "Build one head per task; to share one, put it into the encoder or use MultiLabelTask.per_label",
                )
        self._tasks[name] = task

    def remove(self, name: str) -> Task:
        """Take a task out and return it. Raises: ``ValueError`` if there is none of that name."""
        task = self[name]
        del self._tasks[name]
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
        return iter(self._tasks.items())  # type: ignore[arg-type]

    @property
    def tasks(self) -> list[Task]:
        """The tasks alone, in order."""
        return [task for _, task in self.items()]

    @property
    def names(self) -> tuple[str, ...]:
        """The names, in order."""
        return tuple(self._tasks)

    @property
    def main(self) -> tuple[str, ...]:
        """The names of the main tasks, in order."""
        return tuple(name for name, task in self.items() if task.role == "main")

    def __getitem__(self, name: str) -> Task:
        if name not in self._tasks:
            raise bad_argument(self, "name", f"be one of {listed(self)}", repr(name), "Correct the name")
        return self._tasks[name]  # type: ignore[return-value]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._tasks

    def __iter__(self) -> Iterator[str]:
        return iter(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)
