"""From losses to a step: who is shared and who is private. Decided here, for every way in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mtl.balancers.base import Balancer, GramBalancer
from lightning_mtl.checks import bad_argument, listed
from lightning_mtl.engine.collectives import union_over_ranks
from lightning_mtl.engine.features import tensors_of
from lightning_mtl.engine.graph import discover, distinct, reached, reached_beside
from lightning_mtl.types import Root, Step


@dataclass
class Model:
    """What is known of a model beyond the graph of one step.

    Args:
        owner: whom an error names.
        own: its trainable parameters in order of registration; ``None`` in a plain loop, where they are those that the
            losses reach.
        met: parameters found shared before; they stay so in a batch in which only one of their tasks has labels.
    """

    owner: object
    own: Sequence[Tensor] | None = None
    met: list[Tensor] = field(default_factory=list)

    def named(self, parameters: Iterable[Tensor]) -> str:
        """The first few of them, for a message."""
        known = {id(p): n for n, p in self.owner.named_parameters()} if isinstance(self.owner, nn.Module) else {}
        return listed([known.get(id(p), f"one of shape {list(p.shape)}") for p in parameters][:3])


@dataclass
class Owned:
    """Parameters by whom they serve; all lists in order of registration.

    Args:
        shared: reached through the features.
        shared_heads: belong to the heads of several tasks.
        private: all others.
        tied: both in the encoder and in a head.
        roots: where the heads begin, common to all tasks; ``None`` if not known.
    """

    shared: list[Tensor]
    shared_heads: list[Tensor]
    private: list[Tensor]
    tied: list[Tensor] = field(default_factory=list)
    roots: list[Root] | None = None


def found(
    losses: Sequence[Tensor], num_tasks: int, model: Model, features: Any = None, shared: Iterable[Tensor] | None = None
) -> Owned:
    """Who owns what in this step, where it is not declared.

    Args:
        losses: ``T`` or ``2T`` scalars; those of absent tasks have no graph.
        num_tasks: ``T``.
        model: its ``met`` is brought up to date.
        features: what all heads read: shared is what lies behind.
        shared: the shared parameters; without them and features, what at least two tasks reach.

    Raises: ``ValueError`` if features or shared do not fit the graph.
    """
    # Halves of a batch use the same heads: counted per task, not per half.
    whole = list(losses)
    if len(losses) > num_tasks:
        whole = [torch.stack(whole[task::num_tasks]).sum() for task in range(num_tasks)]
    whole = [loss for loss in whole if loss.requires_grad]
    if features is not None:
        return _behind_features(tensors_of(features), whole, model, shared)
    if shared is None:
        return _in_graph(whole, losses[0].device, model)
    chosen = [p for p in shared if p.requires_grad]
    return Owned(chosen, [], _without(reached(whole, model.owner), chosen))


def declared(encoder: nn.Module, heads: Sequence[nn.Module], own: Sequence[Tensor]) -> Owned:
    """For a model with a declared encoder: what is neither in it nor in several heads is private."""
    inside = {id(p) for p in encoder.parameters()}
    times = Counter(id(p) for head in heads for p in head.parameters())
    several = {key for key, count in times.items() if count > 1} - inside
    return Owned(
        [p for p in own if id(p) in inside],
        [p for p in own if id(p) in several],
        [p for p in own if id(p) not in inside | several],
        [p for p in own if id(p) in inside and id(p) in times],
    )


def make_step(
    losses: Sequence[Tensor],
    present: Tensor | None,
    owned: Owned,
    balancer: Balancer,
    *,
    roots: Sequence[Sequence[Root]] | None = None,
    leaves: Sequence[Sequence[Tensor]] | None = None,
    layer: nn.Module | Sequence[Tensor] | None = None,
    modules: Sequence[nn.Module] = (),
    owner: object = "lightning_mtl",
) -> Step:
    """The step, with the layers that the balancer looks at.

    Args:
        losses: ``T`` or ``2T`` scalars.
        present: bool ``[T]``, or ``None`` for all.
        owned: who owns what.
        balancer: what it looks at.
        roots: per loss, where its head begins; by default those that are common to all.
        leaves: per loss, what its head read in their place.
        layer: the last shared layer, as told; by default the module that owns the last shared parameter.
        modules: those of the model, in order of registration.
        owner: whom an error names.

    Raises: ``ValueError`` if the layer is not shared.
    """
    if roots is None and owned.roots is not None:
        roots = [owned.roots] * len(losses)
    at_layer = isinstance(balancer, GramBalancer) and balancer.gram_at == "last_layer"
    per_layer = isinstance(balancer, GramBalancer) and balancer.granularity == "layer"
    last = _parameters_of(layer, modules, owned.shared, owner) if at_layer else None
    layers = None
    if per_layer and modules:
        numbers = {id(p): n for n, module in enumerate(modules) for p in module.parameters(recurse=False)}
        layers = [numbers[id(parameter)] for parameter in (*owned.shared, *owned.shared_heads)]
    return Step(losses, owned.shared, owned.shared_heads, owned.private, roots, leaves, present, last, layers)


def _parameters_of(
    layer: nn.Module | Sequence[Tensor] | None, modules: Sequence[nn.Module], shared: Sequence[Tensor], owner: object
) -> list[Tensor] | None:
    taken = {id(parameter) for parameter in shared}
    told = layer is not None
    if layer is None:
        owns = [m for m in modules if any(id(p) in taken for p in m.parameters(recurse=False))]
        layer = owns[-1] if owns else None
    if not isinstance(layer, nn.Module):
        return None if layer is None else list(layer)
    parameters: list[Tensor] = [p for p in layer.parameters() if p.requires_grad]
    if told and not {id(p) for p in parameters} <= taken:
        raise bad_argument(
            owner,
            "last_layer",
            "be a part of what the tasks share",
            type(layer).__name__,
            "Pass the last module that all heads read from",
        )
    return parameters


def _behind_features(
    tensors: list[Tensor], losses: Sequence[Tensor], model: Model, told: Iterable[Tensor] | None
) -> Owned:
    roots, owner = distinct(tensors, model.owner), model.owner
    everything = reached(losses, owner)
    own = everything if model.own is None else model.own
    if not roots:
        _check_nothing_to_share(everything, losses, model)
    behind = reached(roots, owner)
    beside = _among(reached_beside(losses, roots, owner), behind)
    if beside:
        raise bad_argument(
            owner,
            "features",
            "hold everything that the heads read of the shared part",
            f"losses that also reach {model.named(beside)} beside them",
            "Add the other tensors, as in features=(z, skip), or leave features out",
        )
    shared = _among(own, behind) if model.own is not None else behind
    if told is not None:
        chosen = [p for p in told if p.requires_grad]
        if different := {id(p) for p in chosen} ^ {id(p) for p in behind}:
            raise bad_argument(
                owner,
                "shared",
                "be all parameters that the features depend on",
                f"a list that differs from them by {len(different)}",
                "Leave out shared= or features=",
            )
        shared = chosen
    return Owned(shared, [], _without(own, shared), roots=list(roots))


def _check_nothing_to_share(everything: Sequence[Tensor], losses: Sequence[Tensor], model: Model) -> None:
    """Features without a gradient are right where the encoder is frozen; else somebody detached them."""
    idle = _without(model.own, everything) if model.own is not None else []
    meet = discover(losses, model.owner).shared
    if model.own is not None and not idle and not meet:
        return
    got = "tensors without a gradient"
    if idle or meet:
        got += f", while no loss reaches {model.named(idle)}" if idle else f", while several reach {model.named(meet)}"
    raise bad_argument(
        model.owner,
        "features",
        "require grad",
        got,
        "Pass the encoder's output as the heads read it, without detach() or no_grad(); for a frozen encoder leave "
        "features out",
    )


def _in_graph(losses: Sequence[Tensor], device: torch.device, model: Model) -> Owned:
    """What at least two losses reach in this step's graph, on any rank, or did in an earlier one."""
    reach = discover(losses, model.owner)
    if model.own is None:
        return Owned(reach.shared, [], reach.private, roots=list(reach.edges) or None)
    own = model.own
    here = {id(parameter) for parameter in reach.shared}
    before = {id(parameter) for parameter in model.met}
    mine = [id(parameter) in here for parameter in own]
    wanted = [flag or id(parameter) in before for flag, parameter in zip(mine, own, strict=True)]
    flags = union_over_ranks([*wanted, *(not flag for flag in mine), not reach.edges], device)
    some, not_all, cut_fails = flags[: len(own)], flags[len(own) : -1], flags[-1]
    shared = [parameter for parameter, flag in zip(own, some, strict=True) if flag]
    # What only other ranks share (a task has no labels here) does not lie behind this rank's edges; and all ranks
    # must go one way, because each has its own collectives.
    edges = [] if cut_fails or any(a and b for a, b in zip(some, not_all, strict=True)) else reach.edges
    model.met = shared
    return Owned(shared, [], _without(own, shared), roots=list(edges) or None)


def _among(parameters: Iterable[Tensor], chosen: Iterable[Tensor]) -> list[Tensor]:
    ids = {id(parameter) for parameter in chosen}
    return [parameter for parameter in parameters if id(parameter) in ids]


def _without(parameters: Iterable[Tensor], chosen: Iterable[Tensor]) -> list[Tensor]:
    ids = {id(parameter) for parameter in chosen}
    return [parameter for parameter in parameters if id(parameter) not in ids]
