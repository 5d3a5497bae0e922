"""Dynamic weight average: more weight for the tasks whose loss falls slowly."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_mtl.balancers.base import ALL, LossBalancer, Tasks
from lightning_mtl.checks import check_integer, check_number

# Stands for a ratio whose denominator is 0: large, yet a sum of a few of them is finite.
_LARGE = 1e100


class DWA(LossBalancer):
    r"""Weigh the losses by how slowly they fall: :math:`w = T\, \mathrm{softmax}(r / \tau)`.

    :math:`r_t` is the mean loss of the last epoch over that of the epoch before it.

    Args:
        num_tasks: ``T``.
        temperature: :math:`\tau`, > 0; the larger, the more equal the weights.
        window: compare means over so many backwards of a task instead of epochs (25 in several codes).

    Shapes: losses ``[T]`` -> objective ``[]``.
    State: ``last_means``, ``earlier_means``, and of the current epoch ``loss_sums`` and ``loss_counts``, all
    ``[T]``: a run that is resumed within an epoch goes on as if it had not stopped.
    Update: sum scale, the weights are positive and sum to ``T`` (to the number of present tasks); heads are weighted.
    In the first two epochs they are 1. A task without two means yet counts as one whose loss does not change. One whose
    loss is exactly 0 is absent: it may be switched off, and what comes back from 0 would outweigh all others.
    A plain loop has to call ``end_epoch()``, unless it sets ``window``.
    Raises: ``ValueError`` if an argument is out of range.
    Paper: Liu, Johns, Davison, CVPR 2019, arXiv:1803.10704, equation 7 (:math:`\tau = 2`).

    Example:
        >>> import torch
        >>> balancer = DWA(2, window=1)
        >>> for losses in ([1.0, 1.0], [1.0, 0.2]):
        ...     balancer.advance(torch.tensor(losses))
        >>> balancer.weights(torch.ones(2))  # the second task falls faster
        tensor([1.1974, 0.8026])
    """

    last_means: Tensor
    earlier_means: Tensor
    loss_sums: Tensor
    loss_counts: Tensor

    def __init__(self, num_tasks: int, temperature: float = 2.0, window: int | None = None) -> None:
        super().__init__(num_tasks)
        check_number(temperature, "temperature", self, low=0.0, exclusive=True)
        if window is not None:
            check_integer(window, "window", self, low=1)
        self.temperature, self.window = temperature, window
        for name, start in (
            ("last_means", float("nan")),
            ("earlier_means", float("nan")),
            ("loss_sums", 0.0),
            ("loss_counts", 0.0),
        ):
            self.register_buffer(name, torch.full((num_tasks,), start, dtype=torch.float64))

    def objective(self, losses: Tensor, tasks: Tasks = ALL) -> Tensor:
        ratios = self.last_means[tasks] / self.earlier_means[tasks]
        ratios = ratios.nan_to_num(1.0, posinf=_LARGE, neginf=-_LARGE).clamp(-_LARGE, _LARGE)
        counts = losses != 0
        scores = (ratios / self.temperature).masked_fill(~counts, -torch.inf)
        weights = counts.sum() * torch.softmax(scores, 0).where(counts, 0)
        return losses @ weights.to(losses.dtype)

    def observe(self, losses: Tensor, tasks: Tasks = ALL) -> None:
        self.loss_sums[tasks] += losses.double()
        self.loss_counts[tasks] += losses != 0
        if self.window is not None:
            self._close(self.loss_counts == self.window)

    def end_epoch(self) -> None:
        if self.window is None:
            self._close(self.loss_counts > 0)

    def _close(self, which: Tensor) -> None:
        """End the epoch (or window) of some tasks; one that was never present keeps its means."""
        means = self.loss_sums / self.loss_counts
        self.earlier_means.copy_(torch.where(which, self.last_means, self.earlier_means))
        self.last_means.copy_(torch.where(which, means, self.last_means))
        for buffer in (self.loss_sums, self.loss_counts):
            buffer.masked_fill_(which, 0)
