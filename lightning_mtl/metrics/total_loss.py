"""The sum of the task losses over a whole evaluation."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class TotalLoss(Metric):
    """The sum over the tasks of each task's mean loss per label (or per weight, where classes have weights).

    Batches may hold different numbers of labels, and each task may come from a loader of its own; a task without any
    label is left out, and without any label at all the total is NaN.

    Args:
        num_tasks: ``T``.
    """

    full_state_update = False
    higher_is_better = False
    sums: Tensor
    counts: Tensor

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(num_tasks), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(num_tasks), dist_reduce_fx="sum")

    def update(self, task: int, loss: Tensor, count: Tensor | int | float) -> None:
        """Add a batch: the mean loss of the ``task``-th task and its count, as ``Task.mean_loss`` gives them."""
        # Not in place: Lightning validates in inference mode, whose tensors refuse that outside.
        here = torch.arange(len(self.sums), device=self.sums.device) == task
        self.sums = self.sums + torch.where(here, loss.detach().float() * count, 0)
        self.counts = self.counts + here * count

    def compute(self) -> Tensor:
        seen = self.counts > 0
        total = torch.where(seen, self.sums / self.counts.where(seen, 1), 0.0).sum()
        return torch.where(seen.any(), total, torch.nan)
