"""GradVac: pull the cosines between task gradients up to what they usually are."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_mtl.balancers.base import GramBalancer, Tasks
from lightning_mtl.checks import check_choice, check_integer, check_number
from lightning_mtl.linalg import cosines


class GradVac(GramBalancer):
    r"""Pull the cosines between task gradients up to what they usually are.

    For each task, over the others in random order: if its cosine :math:`\phi` with the other's gradient is below
    the target :math:`\hat\phi`, add as much of that gradient as brings it to the target.

    The targets are moving averages, :math:`\hat\phi \leftarrow (1 - \beta) \hat\phi + \beta \phi`, started at 0 and
    moved by each pair as it is met, in the paper's order: first the correction, then the target.

    Args:
        num_tasks: ``T``.
        beta: how fast the targets follow, in [0, 1]; the paper's 0.01 (other code uses 0.5).
        granularity: targets and corrections for the "whole" of the shared parameters, per "layer" or per "tensor".
        seed: of the random orders, which depend on it and the step counter alone.
        every_n_steps: solve in every n-th step only.

    Shapes: gram ``[K, T, T]`` of the ``K`` groups, losses ``[T]`` (unused) -> weights ``[K, T]``.
    State: that of :class:`GramBalancer`, and ``targets`` ``[K, T, T]``.
    Update: sum scale; scale-free; heads keep their own gradient. Promises: a plain sum while every cosine is above its
    target; with ``beta=0`` and two tasks, PCGrad.
    Raises: ``ValueError`` if an option is out of range.
    Paper: Wang et al., ICLR 2021, arXiv:2010.05874, equation 4 and algorithm 1.

    Example:
        >>> import torch
        >>> rows = torch.tensor([[1.0, 0.0], [-1.0, 1.0]])
        >>> GradVac(2).combine(rows, torch.ones(2)).tolist()
        [0.5, 1.5]
    """

    targets: Tensor
    grouped = True
    growing = ("targets", "last_weights")

    def __init__(
        self,
        num_tasks: int,
        beta: float = 0.01,
        granularity: Literal["whole", "layer", "tensor"] = "whole",
        seed: int = 0,
        every_n_steps: int = 1,
    ) -> None:
        super().__init__(num_tasks, every_n_steps)
        check_number(beta, "beta", self, low=0.0, high=1.0)
        check_choice(granularity, ("whole", "layer", "tensor"), "granularity", self)
        check_integer(seed, "seed", self, low=0)
        self.beta, self.granularity, self.seed = beta, granularity, seed
        self.register_buffer("targets", torch.zeros((1, num_tasks, num_tasks), dtype=torch.float64))

    def weights(self, gram: Tensor, losses: Tensor, tasks: Tasks) -> Tensor:
        groups, count = gram.shape[:2]
        if len(self.targets) != groups:
            self.targets = gram.new_zeros((groups, self.num_tasks, self.num_tasks))
        index = torch.arange(self.num_tasks)[tasks]
        norms = gram.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
        generator = torch.Generator().manual_seed(self.seed + int(self.step))
        mix = torch.eye(count, dtype=gram.dtype).repeat(groups, 1, 1)
        for i in range(count):
            for j in (torch.randperm(count, generator=generator)).tolist():
                if j != i:
                    self._pull(mix, gram, norms, i, j, index)
        return mix.sum(1)

    def _pull(self, mix: Tensor, gram: Tensor, norms: Tensor, i: int, j: int, index: Tensor) -> None:
        """Correct the gradient of task ``i`` in all groups for task ``j``, then move the target."""
        row = mix[:, i]
        own = torch.einsum("kp,kpq,kq->k", row, gram, row).clamp(min=0).sqrt()
        inner = torch.einsum("kp,kp->k", row, gram[:, :, j])
        pair = torch.stack([own**2, inner, inner, norms[:, j] ** 2], -1).view(-1, 2, 2)
        phi = torch.stack([cosines(matrix)[0, 1] for matrix in pair])
        a, b = int(index[i]), int(index[j])
        target = self.targets[:, a, b]
        # A target of 1 cannot be reached; a gradient of zero has no direction.
        room = (1 - target**2).clamp(min=0).sqrt()
        pulled = (phi < target) & (norms[:, j] > 0) & (room > 0)
        amount = own * (target * (1 - phi**2).clamp(min=0).sqrt() - phi * room) / (norms[:, j] * room)
        mix[:, i, j] += torch.where(pulled, amount, 0)
        seen = (own > 0) & (norms[:, j] > 0)
        self.targets[:, a, b] = torch.where(seen, (1 - self.beta) * target + self.beta * phi, target)
