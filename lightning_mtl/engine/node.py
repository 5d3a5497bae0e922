"""The one custom autograd node: a scalar whose backward hands back gradients made by a function."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_mtl.checks import bad_argument
from lightning_mtl.engine.collectives import world_size

#: (the gradient that arrives at the loss, whether the graph of the losses must survive) -> gradients of the inputs.
Solve = Callable[[Tensor, bool], Sequence[Tensor | None]]


class _Deposit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, solve: Solve, value: Tensor, tables: Collection[int], *inputs: Tensor) -> Tensor:
        ctx.solve, ctx.inputs, ctx.device_type, ctx.keep = solve, inputs, value.device.type, True
        ctx.tables = tables
        return value.clone()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise bad_argument(
                "lightning_mtl",
                "create_graph",
                "be False where the gradients of tasks are compared: they come without a graph of their own",
                True,
                "Use a balancer of losses, such as fixed or uncertainty, or take the gradients of single losses",
                RuntimeError,
            )
        if ctx.solve is None:
            raise bad_argument(
                "lightning_mtl",
                "loss",
                "go backward once",
                "a second backward through the same balanced loss",
                "Compute the losses again",
                RuntimeError,
            )
        # Dropped first: whatever happens, no graph tensor outlives the backward.
        solve, inputs, ctx.solve, ctx.inputs = ctx.solve, ctx.inputs, None, None
        keep = ctx.keep or torch._C._autograd._get_current_graph_task_keep_graph()
        if torch.is_autocast_enabled(ctx.device_type):
            with torch.autocast(ctx.device_type, enabled=False):
                grads = list(solve(scale, keep))
        else:  # as nearly always; entering a context takes its time
            grads = list(solve(scale, keep))
        if world_size() > 1:
            # DDP waits for a gradient of every parameter; on one process None lets the optimizer skip it.
            grads = [_zeros(tensor, ctx.tables) if g is None else g for g, tensor in zip(grads, inputs, strict=True)]
        return (None, None, None, *map(_like, grads, inputs))


def _zeros(tensor: Tensor, tables: Collection[int]) -> Tensor:
    if id(tensor) not in tables:
        return torch.zeros_like(tensor)
    nothing = torch.zeros(1, 0, dtype=torch.long, device=tensor.device)
    return torch.sparse_coo_tensor(
        nothing, tensor.new_zeros((0, *tensor.shape[1:])), tensor.shape, is_coalesced=True, check_invariants=False
    )


def _like(grad: Tensor | None, tensor: Tensor) -> Tensor | None:
    """A gradient as it is handed to autograd."""
    if grad is None:
        return None
    if grad.is_sparse or grad.stride() == tensor.stride():
        return grad
    # What autograd takes for equal strides, DDP compares: those of dimensions of size 1 too.
    same = zip(grad.stride(), tensor.stride(), tensor.shape, strict=True)
    return grad.as_strided(tensor.shape, tensor.stride()) if all(a == b or n == 1 for a, b, n in same) else grad


def free_graph(loss: Tensor) -> None:
    """Let a balanced loss free the graph of its losses as its backward runs, as any backward does.

    Without this the graph lives as long as somebody holds a loss or a feature, because a term that was added to the
    balanced loss may need it again. Nothing happens if there is such a term: if the loss depends on anything else than
    one balanced loss. ``retain_graph=True`` keeps it in any case.
    """
    nodes: list[Any] = []
    stack: list[Any] = [loss.grad_fn]
    while stack:
        node = stack.pop()
        if getattr(type(node), "_forward_cls", None) is _Deposit:
            nodes.append(node)
        elif node is None or hasattr(node, "variable"):
            if node is not None:
                return
        else:
            stack += [child for child, _ in node.next_functions]
    if len(nodes) == 1:
        nodes[0].keep = False


def deposit(value: Tensor, inputs: Sequence[Tensor], solve: Solve, tables: Collection[int] = ()) -> Tensor:
    """A scalar equal to ``value`` whose gradients with respect to ``inputs`` are ``solve(scale)``.

    ``scale`` is the gradient that arrives at the scalar: a loss scale, divided by the number of accumulated batches,
    whatever Lightning or a user multiplied the loss with. The hooks of the inputs, gradient accumulation and the
    reducer of DDP see an ordinary backward.

    Args:
        value: what the scalar shows, detached.
        inputs: leaves or inner tensors; through inner tensors autograd goes on by itself.
        solve: called once, in the backward; ``None`` for an input without a gradient.
        tables: the ``id`` of each input for which nothing is a sparse gradient.

    Raises: ``RuntimeError`` on a second backward.
    """
    result: Tensor = _Deposit.apply(solve, value, tables, *inputs)
    return result
