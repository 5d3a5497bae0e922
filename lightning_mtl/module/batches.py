"""The forms of a batch: one input for all tasks, or an input per task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_mtl.checks import bad_argument, listed
from lightning_mtl.tasks import TaskRegistry


@dataclass
class Group:
    """Tasks that read the same samples."""

    inputs: Any
    targets: Mapping[str, Any]
    names: tuple[str, ...]


class BatchForm:
    """Where the input stands in a batch, and how the encoder takes it: the same in training, evaluation and prediction.

    Args:
        input_key: key of the input in a mapping; or several, whose values the encoder takes by these names: the first
            always, the others where a batch holds them.
        strict: whether a batch ``(input, {task: target})`` may hold no target that no task uses.
        owner: whom an error names.

    Raises: ``TypeError`` if the key is neither a string nor several.
    """

    def __init__(self, input_key: str | Sequence[str], strict: bool, owner: str) -> None:
        keys = (input_key,) if isinstance(input_key, str) else input_key
        if not isinstance(keys, Sequence) or not keys or not all(isinstance(key, str) for key in keys):
            raise bad_argument(
                owner, "input_key", "be a string, or several", repr(input_key), "Name the key, or list them", TypeError
            )
        self.keys, self.by_name, self.strict, self.owner = tuple(keys), not isinstance(input_key, str), strict, owner

    def encode(self, encoder: nn.Module, inputs: Any) -> Any:
        """The features of an input."""
        if self.by_name and isinstance(inputs, Mapping):
            return encoder(**{key: inputs[key] for key in self.keys if key in inputs})
        return encoder(inputs)

    def inputs_of(self, batch: Any, tasks: TaskRegistry, dataloader: str | None = None) -> list[Group]:
        """Find the input, or one per task; targets may be missing. What has no known form is itself the input."""
        found = self._split(batch, tasks, dataloader, _used(tasks))
        if found is not None:
            return found
        # The one element that a TensorDataset of inputs gives.
        single = type(batch) in (tuple, list) and len(batch) == 1
        return [Group(batch[0] if single else batch, {}, tasks.names if dataloader is None else (dataloader,))]

    def groups_of(self, batch: Any, tasks: TaskRegistry, dataloader: str | None = None) -> list[Group]:
        """Take a batch with targets apart.

        Args:
            batch: see ``MultiTaskModule``.
            tasks: the registry.
            dataloader: the task whose own loader the batch comes from.

        Raises: ``TypeError`` if the batch has none of the forms; ``ValueError`` if a name is wrong.
        """
        used = _used(tasks)
        if self.strict and dataloader is None and _has_mapping(batch):
            self._check_targets(batch[1], tasks, used)
        found = self._split(batch, tasks, dataloader, used)
        if found is None:
            found = self.inputs_of(batch, tasks, dataloader)
            if not _need_no_target(tasks, found[0].inputs):
                raise self._no_form(batch, tasks)
        return found

    def _split(
        self, batch: Any, tasks: TaskRegistry, dataloader: str | None, used: set[str | None]
    ) -> list[Group] | None:
        if dataloader is not None:
            if not self._has_input(batch):
                return None
            return [self._own(batch, dataloader, tasks)]
        if isinstance(batch, Mapping):
            if self.keys[0] in batch:
                return [Group(self._input_in(batch), batch, tasks.names)]
            there = {name: value for name, value in batch.items() if value is not None}
            if batch and set(batch) <= set(tasks) and all(self._has_input(value) for value in there.values()):
                return [self._own(value, name, tasks) for name, value in there.items()]
        elif _has_mapping(batch):
            inputs, targets = batch
            # A mapping without any target is a part of the input, such as meta data.
            if not self.strict or not targets or not used.isdisjoint(targets):
                return [Group(inputs, targets, tasks.names)]
        return None

    def _has_input(self, value: Any) -> bool:
        """Whether this is a batch of a task's own loader."""
        return _is_own(value) or (isinstance(value, Mapping) and self.keys[0] in value)

    def _input_in(self, batch: Mapping[str, Any]) -> Any:
        return {key: batch[key] for key in self.keys if key in batch} if self.by_name else batch[self.keys[0]]

    def _own(self, batch: Any, name: str, tasks: TaskRegistry) -> Group:
        """The batch of a task's own loader: input and target, the input alone, or a mapping that holds them."""
        if isinstance(batch, Mapping):
            return Group(self._input_in(batch), batch, (name,))
        inputs, *rest = batch
        if not rest:
            return Group(inputs, {}, (name,))
        target = rest[0]
        return Group(inputs, target if isinstance(target, Mapping) else {tasks[name].target or name: target}, (name,))

    def _check_targets(self, targets: Mapping[str, Any], tasks: TaskRegistry, used: set[str | None]) -> None:
        unknown = [key for key in targets if key not in used]
        if unknown:
            raise bad_argument(
                self.owner,
                "batch targets",
                f"belong to the tasks {listed(tasks)}",
                listed(unknown),
                "Correct the name, or pass strict_targets=False",
            )

    def _no_form(self, batch: Any, tasks: TaskRegistry) -> Exception:
        if isinstance(batch, Mapping) and all(value is None or _is_own(value) for value in batch.values()):
            return bad_argument(
                self.owner,
                "batch",
                f"hold the tasks {listed(tasks)} or an input under {self.keys[0]!r}",
                listed(batch),
                "Name each loader after its task, or pass input_key=",
            )
        if isinstance(batch, Mapping):
            for name, value in batch.items():
                if name in tasks and isinstance(value, Mapping) and self.keys[0] not in value:
                    return self._no_input(value, f"batch of '{name}'")
            return self._no_input(batch, "batch")
        return bad_argument(
            self.owner,
            "batch",
            "be (input, {task: target}), a mapping with the input and the targets, or one of these per task",
            _describe(batch),
            "Change the dataset or its collate function",
            TypeError,
        )

    def _no_input(self, batch: Mapping[str, Any], arg: str) -> Exception:
        return bad_argument(
            self.owner, arg, f"hold the input under {self.keys[0]!r}", listed(batch), "Pass input_key= with its key"
        )


