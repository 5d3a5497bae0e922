"""From one loss for many tasks to one loss per task."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_mtl.checks import bad_argument, shape

_WHO = "losses_per_task"


def losses_per_task(
    unreduced: Tensor, names: Sequence[str], mask: Tensor | None = None, weights: Tensor | None = None
) -> tuple[dict[str, Tensor | None], dict[str, Tensor]]:
    """Take the loss of a model with one output per task apart, for ``Balanced.balance`` or ``lightning_mtl.backward``.

    Write ``return self.balance(losses, labelled=labelled)`` where the module returned the mean of the unreduced loss. A
    task's loss is the mean over its labelled samples, each of which counts its weight; over all processes, because
    ``labelled`` says what this one's mean is over.

    Args:
        unreduced: the loss of each sample and task.
        names: the ``T`` task names, in the order of the columns.
        mask: True where there is a label. There, and only there, a target may be NaN if you replace it before the loss
            (``target.nan_to_num()``); otherwise its gradient would be NaN times 0.
        weights: of the samples, at least 0.

    Shapes: unreduced float ``[B, T]``, mask bool ``[B, T]``, weights ``[B]`` or ``[B, T]``.
    Returns: name -> scalar, ``None`` for a task without any label (or with weights of 0 only); and name -> what it is
    the mean over: the number of labels ``[]``, or with ``weights`` the weights of the labelled samples ``[B]``.
    Raises: ``ValueError`` if shapes or dtypes differ from these, if a weight is negative or not finite, or if the loss
    is NaN or infinite where it does not count.

    Example:
        >>> loss, mask = torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[True, True], [True, False]])
        >>> losses_per_task(loss, ["a", "b"], mask)[0]
        {'a': tensor(2.), 'b': tensor(2.)}
    """
    _check(unreduced, names, mask, weights)
    loss = unreduced if unreduced.dtype == torch.float64 else unreduced.float()
    counted = torch.ones_like(loss, dtype=torch.bool) if mask is None else mask
    if weights is None:
        total = counted.sum(0)
        labelled = total.unbind()
    else:
        each = (weights if weights.ndim == 2 else weights[:, None]).to(loss.dtype).expand_as(loss).where(counted, 0)
        loss, counted, total, labelled = loss * each, each != 0, each.sum(0), each.unbind(1)
    # One transfer for all that the host has to know.
    wrong = (~unreduced.isfinite() & ~counted).any()
    bad_weight = torch.zeros_like(wrong) if weights is None else ~((weights >= 0) & weights.isfinite()).all()
    hidden, negative, *there = torch.cat([torch.stack([wrong, bad_weight]), total > 0]).tolist()
    if negative:
        raise bad_argument(_WHO, "weights", "be finite numbers >= 0", "others", "Leave a sample out with a weight of 0")
    if hidden:
        raise bad_argument(
            _WHO,
            "unreduced",
            "be finite where it does not count, because its gradient there is multiplied by 0",
            "NaN or infinity",
            "Replace missing targets before the loss: target.nan_to_num()",
        )
    means = loss.where(counted, 0).sum(0) / total.where(total > 0, 1)
    losses = {name: mean if some else None for name, mean, some in zip(names, means.unbind(), there, strict=True)}
    return losses, dict(zip(names, labelled, strict=True))


def _check(unreduced: Tensor, names: Sequence[str], mask: Tensor | None, weights: Tensor | None) -> None:
    several = (
        isinstance(names, Sequence) and not isinstance(names, str) and all(isinstance(name, str) for name in names)
    )
    if not several or not names or len(set(names)) != len(names):
        raise bad_argument(_WHO, "names", "be distinct task names", repr(names), "Name every column once, in a list")
    floating = isinstance(unreduced, Tensor) and unreduced.is_floating_point()
    if not floating or unreduced.ndim != 2 or unreduced.shape[1] != len(names):
        raise bad_argument(
            _WHO,
            "unreduced",
            f"be a floating-point tensor [B, T] with T = {len(names)}",
            shape(unreduced),
            'Use reduction="none", one column per task',
        )
    if mask is not None and not (
        isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == unreduced.shape
    ):
        got = f"{mask.dtype} {shape(mask)}" if isinstance(mask, Tensor) else type(mask).__name__
        expected = f"be a bool tensor {shape(unreduced)}"
        raise bad_argument(_WHO, "mask", expected, got, "Pass True where there is a label")
    fitting = (unreduced.shape[:1], unreduced.shape)
    if weights is not None and not (isinstance(weights, Tensor) and weights.shape in fitting):
        expected = f"have shape {shape(unreduced[:, 0])} or {shape(unreduced)}"
        raise bad_argument(_WHO, "weights", expected, shape(weights), "Pass one weight per sample")
