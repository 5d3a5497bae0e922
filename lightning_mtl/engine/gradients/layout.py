"""How gradients lie in a row: real numbers, parameter after parameter, each in the memory order of its parameter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from lightning_mtl.engine.differentiate import Grads, real


class Layout:
    """Rows ``[N]`` for a list of parameters, and gradients back from them.

    A complex parameter counts as pairs of real numbers, as optimizers see it. A gradient has the strides of its
    parameter, which DDP's buckets and fused optimizers expect, and is sparse where those of the tasks were.

    Args:
        parameters: whose gradients.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = parameters
        self._shapes = [_shape_and_strides(parameter) for parameter in parameters]
        self.sizes = [p.numel() * (2 if p.is_complex() else 1) for p in parameters]
        self.size = sum(self.sizes)
        self.dtype = reduce(torch.promote_types, (p.dtype.to_real() for p in parameters))
        #: Whether a task reached the parameter.
        self.reached = [False] * len(parameters)
        #: The entries of the first dimension that sparse gradients touched.
        self._touched: dict[int, list[Tensor]] = {}
        self._dense: set[int] = set()

    def fill(self, row: Tensor, grads: Grads) -> None:
        """Write a task's gradients into its row; 0 where there is none."""
        views, values = [], []
        for place, (view, grad) in enumerate(zip(self._views(row), grads, strict=True)):
            if grad is None:
                view.zero_()
                continue
            self.reached[place] = True
            views.append(view)
            values.append(self._plain(place, grad))
        if views:
            torch._foreach_copy_(views, values)

    def gradients(self, row: Tensor) -> list[Tensor]:
        """A row as one gradient per parameter, dense real ones as views."""
        found = []
        for place, (view, parameter) in enumerate(zip(self._views(row), self.parameters, strict=True)):
            # Not a view: pairs must begin at an even place.
            grad = torch.complex(view[..., 0], view[..., 1]) if parameter.is_complex() else view
            if place in self._touched and place not in self._dense:
                grad = self._sparse(place, grad)
            found.append(grad)
        return found

    def _sparse(self, place: int, grad: Tensor) -> Tensor:
        # A balancer that remembers gradients moves entries that this step did not touch.
        moved = grad.reshape(len(grad), -1).any(1).nonzero().flatten()
        index = torch.cat([*self._touched[place], moved]).unique()
        return torch.sparse_coo_tensor(index[None], grad[index], grad.shape, is_coalesced=True, check_invariants=False)

    def _plain(self, place: int, grad: Tensor) -> Tensor:
        if grad.is_sparse:
            grad = grad.coalesce()
            self._touched.setdefault(place, []).append(grad.indices()[0])
        else:
            self._dense.add(place)
        return real(grad)

    def _views(self, row: Tensor) -> list[Tensor]:
        return [part.as_strided(*like) for part, like in zip(row.split(self.sizes), self._shapes, strict=True)]


def _shape_and_strides(parameter: Tensor) -> tuple[Sequence[int], Sequence[int]]:
    """Those of a parameter, if it fills its memory without a gap; of pairs of numbers if it is complex."""
    shape: Sequence[int] = parameter.shape
    strides: Sequence[int] = parameter.stride()
    if not parameter.is_contiguous() and not _fills_memory(parameter):
        strides = [math.prod(shape[place + 1 :]) for place in range(len(shape))]
    if parameter.is_complex():
        return [*shape, 2], [*(2 * stride for stride in strides), 1]
    return shape, strides


def _fills_memory(tensor: Tensor) -> bool:
    """Whether its strides are those of some order of its dimensions, without a gap or an overlap."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True
