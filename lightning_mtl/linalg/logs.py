"""Logarithms of losses, and what keeps a loss that is not finite visible."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_mtl.checks import bad_argument

#: Of a loss much smaller than this float32 does not hold the inverse.
LEAST_LOSS = 1e-30


def log_losses(
    losses: Tensor, owner: object, option: str, floor: Tensor | float = LEAST_LOSS, *, first: bool
) -> Tensor:
    """The logarithms of losses, with slopes of at most ``1 / floor``.

    Below the floor they go on along the tangent there, as far as rounding may bring a loss that is never negative.
    NaN and infinite losses pass: a gradient scaler looks after them.

    Args:
        losses: ``[P]``, an offset already subtracted.
        owner: named in the error.
        option: the owner's argument that holds the offset.
        floor: > 0, a number or ``[P]``.
        first: whether this is the first look. On the CPU every step is checked, elsewhere only the first, because
            the host would have to wait; there a later loss <= -floor gives NaN.

    Shapes: losses ``[P]`` -> ``[P]``.
    Raises: ``ValueError`` if a loss is finite and <= -floor.
    """
    values = losses.detach()
    low = values < floor
    if first or losses.device.type == "cpu":
        if not bool(low.any()):
            return torch.log(losses)
        if bool(((values <= -floor) & values.isfinite()).any()):
            raise bad_argument(
                owner,
                "losses",
                "be >= 0 after the offset, because the method takes their logarithms",
                values.tolist(),
                f"Pass {option}= with a lower bound of the losses",
            )
    low &= values > -floor
    return torch.log(torch.where(low, floor, losses)) + torch.where(low, losses / floor - 1, 0)


def one_or_nan(losses: Tensor) -> Tensor:
    """1, or NaN if a loss is not finite: as a factor of weights it shows them that something is wrong.

    Shapes: losses ``[P]`` -> ``[]``, without a graph.
    """
    return 1 + (0 * losses.detach()).sum()


def log_weights(losses: Tensor, owner: object, present: Tensor | None = None) -> Tensor:
    """``d log(loss + 1e-8) / d loss`` of losses >= 0; 0 for tasks that are not present.

    Shapes: losses ``[T]``, present bool ``[T]`` -> ``[T]``.
    Raises: ``ValueError`` if a loss is finite and < 0.
    """
    counted = losses if present is None else losses[present]
    if bool(((counted < 0) & counted.isfinite()).any()):
        raise bad_argument(
            owner,
            "losses",
            "be >= 0, because the method takes their logarithms",
            losses.tolist(),
            "Subtract a lower bound from the losses, or choose another balancer",
        )
    inverse = 1 / (losses + 1e-8)
    return inverse if present is None else torch.where(present, inverse, 0)
