"""What must be global: the gram, the losses that a balancer sees, label counts, the list of shared parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_mtl.compat import reduce_scatter
from lightning_mtl.linalg import gram as gram_of
from lightning_mtl.linalg import gram_of_parts


def world_size() -> int:
    """Number of processes that average their gradients; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def label_counts(counts: Sequence[Tensor | float], device: torch.device) -> tuple[Tensor, Tensor]:
    """This rank's label counts, and their sums over the ranks: float64 ``[T]`` each."""
    mine = torch.stack([torch.as_tensor(count, dtype=torch.float64, device=device) for count in counts])
    total = mine.clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return mine, total


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean of a small tensor over all ranks; the tensor itself on one process."""
    if world_size() == 1:
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values / world_size()


def union_over_ranks(flags: Sequence[bool], device: torch.device) -> list[bool]:
    """Element-wise "or" over the ranks."""
    if world_size() == 1:
        return list(flags)
    mask = torch.tensor(flags, dtype=torch.int32, device=device)
    dist.all_reduce(mask, op=dist.ReduceOp.MAX)
    return [bool(flag) for flag in mask.tolist()]


class RowExchange:
    """The gram of rows averaged over ranks, without ever holding the averaged rows: each rank sums one slice.

    Row by row the sum is scattered (each rank receives ``N / world`` numbers of it), which may overlap with the
    next task's backward; then a partial gram per rank, and one all-reduce of ``T x T`` numbers.

    Args:
        num_tasks: ``T``.
        size: ``N``.
        like: a tensor with the dtype and device of the rows.
        whole: whether every rank needs the whole averaged rows; then they are held, and the sum goes to all.
    """

    def __init__(self, num_tasks: int, size: int, like: Tensor, *, whole: bool = False) -> None:
        self.size, self.whole = size, whole
        world = world_size()
        padded = -(-size // world) * world
        self.rows = like.new_empty((num_tasks, padded))
        self.rows[:, size:] = 0
        self._slices = like.new_empty((num_tasks, padded // world)) if world > 1 and not whole else None
        self._work: list[dist.Work | None] = []

    def __getitem__(self, task: int) -> Tensor:
        """This rank's row of a task, to be filled: ``[N]``."""
        return self.rows[task, : self.size]

    def send(self, task: int) -> None:
        """The row of this task is filled."""
        if self.whole and world_size() > 1:
            self._work.append(dist.all_reduce(self.rows[task], async_op=True))
        elif self._slices is not None:
            self._work.append(reduce_scatter(self._slices[task], self.rows[task], async_op=True))

    def wait(self) -> None:
        """Until every row that was sent has been summed."""
        for work in self._work:
            if work is not None:
                work.wait()
        self._work.clear()

    def mean_rows(self, scale: float) -> Tensor:
        """The rows averaged over the ranks, without the loss scale, ``[T, N]``; only if asked for as a whole."""
        assert self.whole
        self.wait()
        return self.rows[:, : self.size] / (scale * world_size())

    def local_gram(self) -> Tensor:
        """What :func:`sum_gram` turns into the gram of the mean rows: float64 ``[T, T]``."""
        self.wait()
        return gram_of(self.rows if self._slices is None else self._slices)

    def local_grams(self, sizes: Sequence[int]) -> Tensor:
        """The same for ``K`` groups of columns with these widths, apart: float64 ``[K, T, T]``."""
        self.wait()
        held = self.rows if self._slices is None else self._slices
        first = 0 if self._slices is None else dist.get_rank() * held.shape[1]
        grams, begin = [], -first
        for size in sizes:
            end = begin + size
            grams.append(gram_of(held[:, max(begin, 0) : max(end, 0)]))
            begin = end
        return torch.stack(grams)


def sum_gram(gram: Tensor, losses: Tensor, scale: Tensor) -> tuple[Tensor | None, Tensor]:
    """Finish the gram over the ranks, take the loss scale out, and bring the numbers to the CPU in one transfer.

    Shapes: gram float64 ``[..., T, T]`` of this rank's share, losses ``[T]``, scale ``[]`` (the factor in the
    gradients)
    -> gram float64 ``[..., T, T]`` of the mean rows and losses float64 ``[T]``, both on the CPU. With
    a scale of 0 (a loss that is ramped up) there is no gradient to compare, and no gram.
    """
    world, size = world_size(), gram.numel()
    if world == 1 and gram.device.type == "cpu":
        factor = float(scale)
        unscaled = gram if factor == 1 else gram / factor**2 if factor else None
        return unscaled, losses.detach().double()
    packed = torch.cat([gram.reshape(-1), losses.detach().to(gram.device, torch.float64)])
    if world > 1:
        dist.all_reduce(packed)
        packed = torch.cat([packed[:size] / world**2, packed[size:] / world])
    packed = torch.cat([packed, scale.detach().reshape(1).to(packed)]).cpu()
    losses = packed[size:-1]
    if float(packed[-1]) == 0:
        return None, losses
    return packed[:size].view(gram.shape) / packed[-1] ** 2, losses


def parts_gram(parts: Sequence[Sequence[Tensor]], *, disjoint: bool) -> Tensor:
    """This rank's share of a gram of rows in parts, to be finished by :func:`sum_gram`.

    Args:
        parts: per task, the tensors of its row.
        disjoint: the rows of different ranks are about different samples (features), so that local grams add up;
            otherwise about the same parameters, and the rows themselves are summed first.
    """
    if disjoint or world_size() == 1:
        return gram_of_parts(parts)
    flat = torch.stack([torch.cat([tensor.reshape(-1) for tensor in row]) for row in parts])
    exchange = RowExchange(len(flat), flat.shape[1], flat)
    for task, row in enumerate(flat):
        exchange[task].copy_(row)
        exchange.send(task)
    return exchange.local_gram()
