"""The two records that cross layers: what a training step offers, and what a balancer made of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Step:
    """One training step as the engine sees it; tasks stand in registry order everywhere.

    Args:
        losses: ``T`` scalars with a graph.
        shared: the tensors whose rows are taken, reached through ``roots`` (the encoder's parameters).
        shared_heads: parameters of the rows too, but not reached through ``roots``: of several heads, or between
            features of which one is computed from another.
        private: parameters of one task only (or of no task in this step).
        roots: per task, where the heads begin: features with a graph into the encoder. ``None``: no cut is
            known and every row is taken from the loss itself.
        leaves: per task, what its head read in place of ``roots``; ``None`` if heads read ``roots`` themselves.
        present: bool ``[T]``, which tasks have a label somewhere in the global batch; ``None`` means all.
        last_layer: the subset of ``shared`` at which a balancer with ``gram_at="last_layer"`` takes its gram.
        find_layer: looks for it in the graph of a step, which may have left out a layer that others had.
        tables: the ``id`` of each parameter that waits for a sparse gradient, under several processes.
        layers: per tensor of ``shared`` and ``shared_heads`` the number of its layer, for balancers that work per
            layer.

    For a balancer with ``halves``, ``losses``, ``roots`` and ``leaves`` have ``2T`` entries, the first halves before
    the second; each loss is its half's share of the task's loss.
    """

    losses: Sequence[Tensor]
    shared: list[Tensor]
    shared_heads: list[Tensor]
    private: list[Tensor]
    roots: Sequence[Sequence[Tensor]] | None
    leaves: Sequence[Sequence[Tensor]] | None = None
    present: Tensor | None = None
    last_layer: list[Tensor] | None = None
    layers: list[int] | None = None
    tables: Collection[int] = ()
    find_layer: Callable[[Step], list[Tensor]] | None = None


@dataclass(frozen=True)
class Balance:
    """What one balanced backward did. All tensors are detached.

    Args:
        names: the ``T`` task names.
        losses: ``[T]``, averaged over the ranks where the method needed that, else this rank's own.
        weights: ``[T]``; the update of the shared parameters is ``weights @ rows``. NaN if the step was not finite, or
            if the method's update is no weighted sum of the rows. The mean over groups for a method that has several.
        gram: float64 ``[T, T]`` inner products of the task gradients over the global batch, without any loss
            scale; ``None`` where the method needed none.
        present: bool ``[T]``, or ``None`` if every task was present.
    """

    names: tuple[str, ...]
    losses: Tensor
    weights: Tensor
    gram: Tensor | None = None
    present: Tensor | None = None

    @property
    def finite(self) -> bool:
        """Whether gram, losses and weights are; if not, balancer state did not move and the step should be skipped."""
        if self.gram is not None:
            return bool(torch.isfinite(self.gram).all() & torch.isfinite(self.losses).all())
        return bool(torch.isfinite(self.weights).all())
