"""The family of methods that need the inner products of the task gradients."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_mtl.balancers.base.balancer import ALL, Balancer, Tasks
from lightning_mtl.checks import (
    bad_argument,
    check_gram,
    check_integer,
    check_losses,
    check_number,
    check_present,
    check_rows,
)
from lightning_mtl.linalg import gram as gram_of
from lightning_mtl.linalg.unit import EXACT


def _plain(given: Tensor) -> Tensor:
    """In float64 on the CPU, without a graph; as it is where it already is so, as nearly always."""
    if given.dtype is torch.float64 and given.device.type == "cpu" and not given.requires_grad:
        return given
    return given.detach().to("cpu", torch.float64)


def _told(gram: Tensor) -> float:
    """How exact rows are at best, of which only rounded products are known: a square tells its root."""
    return math.sqrt(torch.finfo(gram.dtype).eps) if gram.is_floating_point() else EXACT


class GramBalancer(Balancer):
    """A method that needs only the inner products of the task gradients (and the losses).

    The solve runs on the CPU in float64: it is a few numbers, and dozens of tiny kernels would cost a GPU more
    than one transfer. So state stays on the CPU whatever happens to the module.

    Args:
        num_tasks: ``T``.
        every_n_steps: solve in every n-th step only and reuse the weights in between; a step without a solve
            costs one ordinary backward. Overflows are noticed in steps with a solve only, and a task without labels
            in such a step has weight 0 until the next.

    State: ``step`` counts backwards (with accumulation several per optimizer step); one whose gram is not finite does
    not count, unless it was to reuse its weights and had no gram. ``last_weights`` ``[T]`` (``[K, T]`` in groups).
    Raises: ``ValueError`` if ``every_n_steps`` is not an integer >= 1.
    """

    step: Tensor
    last_weights: Tensor
    state_on_cpu = True
    #: Where the gram is taken at level "parameters": all shared parameters, or the last shared layer only.
    gram_at: Literal["shared", "last_layer"] = "shared"
    #: Whether the method works on ``K`` groups of parameters apart: each parameter tensor, each layer, or all as one.
    granularity: Literal["whole", "layer", "tensor"] = "whole"
    #: Whether :meth:`weights` is written for groups: gram ``[K, P, P]`` -> weights ``[K, P]``.
    grouped: ClassVar[bool] = False
    #: Whether the method compares two independent halves of the batch: the gram is ``[2T, 2T]``, the rows of the first
    #: halves before those of the second, each half's loss a share of the task's loss.
    halves: ClassVar[bool] = False
    #: How exact the rows behind the gram of this solve are, relatively; solvers take as met what is met within that.
    resolution: float = EXACT

    def __init__(self, num_tasks: int, every_n_steps: int = 1) -> None:
        super().__init__(num_tasks)
        check_integer(every_n_steps, "every_n_steps", self, low=1)
        self.every_n_steps = every_n_steps
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        shape = (1, num_tasks) if self.grouped else (num_tasks,)
        self.register_buffer("last_weights", torch.ones(shape, dtype=torch.float64))

    @abstractmethod
    def weights(self, gram: Tensor, losses: Tensor, tasks: Tasks) -> Tensor:
        """The weights of the present tasks; may move state. Overridden by each method.

        Shapes: gram float64 ``[P, P]``, losses float64 ``[P]``, ``tasks`` indexes ``[T]`` state -> ``[P]``.
        Called with finite numbers and ``P >= 1`` only, without autograd.
        """

    def check_level(self, level: str) -> None:
        super().check_level(level)
        if level == "features" and self.granularity != "whole":
            raise bad_argument(
                self,
                "granularity",
                'be "whole" at level "features", where no parameters are looked at',
                repr(self.granularity),
                'Pass granularity="whole", or use level="parameters"',
            )

    def private_weights(self, losses: Tensor, present: Tensor | None = None) -> Tensor | None:
        """Factors of the heads' own gradients, for methods that scale the losses; ``None`` for 1 each.

        Shapes: losses ``[T]`` (averaged over the ranks), present bool ``[T]`` -> ``[T]``.
        """
        return None

    def own_objective(self, losses: Tensor, present: Tensor | None = None) -> Tensor | None:
        """What the balancer's own parameters minimise, if it has any. Shapes: losses ``[T]``, detached -> ``[]``."""
        return None

    @property
    def due(self) -> bool:
        """Whether this step solves (else the last weights are used again)."""
        return int(self.step) % self.every_n_steps == 0

    @torch.no_grad()
    def forward(
        self, gram: Tensor, losses: Tensor, present: Tensor | None = None, resolution: float | None = None
    ) -> Tensor:
        """One step: check, drop absent tasks, solve. Final.

        A gram or loss that is not finite gives NaN weights and moves no state, so that a gradient scaler skips
        the step. An absent task gets weight 0 and its state does not move.

        Args:
            gram: of the rows, however exact the products themselves are.
            losses: one per task.
            present: which tasks have labels; by default all.
            resolution: the relative rounding of the rows' numbers, in [0, 1]: ``torch.finfo(rows.dtype).eps``. By
                default that of float64, or the root of the gram's own, if that is coarser.

        Shapes: gram ``[T, T]`` (``[2T, 2T]`` with halves, ``[K, T, T]`` in groups), losses ``[T]``, present bool
        ``[T]`` -> float64 ``[T]`` (``[K, T]``) on the CPU.
        """
        check_gram(gram, self.num_tasks * (2 if self.halves else 1), self, grouped=self.grouped)
        check_losses(losses, self.num_tasks, self)
        self._check_bound()
        if resolution is None:
            resolution = EXACT if gram.dtype is torch.float64 else _told(gram)
        if resolution != self.resolution:  # setting what a module has takes longer than some methods' whole solve
            check_number(resolution, "resolution", self, low=0.0, high=1.0)
            self.resolution = resolution
        gram, losses = _plain(gram), _plain(losses)
        tasks = ALL
        if present is not None:
            check_present(present, self.num_tasks, self)
            if not bool(present.all()):
                tasks = present.cpu().nonzero().squeeze(1)
                rows = torch.cat([tasks, tasks + self.num_tasks]) if self.halves else tasks
                gram, losses = gram[..., rows, :][..., rows], losses[tasks]
        shape = (*gram.shape[:-2], self.num_tasks)
        if len(losses) == 0:
            return losses.new_zeros(shape)
        # One number instead of a mask: a sum is finite only if all its terms are. In numpy, which is faster at it.
        if not math.isfinite(np.add.reduce(gram.numpy(), axis=None) + np.add.reduce(losses.numpy())):
            return losses.new_full(shape, float("nan"))
        kept = self.last_weights
        if kept.shape != shape:
            kept = self.last_weights = losses.new_ones(shape)
        solved = self.weights(gram, losses, tasks)
        if tasks is ALL:
            kept.copy_(solved)
        else:
            # A task that was not there has no weight to be used again: it waits for the next solve.
            kept.zero_()[..., tasks] = solved
        self.step.numpy()[...] += 1  # one number: in numpy, like all that is small here
        return kept.clone()

    @torch.no_grad()
    def reuse(self, present: Tensor | None = None) -> Tensor:
        """One step without a solve: the last weights, 0 for absent tasks. Shapes: present ``[T]`` -> as forward."""
        self.step += 1
        if present is None:
            return self.last_weights.clone()
        return self.last_weights * present.to(self.last_weights.device)

    def combine(
        self, rows: Tensor, losses: Tensor, present: Tensor | None = None, sizes: Sequence[int] | None = None
    ) -> Tensor:
        """As for every balancer; ``sizes`` are the widths of the ``K`` groups, by default one of all ``N``.

        With halves, rows ``[2T, N]``.
        """
        check_rows(rows, self.num_tasks * (2 if self.halves else 1), self)
        # Parts that cancel would leave their rounding, in half precision.
        wide = rows.float() if rows.dtype.itemsize < 4 else rows
        parts = wide.split(list(sizes or [rows.shape[1]]), dim=1)
        if self.due:
            gram = torch.stack([gram_of(part) for part in parts]) if self.grouped else gram_of(wide)
            weights = self(gram, losses, present, torch.finfo(rows.dtype).eps)
        else:
            weights = self.reuse(present)
        if self.halves:
            weights = weights.repeat(2)
        weights = weights.to(wide.device, wide.dtype)
        if not self.grouped:
            return (weights @ wide).to(rows.dtype)
        return torch.cat([weight @ part for weight, part in zip(weights, parts, strict=True)]).to(rows.dtype)

    def rearrange(self, kept: Tensor) -> None:
        if int(self.step):  # else the number of groups is not known yet
            super().rearrange(kept)

    def _fresh(self, name: str) -> float:
        return float(name == "last_weights")

    def _grown(self, name: str, groups: int) -> Tensor:
        """The state ``name``, ``[K, ...]``, with as many groups as this step has; made of zeros at the first."""
        known: Tensor = getattr(self, name)
        if len(known) != groups:
            if bool(known.any()):
                raise bad_argument(
                    self,
                    "gram",
                    f"have {len(known)} groups, as many as before",
                    groups,
                    "Call rearrange() where shared parameters are frozen or unfrozen, or build a new balancer then",
                )
            known = known.new_zeros((groups, *known.shape[1:]))
            setattr(self, name, known)
        return known
