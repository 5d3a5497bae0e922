"""Who is present in a step: losses as shares of the mean over the global batch's labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_mtl.checks import check_task_loss
from lightning_mtl.engine.collectives import label_counts, world_size

TaskLoss = Tensor | tuple[Tensor, Tensor] | None


def collect(
    losses: Mapping[str, TaskLoss],
    names: Sequence[str],
    labelled: Mapping[str, Tensor | int] | None,
    absent: Tensor,
    owner: object,
) -> tuple[list[Tensor], Tensor | None]:
    """The losses of a batch in task order, and who is present.

    Args:
        losses: task name -> scalar, pair of scalars (of two halves of the batch), or ``None`` for an absent task.
        names: the ``T`` task names.
        labelled: task name -> number of labels that a loss is the mean of; by default every process counts the same.
        absent: what stands in for the loss of an absent task.
        owner: whom an error names.

    Returns: ``T`` scalars, or ``2T``, all first halves before all second ones; and as :func:`to_global`.
    """
    pairs = {name: _shares(losses[name]) for name in names}
    parts = max(len(pair) for pair in pairs.values())
    known = _on_host(labelled or {})
    values: list[tuple[Tensor, ...]] = []
    counts: list[Tensor | int] = []
    for name in names:
        count = 0 if losses[name] is None else known.get(name, 1)
        if count:
            for part in pairs[name]:
                check_task_loss(part, name, owner)
        # Of a task without labels not the loss itself: the mean of nothing is NaN.
        values.append(pairs[name] if count else (absent,) * parts)
        counts.append(count)
    flat = [part for each in zip(*values, strict=True) for part in each]
    if labelled or world_size() > 1 or any(loss is None for loss in losses.values()):
        return to_global(flat, counts)
    return flat, None


def to_global(losses: Sequence[Tensor], counts: Sequence[Tensor | int]) -> tuple[list[Tensor], Tensor | None]:
    """Turn means over this rank's labelled samples into shares of the mean over the global batch's.

    Each loss is multiplied by ``count * world / global count``, so that the average over the ranks, which the
    gradient all-reduce takes, is the mean over all labelled samples.

    Args:
        losses: ``T`` scalars, or ``2T``, each a share of its task's loss.
        counts: per task the number of this rank's labelled samples; a tensor ``[]`` only where the host would have
            to wait for the number.

    Returns: as many scalars, and who is present in the global batch, bool ``[T]``; ``None`` if surely everybody.
    """
    device = losses[0].device
    if world_size() == 1:
        if all(isinstance(count, int) for count in counts):
            present = [count > 0 for count in counts]
            return list(losses), None if all(present) else torch.tensor(present, device=device)
        return list(losses), torch.stack([torch.as_tensor(count, device=device) for count in counts]) > 0
    mine, total = label_counts(counts, device)
    factors = (mine * world_size() / total.clamp(min=1)).repeat(len(losses) // len(counts))
    return [loss * factor.to(loss.dtype) for loss, factor in zip(losses, factors, strict=True)], total > 0


def halves_to_global(means: Sequence[Tensor], counts: Sequence[Tensor | int]) -> tuple[list[Tensor], Tensor | None]:
    """Turn means over the halves of this rank's samples into shares of the tasks' losses.

    A task's loss is the mean of its halves' means over the global batch, or the one that has labels; then the other
    share is 0.

    Args:
        means: ``2T`` scalars, those of the first halves before those of the second.
        counts: how many labels each is the mean of.

    Returns: ``2T`` shares, and who is present in the global batch, bool ``[T]``; ``None`` if surely everybody.
    """
    mine, total = label_counts(counts, means[0].device)
    there = (total > 0).view(2, -1)
    factors = mine * world_size() / total.clamp(min=1) / there.sum(0).clamp(min=1).repeat(2)
    shares = [mean * factor.to(mean.dtype) for mean, factor in zip(means, factors, strict=True)]
    sure = world_size() == 1 and all(isinstance(count, int) and count > 0 for count in counts)
    return shares, None if sure else there.any(0)


def _shares(loss: TaskLoss) -> tuple[Tensor, ...]:
    """A loss as the parts that it is the sum of: itself, or half of each of a pair of means."""
    if isinstance(loss, tuple | list):
        return tuple(part / len(loss) if isinstance(part, Tensor) else part for part in loss)
    return (loss,)  # type: ignore[return-value]  # what is no tensor is refused by name later


def _on_host(counts: Mapping[str, Tensor | int]) -> dict[str, int]:
    """Label counts as numbers, in one transfer."""
    if not counts:
        return {}
    values = torch.stack([torch.as_tensor(count).detach().reshape(()).double() for count in counts.values()])
    return dict(zip(counts, (int(value) for value in values.tolist()), strict=True))
