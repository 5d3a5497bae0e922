"""From the tasks' results to the losses of a step: shares of the mean over the global batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_mtl.checks import bad_argument, listed
from lightning_mtl.engine import halves_to_global, to_global, world_size
from lightning_mtl.module.results import TaskResult


def shares(
    results: Mapping[str, TaskResult], names: Sequence[str], parts: int, absent: Tensor, owner: object
) -> tuple[list[Tensor], Tensor | None]:
    """Per task its share of the mean over the global batch's labels, and who is present; ``None``: everybody.

    Args:
        results: of the tasks that this process has a batch of.
        names: the ``T`` tasks.
        parts: 2 for halves: then first the share of each task's first half, then that of its second.
        absent: the loss of a task that has none here.
        owner: whom an error names.
    """
    # A task without labels keeps its own loss of 0, with a gradient of 0: a head without one would miss its momentum.
    found = [results.get(name) for name in names]
    there = [None if result is None or result.constant else result for result in found]
    losses = [absent if r is None else r.means[part] for part in range(parts) for r in there]
    if torch.is_grad_enabled() and world_size() == 1:
        _check_some_gradient(results, losses, owner)
    if parts > 1:
        return halves_to_global(losses, [0 if r is None else r.counts[part] for part in range(parts) for r in there])
    # Among several processes always: another one may lack a label, or a batch, that this one has.
    losses, present = to_global(losses, [0 if r is None else r.counts[0] for r in there])
    sure = present is not None and present.device.type == "cpu" and bool(present.all())
    return losses, None if sure else present


def _check_some_gradient(results: Mapping[str, TaskResult], losses: Sequence[Tensor], owner: object) -> None:
    constant = [name for name, result in results.items() if result.constant]
    if constant and not any(loss.requires_grad for loss in losses):
        raise bad_argument(
            owner,
            "losses",
            "hold a loss with a gradient of at least one task",
            f"constants for {listed(constant)}",
            "Compute them from the heads' outputs without detach(), no_grad() or rounding",
        )
