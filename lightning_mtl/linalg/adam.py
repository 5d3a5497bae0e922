"""One step of Adam as a pure function, for weights that a balancer moves by itself."""

from __future__ import annotations

from torch import Tensor

_BETAS = (0.9, 0.999)
_EPSILON = 1e-8


def adam_step(
    gradient: Tensor, first_moment: Tensor, second_moment: Tensor, updates: Tensor, lr: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What Adam (Kingma and Ba, arXiv:1412.6980, algorithm 1, its default betas) subtracts, and its new state.

    Shapes: all ``[P]``, also ``updates``, the number of steps of each entry before this one.
    Returns: the step, then the new ``first_moment``, ``second_moment`` and ``updates``.
    """
    updates = updates + 1
    first_moment = _BETAS[0] * first_moment + (1 - _BETAS[0]) * gradient
    second_moment = _BETAS[1] * second_moment + (1 - _BETAS[1]) * gradient**2
    first = first_moment / (1 - _BETAS[0] ** updates)
    second = second_moment / (1 - _BETAS[1] ** updates)
    return lr * first / (second.sqrt() + _EPSILON), first_moment, second_moment, updates