def task_of_loader(loaders: Any, batch: Any, index: int, tasks: TaskRegistry) -> str | None:
    """The task whose own loader an evaluation batch comes from; ``None`` if the batch is for all tasks.

    Args:
        loaders: what the Trainer evaluates on; with one loader per task a mapping of task names.
        batch: the batch. A ``CombinedLoader`` that draws from all loaders at once makes mappings of tasks.
        index: number of the loader, where they are run one after another.
        tasks: the registry.
    """
    if not isinstance(loaders, Mapping) or not set(loaders) <= set(tasks):
        return None
    name = str(list(loaders)[index])
    if isinstance(batch, Mapping):
        of_tasks = set(batch) <= set(tasks)
        # One loader under a task's name may still be there for all tasks.
        return None if of_tasks or (len(loaders) == 1 and _used(tasks, but=name) & batch.keys()) else name
    if not _is_own(batch) or (len(loaders) == 1 and isinstance(batch[-1], Mapping)):
        return None
    return name


def _used(tasks: TaskRegistry, but: str | None = None) -> set[str | None]:
    """The keys under which tasks, but one of them, look for target and mask."""
    found = [(task.target or name, task.mask) for name, task in tasks.items() if name != but]
    return {key for keys in found for key in keys}


def _need_no_target(tasks: TaskRegistry, inputs: Any) -> bool:
    try:
        for name, task in tasks.items():
            task.pick({}, inputs, name)
    except ValueError:
        return False
    return True


def _has_mapping(batch: Any) -> bool:
    return isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[1], Mapping)


def _is_own(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) in (1, 2)


def _describe(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"{type(value).__name__} of {', '.join(type(part).__name__ for part in value) or 'nothing'}"
    return type(value).__name__
