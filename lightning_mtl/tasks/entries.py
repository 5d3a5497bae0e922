"""The entries of a batch that have a label: which they are, and the mean over them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


def is_empty(value: Any) -> bool:
    """Whether tensors without entries are all there is: a batch in which nothing was found."""
    if isinstance(value, Tensor):
        return value.numel() == 0
    return all(isinstance(leaf, Tensor) and leaf.numel() == 0 for leaf in tree_leaves(value))


def num_samples(value: Any) -> int:
    """How many samples a target or an output, in any nested structure, is for."""
    if isinstance(value, Tensor):
        return len(value) if value.ndim else 1
    return next((len(leaf) for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.ndim), 1)


def readable(tensor: Tensor) -> bool:
    """Whether the host can look at the numbers without waiting for them."""
    return tensor.device.type == "cpu"


def zero_of(output: Any) -> Tensor:
    """Exactly 0, with a gradient of exactly 0 for all that the output depends on."""
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    zero = torch.zeros((), device=leaves[0].device if leaves else None)
    # The sum of no entry: 0 times an output that is infinite would be NaN.
    return sum((leaf.flatten()[:0].abs().sum() for leaf in leaves if leaf.requires_grad), start=zero)


def spread(mask: Tensor, like: Tensor) -> Tensor | None:
    """A mask of the leading dimensions, ready to meet a tensor with more of them; ``None`` if it does not fit."""
    if mask.shape != like.shape[: mask.ndim]:
        return None
    return mask.reshape(mask.shape + (1,) * (like.ndim - mask.ndim))


def channels_last(value: Tensor, labelled: Tensor, *, classes: bool = False) -> Tensor | None:
    """A tensor with the dimensions of ``labelled`` first: as it is, or with its channels (dimension 1) moved behind.

    ``None`` if it has them neither way. If both ways fit, dimension 1 is taken for channels where it holds ``classes``.
    """
    moved = value.movedim(1, -1) if value.ndim > 1 else value
    ways = (moved, value) if classes else (value, moved)
    return next((way for way in ways if way.shape[: labelled.ndim] == labelled.shape), None)


def filled(target: Any, labelled: Tensor) -> Any:
    """The target with one of its own labels where there is none.

    What stands there may be NaN or no class, and must not reach the loss, which may have no value at 0 either. What
    comes of it is dropped, but 0 times a gradient that is not finite would be NaN.
    """
    places = channels_last(target, labelled) if isinstance(target, Tensor) else None
    if places is None:
        return target
    entries = places.reshape(labelled.numel(), *places.shape[labelled.ndim :])
    first = labelled.flatten().byte().argmax().reshape(1)
    # Without any label, which only other devices than the CPU get to here, a 0.
    nothing = torch.zeros((), dtype=target.dtype, device=target.device)
    label = torch.where(labelled.any(), entries.index_select(0, first), nothing)
    where = spread(labelled, places)
    assert where is not None
    found = torch.where(where, places, label)
    return found if places is target else found.movedim(-1, 1)


def weighted_mean(loss: Tensor, labelled: Tensor | None, weights: Tensor | None) -> tuple[Tensor, Tensor | int | float]:
    """The mean over the labelled entries, each of which counts 1, or its weight, which the loss already carries.

    Shapes: loss ``[...]``; labelled bool and weights of the same shape, ``None`` for everywhere and for 1.
    Returns: the mean, 0 if nothing counts, and what it is the mean over: their number, or the sum of their weights; a
    tensor ``[]`` only where reading it would make the host wait.
    """
    if labelled is None and weights is None:
        return loss.mean(), loss.numel()
    nothing = torch.zeros((), dtype=loss.dtype, device=loss.device)
    # where, not a product: the loss at a missing label may be NaN or infinite.
    kept = loss.sum() if labelled is None else torch.where(labelled, loss, nothing).sum()
    if weights is None:
        assert labelled is not None
        total = labelled.sum()
        mean = kept / total.clamp(min=1)
    else:
        exact = torch.promote_types(loss.dtype, torch.float32)
        total = (weights if labelled is None else weights.where(labelled, 0)).sum(dtype=exact)
        mean = torch.where(total > 0, kept / total.where(total > 0, 1).to(loss.dtype), nothing)
    return mean, total.item() if readable(total) else total
