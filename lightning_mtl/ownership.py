"""Which parameters the tasks share: from the declaration of a model, or from the graph of a step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from lightning_mtl.checks import bad_argument, listed
from lightning_mtl.engine import discover, distinct, reached, reached_beside, union_over_ranks
from lightning_mtl.types import Root


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
    tied: list[Tensor]
    roots: list[Root] | None = None


def declared(encoder: nn.Module, heads: Sequence[nn.Module], own: Sequence[Tensor]) -> Owned:
    """For a model with a declared encoder: what is neither in it nor in several heads is private."""
    encoders = {id(p) for p in encoder.parameters()}
    times: dict[int, int] = {}
    for head in heads:
        for parameter in head.parameters():
            times[id(parameter)] = times.get(id(parameter), 0) + 1
    shared_heads = {key for key, count in times.items() if count > 1} - encoders
    return Owned(
        [p for p in own if id(p) in encoders],
        [p for p in own if id(p) in shared_heads],
        [p for p in own if id(p) not in encoders | shared_heads],
        [p for p in own if id(p) in encoders and id(p) in times],
    )


def behind_features(
    roots: list[Tensor], losses: Sequence[Tensor], model: nn.Module, own: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Shared and private parameters where the features are given.

    Raises: ``ValueError`` if the losses reach the shared parameters by another way too, if one of the features is
    computed from another, or if they carry no gradient while parameters are left that no loss reaches.
    """
    distinct(roots, model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    behind = {id(leaf) for leaf in reached(roots, model)}
    if not roots:
        touched = {id(leaf) for leaf in reached(losses, model)}
        idle = [names[id(p)] for p in own if id(p) not in touched]
        meet = [names.get(id(leaf), "?") for leaf in discover(losses, model).shared]
        if idle or meet:
            found = f"no loss reaches {listed(idle[:3])}" if idle else f"several losses reach {listed(meet[:3])}"
            raise bad_argument(
                model,
                "features",
                "require grad",
                f"tensors without a gradient, while {found}",
                "Pass the encoder's output as the heads read it, without detach() or no_grad(), or leave features out",
            )
    beside = [names.get(id(leaf), "?") for leaf in reached_beside(losses, roots, model) if id(leaf) in behind]
    if beside:
        raise bad_argument(
            model,
            "features",
            "hold everything that the heads read of the encoder",
            f"losses that also reach {listed(beside[:3])} beside them",
            "Add the other tensors, as in features=(z, skip), or leave features out",
        )
    return [p for p in own if id(p) in behind], [p for p in own if id(p) not in behind]


def in_graph(losses: Sequence[Tensor], model: nn.Module, own: Sequence[Tensor], met: Sequence[Tensor] = ()) -> Owned:
    """Who is shared: what at least two losses reach in this step's graph, on any rank, or did in an earlier one.

    Args:
        losses: ``T`` scalars; those of absent tasks have no graph.
        model: whom an error names.
        own: the parameters in question.
        met: those found shared before; they stay so in a batch in which only one of their tasks has labels.
    """
    found = discover([loss for loss in losses if loss.requires_grad], model)
    here = {id(parameter) for parameter in found.shared}
    before = {id(parameter) for parameter in met}
    mine = [id(parameter) in here for parameter in own]
    wanted = [flag or id(parameter) in before for flag, parameter in zip(mine, own, strict=True)]
    flags = union_over_ranks([*wanted, *(not flag for flag in mine), not found.edges], losses[0].device)
    some, not_all, cut_fails = flags[: len(own)], flags[len(own) : -1], flags[-1]
    shared = [parameter for parameter, flag in zip(own, some, strict=True) if flag]
    # What only other ranks share (a task has no labels here) does not lie behind this rank's edges; and all ranks
    # must go one way, because each has its own collectives.
    edges = [] if cut_fails or any(a and b for a, b in zip(some, not_all, strict=True)) else found.edges
    taken = {id(parameter) for parameter in shared}
    private = [parameter for parameter in own if id(parameter) not in taken]
    return Owned(shared, [], private, [], list(edges) or None)


def last_layer(modules: Iterable[nn.Module], shared: Sequence[Tensor]) -> nn.Module | None:
    """The module that owns the last shared parameter, in order of registration."""
    ids = {id(parameter) for parameter in shared}
    layer: nn.Module | None = None
    for module in modules:
        if any(id(parameter) in ids for parameter in module.parameters(recurse=False)):
            layer = module
    return layer
