"""The engine for Fabric and plain loops."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_mtl.balancers.base import Balancer, LossBalancer
from lightning_mtl.checks import bad_argument, check_task_loss, listed
from lightning_mtl.engine.cut import tensors_of
from lightning_mtl.engine.gather import on_host, rescale_to_global, shares
from lightning_mtl.engine.shared import discover, distinct, reached, reached_beside
from lightning_mtl.engine.solver import balanced_loss
from lightning_mtl.types import Balance, Step

_WHO = "lightning_mtl.backward"


def backward(
    losses: Mapping[str, Tensor | tuple[Tensor, Tensor] | None],
    balancer: Balancer,
    features: Any = None,
    shared: Iterable[Tensor] | None = None,
    level: str = "parameters",
    *,
    labelled: Mapping[str, Tensor | int] | None = None,
    weight_heads: bool = False,
    last_layer: Iterable[Tensor] | None = None,
    backward_fn: Callable[[Tensor], Any] | None = None,
) -> Balance:
    """Add balanced gradients to ``.grad``, as ``sum(losses).backward()`` would add plain ones.

    Args:
        losses: task name -> scalar, always in the same order; ``T`` entries. ``None`` for a task without any label in
            this batch; with several processes then pass ``labelled`` on all of them, and ``features`` or ``shared``.
            For a balancer that compares two independent samples a pair of scalars, one of each.
        balancer: built once, before the loop; its parameters, if any, belong into the optimizer.
        features: the tensors that all heads read, in any nested structure; what lies behind them is shared.
        shared: the shared parameters; without it and ``features`` those that at least two losses reach.
        level: "parameters" (exact) or "features" (rows are gradients at the features, which must be given).
        labelled: task name -> number of labelled samples that this process's loss is the mean of; the loss then is the
            mean over the labelled samples of all processes.
        weight_heads: whether the weights apply to private parameters too.
        last_layer: parameters of the last shared layer, for a balancer that takes its gram there.
        backward_fn: called with the balanced loss in place of ``loss.backward()``: ``fabric.backward``, or
            ``lambda loss: scaler.scale(loss).backward()``.

    Returns: what the balancer did.
    Raises: ``ValueError`` if a loss is not a scalar with a gradient, the balancer is for another number of tasks,
    features carry no gradient, the graph hides its parameters (reentrant checkpoint), or it was compiled before
    ``allow_several_backwards()``.

    Example:
        >>> import torch, lightning_mtl
        >>> from lightning_mtl.balancers import PCGrad
        >>> encoder, heads = torch.nn.Linear(2, 3), {"a": torch.nn.Linear(3, 1), "b": torch.nn.Linear(3, 1)}
        >>> balancer, features = PCGrad(2), encoder(torch.ones(4, 2))
        >>> losses = {name: head(features).square().mean() for name, head in heads.items()}
        >>> balance = lightning_mtl.backward(losses, balancer, features=features)
        >>> balance.weights.shape, encoder.weight.grad.shape
        (torch.Size([2]), torch.Size([3, 2]))
    """
    names = list(losses)
    if not isinstance(balancer, Balancer):
        raise bad_argument(
            _WHO,
            "balancer",
            "be a Balancer",
            repr(balancer),
            "Build it once with lightning_mtl.balancers.load(name, num_tasks=T), so that its state lives on",
            TypeError,
        )
    if len(names) != balancer.num_tasks or (balancer.names is not None and tuple(names) != balancer.names):
        expected = listed(balancer.names) if balancer.names else f"{balancer.num_tasks} tasks"
        raise bad_argument(_WHO, "losses", f"hold {expected} in this order", listed(names), "Pass one loss per task")
    if balancer.names is None:
        balancer.bind(names)
    values, present = _global(losses, labelled or {})
    several = not isinstance(balancer, LossBalancer)
    done: list[Balance] = []
    step = Step(values, [], [], [], None)
    if several:
        whole = [torch.stack(values[task :: len(names)]).sum() for task in range(len(names))]
        step = _step([loss for loss in whole if loss.requires_grad], features, shared, last_layer)
        roots = [step.roots[0]] * len(values) if step.roots else None
        step = replace(step, losses=values, roots=roots)
    step = replace(step, present=present)
    loss = balanced_loss(step, balancer, names, level=level, weight_heads=weight_heads, report=done.append)
    (backward_fn or torch.Tensor.backward)(loss)
    if done:
        return done[0]
    # Nothing is shared (a frozen encoder): every task went backward with weight 1.
    sums = torch.stack([loss.detach() for loss in values]).view(-1, len(names)).sum(0)
    return Balance(tuple(names), sums, torch.ones(len(names)), None, present)


def _global(
    losses: Mapping[str, Tensor | tuple[Tensor, Tensor] | None], labelled: Mapping[str, Tensor | int]
) -> tuple[list[Tensor], Tensor | None]:
    """The losses as shares of the mean over all ranks' labelled samples, and who is present."""
    pairs = {name: shares(loss) for name, loss in losses.items()}
    given = (part for pair in pairs.values() for part in pair if isinstance(part, Tensor))
    device = next((part.device for part in given), torch.device("cpu"))
    known = on_host(labelled)
    values: list[tuple[Tensor, ...]] = []
    counts: list[Tensor | int] = []
    for name, loss in losses.items():
        absent = loss is None or known.get(name, 1) == 0
        if absent:
            values.append((torch.zeros((), device=device),) * max(len(pair) for pair in pairs.values()))
        else:
            for part in pairs[name]:
                check_task_loss(part, name, _WHO)
            values.append(pairs[name])
        counts.append(0 if absent else known.get(name, 1))
    # First all first halves, then all second ones.
    flat = [part for parts in zip(*values, strict=True) for part in parts]
    if labelled or any(loss is None for loss in losses.values()):
        return rescale_to_global(flat, counts)
    return flat, None


