"""The forms of a batch: one input for all tasks, or an input per task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_mtl.checks import bad_argument, listed
from lightning_mtl.tasks import TaskRegistry


@dataclass
class Group:
    """Tasks that read the same samples."""

    inputs: Any
    targets: Mapping[str, Any]
    names: tuple[str, ...]


def groups_of(
    batch: Any, tasks: TaskRegistry, input_key: str, strict: bool, owner: object, dataloader: str | None = None
) -> list[Group]:
    """Take a batch apart.

    Args:
        batch: see ``MultiTaskModule``.
        tasks: the registry.
        input_key: where the input stands in a flat mapping.
        strict: refuse targets that no task uses in ``(input, {task: target})``.
        owner: whom an error names.
        dataloader: the task whose own loader the batch ``(input, target)`` comes from.

    Raises: ``TypeError`` if the batch has none of the forms; ``ValueError`` if a name is wrong.
    """
    if dataloader is not None and dataloader in tasks:
        return [_own(batch, dataloader, tasks, owner)]
    if isinstance(batch, Mapping) and input_key not in batch and all(_is_pair(value) for value in batch.values()):
        unknown = [name for name in batch if name not in tasks]
        if unknown or not batch:
            raise bad_argument(
                owner,
                "batch",
                f"hold the tasks {listed(tasks)} or an input under {input_key!r}",
                listed(batch),
                "Name each loader after its task, or pass input_key=",
            )
        return [_own(pair, name, tasks, owner) for name, pair in batch.items() if pair is not None]
    if isinstance(batch, Mapping):
        if input_key not in batch:
            raise bad_argument(
                owner, "batch", f"hold the input under {input_key!r}", listed(batch), "Pass input_key= with its key"
            )
        return [Group(batch[input_key], batch, tasks.names)]
    if isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[1], Mapping):
        inputs, targets = batch
        if strict:
            used = {task.target or name for name, task in tasks.items()} | {task.mask for _, task in tasks.items()}
            unknown = [key for key in targets if key not in used]
            if unknown:
                raise bad_argument(
                    owner,
                    "batch targets",
                    f"belong to the tasks {listed(tasks)}",
                    listed(unknown),
                    "Correct the name, or pass strict_targets=False",
                )
        return [Group(inputs, targets, tasks.names)]
    raise bad_argument(
        owner,
        "batch",
        "be (input, {task: target}), a mapping with the input and the targets, or {task: (input, target)}",
        _describe(batch),
        "Change the dataset or its collate function",
        TypeError,
    )


def task_of_loader(loaders: Any, batch: Any, index: int, tasks: TaskRegistry) -> str | None:
    """The task whose own loader an evaluation batch comes from; ``None`` if the batch is for all tasks.

    Args:
        loaders: what the Trainer evaluates on; with one loader per task a mapping of task names.
        batch: the batch. A ``CombinedLoader`` that draws from all loaders at once makes mappings of tasks.
        index: number of the loader, where they are run one after another.
        tasks: the registry.
    """
    if not isinstance(loaders, Mapping) or not set(loaders) <= set(tasks) or not _is_pair(batch):
        return None
    if len(loaders) == 1 and isinstance(batch[1], Mapping):
        return None
    return str(list(loaders)[index])


def num_samples(target: Any) -> int:
    """How many samples a target, in any nested structure, is for."""
    return next((len(leaf) for leaf in tree_leaves(target) if isinstance(leaf, Tensor) and leaf.ndim), 1)


def _own(pair: Any, name: str, tasks: TaskRegistry, owner: object) -> Group:
    """The batch of a task's own loader."""
    if not _is_pair(pair) or pair is None:
        raise bad_argument(
            owner, f"batch of '{name}'", "be (input, target)", _describe(pair), "Change its dataset", TypeError
        )
    inputs, target = pair
    targets = target if isinstance(target, Mapping) else {tasks[name].target or name: target}
    return Group(inputs, targets, (name,))


def _is_pair(value: Any) -> bool:
    return value is None or (isinstance(value, tuple | list) and len(value) == 2)


def _describe(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"{type(value).__name__} of {', '.join(type(part).__name__ for part in value) or 'nothing'}"
    return type(value).__name__
