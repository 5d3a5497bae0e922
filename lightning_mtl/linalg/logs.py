"""Logarithms of losses, and what keeps a loss that is not finite visible."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_mtl.checks import bad_argument


def log_losses(losses: Tensor, owner: object, option: str, *, first: bool) -> Tensor:
    """The logarithms of positive losses. NaN and infinite losses pass: a gradient scaler looks after them.

    Args:
        losses: ``[P]``, an offset already subtracted.
        owner: named in the error.
        option: the owner's argument that holds the offset.
        first: whether this is the first look. On the CPU every step is checked, elsewhere only the first, because
            the host would have to wait; there a later loss <= 0 gives NaN.

    Shapes: losses ``[P]`` -> ``[P]``.
    Raises: ``ValueError`` if a loss is finite and <= 0.
    """
    if first or losses.device.type == "cpu":
        values = losses.detach()
        if bool(((values <= 0) & values.isfinite()).any()):
            raise bad_argument(
                owner,
                "losses",
                "be > 0 after the offset, because the method takes their logarithms",
                values.tolist(),
                f"Pass {option}= with a lower bound of the losses",
            )
    return torch.log(losses)


def one_or_nan(losses: Tensor) -> Tensor:
    """1, or NaN if a loss is not finite: as a factor of weights it shows them that something is wrong.

    Shapes: losses ``[P]`` -> ``[]``, without a graph.
    """
    return 1 + (0 * losses.detach()).sum()
