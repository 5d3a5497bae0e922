"""What one task gives in one batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_mtl.engine import tensors_of
from lightning_mtl.module.batches import num_samples
from lightning_mtl.tasks import Task


@dataclass
class TaskResult:
    """One task in one batch.

    Args:
        loss: over the whole batch.
        means: the mean loss of each part that is compared: of the whole, or of two halves.
        counts: how many labels each part has; ``None`` where labels cannot be missing.
    """

    loss: Tensor
    means: tuple[Tensor, ...]
    counts: tuple[Tensor | int | None, ...]
    output: Any
    target: Any
    mask: Tensor | None
    roots: list[Tensor]
    leaves: list[Tensor] | None


def halved_loss(
    task: Task, output: Any, target: Any, name: str, mask: Tensor | None
) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor | int, Tensor | int]]:
    """For the even and the odd samples of a batch apart: sum (for its graph), mean losses, label counts."""
    means: list[Tensor] = []
    counts: list[Tensor | int] = []
    for half in (slice(0, None, 2), slice(1, None, 2)):
        parts = tree_map(
            lambda value, half=half: value[half] if isinstance(value, Tensor) else value, (output, target, mask)
        )
        size = num_samples(parts[1])
        if size == 0:
            means.append(0 * means[0])
            counts.append(0)
            continue
        loss, count = task.mean_loss(parts[0], parts[1], name, parts[2])
        means.append(loss)
        counts.append(size if count is None else count)
    return means[0] + means[1], (means[0], means[1]), (counts[0], counts[1])


def trains(task: Task, features: Any) -> bool:
    """Whether the task's loss has anything to train: a head, or what lies behind the features."""
    return bool(tensors_of(features)) or any(parameter.requires_grad for parameter in task.parameters())
