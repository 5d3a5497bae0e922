"""From losses to a step: who is shared and who is private. Decided here, for every way in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mtl.balancers.base import Balancer, GramBalancer
from lightning_mtl.checks import bad_argument
from lightning_mtl.engine.collectives import union_over_ranks, world_size
from lightning_mtl.engine.compiled import is_compiled
from lightning_mtl.engine.features import given_tensors
from lightning_mtl.engine.graph import discover, reached, reached_beside, siblings, upstream
from lightning_mtl.engine.last_layer import find_layer, last_layer
from lightning_mtl.engine.model import Model
from lightning_mtl.types import Step


@dataclass
class Owned:
    """Parameters by whom they serve; all lists in order of registration.

    Args:
        shared: reached through the features.
        shared_heads: belong to the heads of several tasks.
        private: all others.
        tied: both in the encoder and in a head.
        roots: where the heads begin, common to all tasks; ``None`` if not known.
        between: behind a feature that is computed from other features, but not behind those.
    """

    shared: list[Tensor] = field(default_factory=list)
    shared_heads: list[Tensor] = field(default_factory=list)
    private: list[Tensor] = field(default_factory=list)
    tied: list[Tensor] = field(default_factory=list)
    roots: list[Tensor] | None = None
    between: list[Tensor] = field(default_factory=list)


def found(
    losses: Sequence[Tensor],
    num_tasks: int,
    model: Model,
    features: Any = None,
    shared: Iterable[Tensor] | str | None = None,
) -> Owned:
    """Who owns what in this step, where it is not declared.

    Args:
        losses: ``T`` or ``2T`` scalars; those of absent tasks have no graph.
        num_tasks: ``T``.
        model: its ``met`` is brought up to date.
        features: what all heads read: shared is what lies behind.
        shared: the shared parameters, or "all"; without them and features, what at least two tasks reach.

    Raises: ``ValueError`` if features or shared do not fit the graph.
    """
    # Halves of a batch use the same heads: counted per task, not per half.
    whole = list(losses)
    if len(losses) > num_tasks:
        whole = [torch.stack(whole[task::num_tasks]).sum() for task in range(num_tasks)]
    whole = [loss for loss in whole if loss.requires_grad]
    chosen = None if shared is None else _chosen(shared, whole, model)
    if features is not None:
        return _behind_features(
            given_tensors(features, model.owner), whole, model, chosen, complete=len(whole) == num_tasks
        )
    if chosen is None:
        if siblings([[half for half in losses[task::num_tasks] if not is_compiled(half)] for task in range(num_tasks)]):
            raise bad_argument(
                model.owner,
                "losses",
                "be apart in the graph where it shall tell who is shared",
                "several outputs of one node (a criterion, a compiled model), or parts of one tensor (stack, cat)",
                "Pass features=, the tensors that all heads read, or shared=, the shared parameters; or compute each "
                "loss from its own head's output, and compile encoder and heads apart (lightning_mtl.boundary)",
            )
        return _in_graph(whole, losses[0].device, model, complete=len(whole) == num_tasks)
    own = reached(whole, model.owner) if model.own is None else model.own
    return Owned(chosen, private=_without(own, chosen))


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
    model: Model,
    *,
    level: str = "parameters",
    roots: Sequence[Sequence[Tensor]] | None = None,
    leaves: Sequence[Sequence[Tensor]] | None = None,
    layer: nn.Module | Sequence[Tensor] | None = None,
) -> Step:
    """The step, with the layers that the balancer looks at.

    Args:
        losses: ``T`` or ``2T`` scalars.
        present: bool ``[T]``, or ``None`` for all.
        owned: who owns what.
        balancer: what it looks at.
        model: the model.
        level: at which tensors the rows are taken.
        roots: per loss, where its head begins; by default those that are common to all.
        leaves: per loss, what its head read in their place.
        layer: the last shared layer, as told; by default it is found.

    Raises: ``ValueError`` if a last layer is needed and there is none that every task reaches.
    """
    if roots is None and owned.roots is not None:
        roots = [owned.roots] * len(losses)
    beside = [*owned.shared_heads, *owned.between]
    step = Step(losses, owned.shared, beside, owned.private, roots, leaves, present)
    step.tables = model.tables() if world_size() > 1 else step.tables
    at_layer = isinstance(balancer, GramBalancer) and balancer.gram_at == "last_layer" and level == "parameters"
    if at_layer and owned.shared:
        every = [*owned.shared, *owned.between]
        step.last_layer = last_layer(step, every, model, layer)
        step.find_layer = partial(find_layer, shared=every, model=model, told=layer)
    if isinstance(balancer, GramBalancer) and balancer.granularity == "layer" and model.modules:
        numbers = {id(p): n for n, module in enumerate(model.modules) for p in module.parameters(recurse=False)}
        # What no module owns is a layer of its own.
        step.layers = [numbers.get(id(p), -place) for place, p in enumerate((*owned.shared, *beside), start=1)]
    return step


def _chosen(shared: Iterable[Tensor] | str, losses: Sequence[Tensor], model: Model) -> list[Tensor]:
    """The shared parameters as told."""
    own = reached(losses, model.owner) if model.own is None else model.own
    if shared == "all":
        return list(own)
    told = list(shared) if isinstance(shared, Iterable) and not isinstance(shared, str | Tensor) else []
    if not told or not all(isinstance(parameter, Tensor) for parameter in told):
        raise bad_argument(
            model.owner, "shared", 'be "all" or an iterable of parameters', _brief(shared), "Pass encoder.parameters()"
        )
    told = list({id(p): p for p in told if p.requires_grad}.values())
    strange = _without(told, own)
    if strange and (model.own is not None or len(strange) == len(told)):
        raise bad_argument(
            model.owner,
            "shared",
            "be parameters that are trained here",
            f"{len(strange)} others, one of shape {list(strange[0].shape)}",
            "Leave them out, or register them with the module",
        )
    return told


def _behind_features(
    features: list[Tensor], losses: Sequence[Tensor], model: Model, chosen: list[Tensor] | None, *, complete: bool
) -> Owned:
    owner = model.owner
    everything = reached(losses, owner)
    if not features:
        _check_nothing_to_share(everything, losses, model, complete=complete)
    behind = reached(features, owner)
    own = everything if model.own is None else model.own
    if chosen is not None and {id(p) for p in chosen} != {id(p) for p in behind}:
        return Owned(chosen, private=_without(own, chosen))
    beside = _among(reached_beside(losses, features, owner), behind)
    if beside:
        raise bad_argument(
            owner,
            "features",
            "hold everything that the heads read of the shared part",
            f"losses that also reach {model.named(beside)} beside them",
            "Add the other tensors, as in features=(z, skip), or leave features out",
        )
    # The same on every rank, whichever losses there are.
    shared = behind if model.own is None else _among(own, behind)
    private = _without(own, shared)
    roots = upstream(features, owner) if features else []
    inside = behind if len(roots) == len(features) else reached(roots, owner)
    # The graph is cut at the features from which others are computed, unless another way leads around them, or one is
    # a parameter, which has nothing behind it. What lies between features is shared, too.
    around = _among(reached_beside(features, roots, owner), inside)
    if around or (len(roots) < len(features) and any(root.is_leaf for root in roots)):
        return Owned(shared, private=private)
    return Owned(_among(shared, inside), private=private, roots=list(roots), between=_without(shared, inside))


def _check_nothing_to_share(
    everything: Sequence[Tensor], losses: Sequence[Tensor], model: Model, *, complete: bool
) -> None:
    """Features without a gradient are right where the encoder is frozen; else somebody detached them."""
    # The head of an absent task is idle too.
    idle = _without(model.own, everything) if model.own is not None and complete else []
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
        "features out, at level 'parameters', or freeze what no loss reaches too",
    )


def _in_graph(losses: Sequence[Tensor], device: torch.device, model: Model, *, complete: bool) -> Owned:
    """What at least two losses reach in this step's graph, on any rank; or did before, where a task is absent."""
    reach = discover(losses, model.owner)
    own = [*reach.shared, *reach.private] if model.own is None else model.own
    here, before = ({id(parameter) for parameter in each} for each in (reach.shared, model.met))
    flags = [*(id(p) in here for p in own), *(id(p) in before for p in own), not complete]
    if model.own is not None:
        flags = union_over_ranks(flags, device)
    now, earlier, absent = flags[: len(own)], flags[len(own) : -1], flags[-1]
    model.met = [p for p, a, b in zip(own, now, earlier, strict=True) if a or (b and absent)]
    return Owned(model.met, private=_without(own, model.met))


def _brief(value: object) -> str:
    return repr(value) if isinstance(value, str) else type(value).__name__


def _among(parameters: Iterable[Tensor], chosen: Iterable[Tensor]) -> list[Tensor]:
    ids = {id(parameter) for parameter in chosen}
    return [parameter for parameter in parameters if id(parameter) in ids]


def _without(parameters: Iterable[Tensor], chosen: Iterable[Tensor]) -> list[Tensor]:
    ids = {id(parameter) for parameter in chosen}
    return [parameter for parameter in parameters if id(parameter) not in ids]
