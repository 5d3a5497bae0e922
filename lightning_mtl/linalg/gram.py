"""Rows to gram, and what can be read off a gram."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Columns converted to float64 at a time: small enough to stay in a CPU's cache, large enough for a GPU.
_CHUNK = {"cpu": 1 << 14}
_CHUNK_DEFAULT = 1 << 22


def gram(rows: Tensor) -> Tensor:
    """Inner products of the rows, accumulated in float64 whatever the dtype of ``rows``.

    Shapes: rows ``[T, N]`` -> gram float64 ``[T, T]``.
    """
    total = rows.new_zeros((len(rows), len(rows)), dtype=torch.float64)
    for chunk in rows.split(_CHUNK.get(rows.device.type, _CHUNK_DEFAULT), dim=1):
        wide = chunk.double()
        total.addmm_(wide, wide.T)
    return total


def gram_of_parts(parts: Sequence[Sequence[Tensor]]) -> Tensor:
    """The gram of rows that are given as lists of tensors, without joining them.

    Shapes: ``T`` lists of ``K`` tensors, the k-th of one shape in all lists -> gram float64 ``[T, T]``.
    """
    total: Tensor | None = None
    for column in zip(*parts, strict=True):
        part = gram(torch.stack([tensor.reshape(-1) for tensor in column]))
        total = part if total is None else total + part
    if total is None:
        return torch.zeros((len(parts), len(parts)), dtype=torch.float64)
    return total


def cosines(gram: Tensor) -> Tensor:
    """Cosines between the rows; 0 with a row of norm 0, exactly 1 on the diagonal otherwise.

    Shapes: gram ``[T, T]`` -> ``[T, T]``.
    """
    norms = gram.diagonal().clamp(min=0).sqrt()
    scale = torch.where(norms > 0, 1 / norms, torch.zeros_like(norms))
    result = gram * scale[:, None] * scale[None, :]
    result.diagonal().copy_((norms > 0).to(gram.dtype))
    return result.clamp(-1, 1)


def conflict(gram: Tensor) -> float:
    """Share of the task pairs whose gradients have a negative inner product; 0 for a single task.

    Shapes: gram ``[T, T]`` -> a number in [0, 1].
    """
    num_tasks = len(gram)
    if num_tasks < 2:
        return 0.0
    upper = torch.triu_indices(num_tasks, num_tasks, offset=1)
    return float((gram[upper[0], upper[1]] < 0).double().mean())
