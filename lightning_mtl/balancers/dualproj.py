"""DualProj: the harmless direction nearest to the mean gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_mtl.balancers.base import GramBalancer, Tasks
from lightning_mtl.linalg import divided, project_on_dual_cone, unit_gram


class DualProj(GramBalancer):
    r"""Project :math:`\sum_t p_t g_t` on the dual cone :math:`\{v : J v \ge 0\}`.

    Args:
        num_tasks: ``T``.
        preference: ``p``: one number, ``T`` of them, or a mapping of task names; by default one over the number of
            tasks that are present.
        every_n_steps: solve in every n-th step only.

    Shapes: gram ``[T, T]``, losses ``[T]`` (unused) -> weights ``[T]``.
    State: that of :class:`GramBalancer`.
    Update: mean scale; scale-free; heads keep their own gradient.
    Promises: :math:`g_t^\top d \ge 0` for every task, up to the rounding of the gradients, and no such
    direction is nearer to the mean. A long gradient that
    opposes a short one can leave nothing of the short one's own wish; :class:`UPGrad` mends that.
    Raises: ``ValueError`` if a preference is not finite.
    Paper: Lopez-Paz and Ranzato, NeurIPS 2017, arXiv:1706.08840, section 3 (GEM); the name is that of Quinton and Rey,
    arXiv:2406.16232.

    Example:
        >>> import torch
        >>> DualProj(2).combine(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]), torch.ones(2))
        tensor([0.5556, 1.1111, 1.1111])
    """

    preference: Tensor

    def __init__(
        self,
        num_tasks: int,
        preference: float | Sequence[float] | Mapping[str, float] | None = None,
        every_n_steps: int = 1,
    ) -> None:
        super().__init__(num_tasks, every_n_steps)
        self._setting("preference", preference, 1.0)

    def weights(self, gram: Tensor, losses: Tensor, tasks: Tasks) -> Tensor:
        unit, norms = unit_gram(gram.numpy())
        preference = self._or_equal_shares("preference", tasks)
        projected = project_on_dual_cone(unit, (preference * norms)[None], self.resolution)[0]
        return torch.from_numpy(divided(projected, norms))
