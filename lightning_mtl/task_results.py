"""What one task gives in one batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_mtl.batches import num_samples
from lightning_mtl.checks import bad_argument
from lightning_mtl.engine import tensors_of
from lightning_mtl.tasks import Task


@dataclass
class TaskResult:
    """One task in one batch; its loss is the sum of its shares, one or, for a balancer that compares them, two."""

    loss: Tensor
    shares: tuple[Tensor, ...]
    count: Tensor | int | None
    output: Any
    target: Any
    mask: Tensor | None
    roots: list[Tensor]
    leaves: list[Tensor] | None


def halved_loss(
    task: Task, output: Any, target: Any, name: str, mask: Tensor | None
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor | int | None]:
    """The mean loss of a batch, as the sum of what its even and its odd samples contribute to it."""
    size = num_samples(target)
    if size < 2:
        raise bad_argument(
            task, f"target of '{name}'", "have at least two samples to halve", size, "Use larger batches"
        )
    found = []
    for half in (slice(0, None, 2), slice(1, None, 2)):
        parts = tree_map(
            lambda value, half=half: value[half] if isinstance(value, Tensor) else value, (output, target, mask)
        )
        loss, count = task.mean_loss(parts[0], parts[1], name, parts[2])
        found.append((loss, num_samples(parts[1]) if count is None else count, count))
    total: Any = found[0][1] + found[1][1]
    divisor = total.clamp(min=1) if isinstance(total, Tensor) else max(total, 1)
    shares = [loss * (count / divisor) for loss, count, _ in found]
    return shares[0] + shares[1], (shares[0], shares[1]), None if found[0][2] is None else total


def trains(task: Task, features: Any) -> bool:
    """Whether the task's loss has anything to train: a head, or what lies behind the features."""
    return bool(tensors_of(features)) or any(parameter.requires_grad for parameter in task.parameters())
