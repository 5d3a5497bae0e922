"""Who is shared: found by walking the graph from the losses."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from lightning_mtl.checks import bad_argument


@dataclass
class Reach:
    """What the losses reach.

    Args:
        shared: leaves reached by at least two losses, in order of discovery.
        private: leaves reached by exactly one.
        edges: where the graphs of the losses meet: the ends of edges from a node that one loss reaches into an
            inner node that several reach. Empty if no such cut separates all losses (see ``discover``).
    """

    shared: list[Tensor]
    private: list[Tensor]
    edges: list[GradientEdge]


def reached(tensors: Sequence[Tensor], owner: object = "lightning_mtl") -> list[Tensor]:
    """The leaves (parameters) that the tensors' graphs end in, in order of discovery."""
    leaves: dict[int, Tensor] = {}
    for node in _walk([t.grad_fn for t in tensors if t.grad_fn is not None], owner):
        if hasattr(node, "variable"):
            leaves.setdefault(id(node.variable), node.variable)
    for tensor in tensors:
        if tensor.is_leaf and tensor.requires_grad:
            leaves.setdefault(id(tensor), tensor)
    return list(leaves.values())


def reached_beside(
    losses: Sequence[Tensor], features: Sequence[Tensor], owner: object = "lightning_mtl"
) -> list[Tensor]:
    """The leaves that the losses reach by a way that does not pass the features."""
    stop = {feature.grad_fn for feature in features if feature.grad_fn is not None}
    nodes = _walk([loss.grad_fn for loss in losses if loss.grad_fn is not None], owner, stop)
    given = {id(feature) for feature in features}  # a parameter may itself be a feature
    return [node.variable for node in nodes if hasattr(node, "variable") and id(node.variable) not in given]


def distinct(features: Sequence[Tensor], owner: object = "lightning_mtl") -> list[Tensor]:
    """The features, each tensor once.

    Raises: ``ValueError`` if one is computed from another: a gradient would then arrive at the first by two ways.
    """
    nodes = {feature.grad_fn for feature in features if feature.grad_fn is not None}
    behind = _walk([child for node in nodes for child, _ in node.next_functions], owner)
    leaves = {id(feature) for feature in features if feature.is_leaf}
    if nodes & behind.keys() or any(id(getattr(node, "variable", None)) in leaves for node in behind):
        raise bad_argument(
            owner,
            "features",
            "be independent of each other",
            "a tensor that is computed from another one of them",
            "Leave features out, so that what is shared is found in the graph, or use MultiTaskModule",
        )
    return list({id(feature): feature for feature in features}.values())


def discover(losses: Sequence[Tensor], owner: object = "lightning_mtl") -> Reach:
    """Find the shared leaves, the private ones, and the edges at which the losses' graphs meet.

    The edges are returned only if no edge lies upstream of another and every loss comes by one of them; then
    ``d loss / d edges`` followed by ``d edges / d shared`` is the whole gradient.

    Raises: ``ValueError`` if a reentrant checkpoint hides part of the graph.
    """
    visited = [_walk([loss.grad_fn], owner) if loss.grad_fn is not None else {} for loss in losses]
    count: dict[Node, int] = {}
    for nodes in visited:
        for node in nodes:
            count[node] = count.get(node, 0) + 1
    shared: dict[int, Tensor] = {}
    private: dict[int, Tensor] = {}
    for node, times in count.items():
        if hasattr(node, "variable"):
            (shared if times > 1 else private)[id(node.variable)] = node.variable
    edges: dict[tuple[Node, int], GradientEdge] = {}
    for node, times in count.items():
        if times == 1:
            for child, index in node.next_functions:
                if child is not None and count[child] > 1 and not hasattr(child, "variable"):
                    edges[child, index] = GradientEdge(child, index)
    if not _separates(edges, shared, visited, count, owner):
        edges = {}
    return Reach(list(shared.values()), list(private.values()), list(edges.values()))


def _separates(
    edges: dict[tuple[Node, int], GradientEdge],
    shared: dict[int, Tensor],
    visited: Sequence[dict[Node, None]],
    count: dict[Node, int],
    owner: object,
) -> bool:
    """Whether all that the losses share lies behind the edges, and no edge lies behind another."""
    if not edges:
        return False
    starts = {node for node, _ in edges}
    below = _walk([child for node in starts for child, _ in node.next_functions if child is not None], owner)
    if starts & below.keys():
        return False
    behind = starts | below.keys()
    # A shared node in front of every edge: one loss is a part of another (a cascade), or a head is shared directly.
    return all(times == 1 or node in behind for node, times in count.items())


def _walk(roots: Sequence[Node | None], owner: object, stop: Set[Node] = frozenset()) -> dict[Node, None]:
    """All nodes from the roots on, in depth-first order, without those in ``stop`` and what lies behind them only."""
    seen: dict[Node, None] = {}
    stack: list[Any] = [root for root in reversed(roots) if root is not None]
    while stack:
        node = stack.pop()
        if node in seen or node in stop:
            continue
        seen[node] = None
        if type(node).__name__ == "_DDPSinkBackward":
            raise bad_argument(
                owner,
                "losses",
                "be computed from outputs whose graphs are apart",
                "outputs that DDP joined (find_unused_parameters or static_graph)",
                "Leave both out, or return the losses' inputs as features and pass features=",
            )
        if type(node).__name__ == "CheckpointFunctionBackward":
            raise bad_argument(
                owner,
                "losses",
                "have a graph that can be walked",
                "a reentrant checkpoint, which hides the parameters behind it",
                "Call torch.utils.checkpoint.checkpoint(..., use_reentrant=False)",
            )
        stack.extend(child for child, _ in reversed(node.next_functions) if child is not None)
    return seen