def _step(
    losses: list[Tensor], features: Any, shared: Iterable[Tensor] | None, last_layer: Iterable[Tensor] | None
) -> Step:
    last = list(last_layer) if last_layer is not None else None
    if features is None and shared is None:
        found = discover(losses, _WHO)
        roots = [found.edges] * len(losses) if found.edges else None
        return Step(losses, found.shared, [], found.private, roots, last_layer=last)
    roots_of_all: list[Tensor] | None = None
    if features is not None:
        roots_of_all = distinct(tensors_of(features), _WHO)
        if not roots_of_all:
            raise bad_argument(
                _WHO,
                "features",
                "require grad",
                "tensors without a gradient",
                "Pass the encoder's output as the heads read it, without detach(); for a frozen encoder leave it out",
            )
    everything = reached(losses, _WHO)
    chosen = [p for p in shared if p.requires_grad] if shared is not None else reached(roots_of_all or [], _WHO)
    taken = {id(parameter) for parameter in chosen}
    private = [leaf for leaf in everything if id(leaf) not in taken]
    if roots_of_all is not None and any(id(leaf) in taken for leaf in reached_beside(losses, roots_of_all, _WHO)):
        raise bad_argument(
            _WHO,
            "features",
            "hold everything that the heads read of the shared part",
            "losses that also reach it beside the features",
            "Add the other tensors, as in features=(z, skip), or leave features out",
        )
    if roots_of_all is not None and shared is not None:
        behind = {id(leaf) for leaf in reached(roots_of_all, _WHO)}
        if different := taken ^ behind:
            raise bad_argument(
                _WHO,
                "shared",
                "be all parameters that the features depend on",
                f"a list that differs from them by {len(different)}",
                "Leave out shared= or features=",
            )
    roots_per_task = None if roots_of_all is None else [roots_of_all] * len(losses)
    return Step(losses, chosen, [], private, roots_per_task, last_layer=last)
