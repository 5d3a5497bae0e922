"""Who is present in a step: losses as shares of the mean over the global batch's labels."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from numbers import Integral, Real

import torch
from torch import Tensor

from lightning_mtl.checks import bad_argument, check_task_loss, warn_once
from lightning_mtl.engine.collectives import label_counts, world_size
from lightning_mtl.engine.differentiate import as_plain

TaskLoss = Tensor | float | tuple[Tensor, Tensor] | None
Labelled = Mapping[str, Tensor | int]


def collect(
    losses: Mapping[str, TaskLoss],
    names: Sequence[str],
    labelled: Labelled | None,
    absent: Tensor,
    owner: object,
    memory: object | None = None,
    *,
    halves: bool = False,
) -> tuple[list[Tensor], Tensor | None]:
    """The losses of a batch in task order, and who is present.

    A loss without a gradient (a number, a constant: a task that is switched off) counts in the value only: its task is
    absent.

    Args:
        losses: task name -> scalar, pair of scalars (of two halves of the batch), or ``None`` for an absent task.
        names: the ``T`` task names.
        labelled: task name -> what a loss is the mean over (:func:`_count`); by default every process counts the same.
        absent: what stands in for the loss of an absent task.
        owner: whom an error names.
        memory: what remembers the warnings that were given, if not the owner.
        halves: whether there are pairs, which a process without any loss cannot see.

    Returns: ``T`` scalars, or ``2T``, all first halves before all second ones; and as :func:`to_global`.
    Raises: ``ValueError`` or ``TypeError`` if a loss is no scalar, a count is none, or no loss has a gradient.
    """
    pairs = {name: _shares(losses[name], name, owner) for name in names}
    parts = max((len(pair) for pair in pairs.values() if pair), default=1 + halves)
    for name, pair in pairs.items():
        if losses[name] is not None and len(pair) != parts:
            raise _bad_pair(name, losses[name], owner)
    known = _counts(labelled or {}, owner)
    values: list[Sequence[Tensor]] = []
    counts: list[float] = []
    for name in names:
        count = 0.0 if losses[name] is None else known.get(name, 1)
        # Of a task without labels not the loss itself: the mean of nothing is NaN.
        value: Sequence[Tensor] = pairs[name] if count else (absent,) * parts
        if count and torch.is_grad_enabled() and not any(part.requires_grad for part in value):
            _say_constant(name, owner, memory)
            count, value = 0, [part + absent for part in value]
        values.append(value)
        counts.append(count)
    if not any(counts) and torch.is_grad_enabled() and world_size() == 1:
        raise bad_argument(
            owner,
            "losses",
            "hold a loss with a gradient of at least one task",
            "none",
            "Compute them without detach(), no_grad() or item(); return None from training_step to skip such a batch",
        )
    flat = [part for each in zip(*values, strict=True) for part in each]
    if labelled or world_size() > 1 or not all(counts):
        return to_global(flat, counts)
    return flat, None


def to_global(losses: Sequence[Tensor], counts: Sequence[Tensor | float]) -> tuple[list[Tensor], Tensor | None]:
    """Turn means over this rank's labelled samples into shares of the mean over the global batch's.

    Each loss is multiplied by ``count * world / global count``, so that the average over the ranks, which the
    gradient all-reduce takes, is the mean over all labelled samples.

    Args:
        losses: ``T`` scalars, or ``2T``, each a share of its task's loss.
        counts: per task the number of this rank's labelled samples, or the sum of their weights; a tensor ``[]`` only
            where the host would have to wait for the number.

    Returns: as many scalars, and who is present in the global batch, bool ``[T]``; ``None`` if surely everybody.
    """
    device = losses[0].device
    if world_size() == 1:
        if all(isinstance(count, int | float) for count in counts):
            present = [count > 0 for count in counts]
            return list(losses), None if all(present) else torch.tensor(present, device=device)
        return list(losses), torch.stack([torch.as_tensor(count, device=device) for count in counts]) > 0
    mine, total = label_counts(counts, device)
    factors = (mine * world_size() / torch.where(total > 0, total, 1)).repeat(len(losses) // len(counts))
    return [loss * factor.to(loss.dtype) for loss, factor in zip(losses, factors, strict=True)], total > 0


def halves_to_global(means: Sequence[Tensor], counts: Sequence[Tensor | float]) -> tuple[list[Tensor], Tensor | None]:
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
    factors = mine * world_size() / torch.where(total > 0, total, 1) / there.sum(0).clamp(min=1).repeat(2)
    shares = [mean * factor.to(mean.dtype) for mean, factor in zip(means, factors, strict=True)]
    sure = world_size() == 1 and all(isinstance(count, int | float) and count > 0 for count in counts)
    return shares, None if sure else there.any(0)


def zero_that_reaches(parameters: Iterable[Tensor], tables: Collection[int], device: torch.device) -> Tensor:
    """A loss of 0 that gives each parameter a gradient of 0, for which DDP waits; a sparse one if it is a table."""

    def number(parameter: Tensor) -> Tensor:
        if id(parameter) in tables:
            return torch.embedding(parameter, torch.zeros(1, dtype=torch.long, device=device), sparse=True).sum()
        real = torch.view_as_real(parameter) if parameter.is_complex() else parameter
        return real.flatten()[:1].sum()

    return sum((number(parameter).float() * 0 for parameter in parameters), start=torch.zeros((), device=device))


def _shares(loss: TaskLoss, name: str, owner: object) -> Sequence[Tensor]:
    """A loss as the parts that it is the sum of: itself, or half of each of a pair of means."""
    if loss is None:
        return ()
    parts = loss if isinstance(loss, tuple | list) else (loss,)
    if isinstance(loss, tuple | list) and (len(parts) != 2 or any(part is None for part in parts)):
        raise _bad_pair(name, loss, owner)
    found: list[Tensor] = []
    for part in parts:
        value = torch.tensor(float(part)) if isinstance(part, Real) and not isinstance(part, bool) else part
        if isinstance(value, Tensor) and value.ndim and value.numel() == 1:
            value = value.reshape(())  # as backward() of a plain sum takes it
        check_task_loss(value, name, owner)
        assert isinstance(value, Tensor)
        # A subclass (with labels, with meta data) has no use for them in a sum of losses.
        value = as_plain(value)
        found.append(value / len(parts) if len(parts) > 1 else value)
    return found


def _bad_pair(name: str, loss: object, owner: object) -> Exception:
    got = f"{len(loss)} entries" if isinstance(loss, tuple | list) else "one loss"
    return bad_argument(
        owner,
        f"losses['{name}']",
        "be one loss for every task, or two for every task, of two halves of the batch",
        got,
        "Pass a scalar, or (loss of one half, loss of the other) if the balancer compares halves; None for a task "
        "without labels in either",
    )


def _say_constant(name: str, owner: object, memory: object | None) -> None:
    warn_once(
        owner,
        f"The loss of {name!r} has no gradient, so the task counts as absent in this batch. If it is not switched off "
        "on purpose, compute its loss without detach(), no_grad() or item().",
        memory,
    )


def _counts(labelled: Labelled, owner: object) -> dict[str, float]:
    """What each loss is the mean over, in one transfer to the host."""
    if not labelled:
        return {}
    sums = torch.stack([_count(value, name, owner) for name, value in labelled.items()]).tolist()
    for name, total in zip(labelled, sums, strict=True):
        if not 0 <= total < math.inf:
            raise _bad_count(name, total, owner)
    return dict(zip(labelled, sums, strict=True))


def _count(value: object, name: str, owner: object) -> Tensor:
    """The denominator of a mean: a number of labels, the entries of a bool mask that are True, or a sum of weights.

    A scalar that is no whole number is refused: it would be the mean of a mask.
    """
    if isinstance(value, int | float | Integral) and not isinstance(value, bool) and float(value).is_integer():
        return torch.tensor(float(value), dtype=torch.float64)
    if isinstance(value, Tensor):
        value = value.detach()
        if value.dtype == torch.bool or (value.is_floating_point() and value.ndim):
            # A negative weight or NaN anywhere must show in the sum.
            return torch.where((value >= 0).all(), value.sum(dtype=torch.float64), -1.0).cpu()
        whole = value.numel() == 1 and not value.is_complex()
        if whole and (not value.is_floating_point() or float(value).is_integer()):
            return value.reshape(()).double().cpu()
    raise _bad_count(name, value, owner)


def _bad_count(name: str, value: object, owner: object) -> Exception:
    return bad_argument(
        owner,
        f"labelled['{name}']",
        "be a number of labels (an integer >= 0), a bool mask, or a float tensor of sample weights >= 0",
        repr(value),
        "Pass the mask itself or mask.sum(), not its mean; weights not summed up",
    )
