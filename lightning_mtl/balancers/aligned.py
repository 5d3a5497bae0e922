"""Aligned-MTL: make the task gradients orthogonal and equally long, then add them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_mtl.balancers.base import GramBalancer, Tasks
from lightning_mtl.checks import check_choice
from lightning_mtl.linalg import factor, unit_gram

_SCALES: dict[str, Callable[[np.ndarray], float]] = {
    "min": np.min,
    "median": np.median,
    "rmse": lambda values: np.sqrt(np.mean(np.square(values))),
}


class Aligned(GramBalancer):
    r"""Replace the gradients by the nearest system with condition number 1, and add its rows.

    With the singular value decomposition :math:`J = U \Sigma V^\top`, the aligned rows are :math:`s\, U V^\top` and the
    weights :math:`s\, U \Sigma^{-1} U^\top p`.

    Args:
        num_tasks: ``T``.
        scale_mode: the common length ``s`` of the aligned rows: the "min" (paper), "median" or "rmse" of the singular
            values.
        preference: ``p``, weights of the aligned rows: one number, ``T`` of them, or a mapping of task names; 1 each.
        every_n_steps: solve in every n-th step only.

    Shapes: gram ``[T, T]``, losses ``[T]`` (unused) -> weights ``[T]``.
    State: that of :class:`GramBalancer`.
    Update: sum scale (the official code's; others take the mean); scale-free; heads keep their own gradient.
    Promises: the aligned rows have condition number 1 on the span of the gradients. Which directions belong to that
    span is decided on gradients of length 1: what is dependent up to 1e-6, or up to the gradients' rounding if that is
    more, is dropped.
    Raises: ``ValueError`` if an option is unknown or a preference is not finite.
    Paper: Senushkin et al., CVPR 2023, arXiv:2305.19000, equation 11 and algorithm 1.

    Example:
        >>> import torch
        >>> Aligned(2).combine(torch.tensor([[4.0, 0.0], [0.0, 1.0]]), torch.ones(2))
        tensor([1., 1.])
    """

    preference: Tensor

    def __init__(
        self,
        num_tasks: int,
        scale_mode: str = "min",
        preference: float | Sequence[float] | Mapping[str, float] | None = None,
        every_n_steps: int = 1,
    ) -> None:
        super().__init__(num_tasks, every_n_steps)
        check_choice(scale_mode, tuple(_SCALES), "scale_mode", self)
        self.scale_mode = scale_mode
        self._setting("preference", preference, 1.0)

    def weights(self, gram: Tensor, losses: Tensor, tasks: Tasks) -> Tensor:
        unit, norms = unit_gram(gram.numpy())
        # Not the eigenvalues of the gram: squares of lengths that differ by 1e6 are lost in each other.
        left, singular, _ = np.linalg.svd(norms[:, None] * factor(unit, self.resolution), full_matrices=False)
        kept = singular > 0
        if not kept.any():
            return torch.zeros_like(losses)
        left, singular = left[:, kept], singular[kept]
        scale = _SCALES[self.scale_mode](singular)
        return torch.from_numpy(scale * (left / singular) @ (left.T @ self.preference[tasks].numpy()))
