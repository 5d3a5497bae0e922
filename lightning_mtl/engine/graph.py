"""Walking autograd graphs: what is reached, who is shared, and which features are a cut."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from lightning_mtl.checks import bad_argument

Edge = tuple[Node | None, int]


@dataclass
class Reach:
    """What the losses reach.

    Args:
        shared: leaves reached by at least two losses, in order of discovery.
        private: leaves reached by exactly one.
    """

    shared: list[Tensor]
    private: list[Tensor]


def reached(tensors: Sequence[Tensor], owner: object = "lightning_mtl") -> list[Tensor]:
    """The leaves (parameters) that the tensors' graphs end in, in order of discovery."""
    return list(_leaves(tensors, owner).values())


def read_sparsely(tensors: Sequence[Tensor], owner: object = "lightning_mtl") -> frozenset[int]:
    """The ``id`` of each leaf of which an embedding gives sparse gradients."""
    nodes: list[Any] = [n for n in _walk(list(map(_edge, tensors)), owner) if type(n).__name__.startswith("Embedding")]
    tables = [node.next_functions[0][0] for node in nodes if getattr(node, "_saved_sparse", False)]
    return frozenset(id(table.variable) for table in tables if hasattr(table, "variable"))


def reached_beside(
    losses: Sequence[Tensor], features: Sequence[Tensor], owner: object = "lightning_mtl"
) -> list[Tensor]:
    """The leaves that the losses reach by a way that does not pass the features.

    Another output of the node that made a feature is another way.
    """
    return list(_leaves(losses, owner, {_edge(feature) for feature in features}).values())


def upstream(features: Sequence[Tensor], owner: object = "lightning_mtl") -> list[Tensor]:
    """The features that are computed from no other one, each once.

    Of a tensor and what is computed from it, the first alone is where the heads begin: a gradient would arrive there by
    two ways.
    """
    distinct = list({id(feature): feature for feature in features}.values())
    if len(distinct) == 1:
        return distinct
    edges = {_edge(feature) for feature in distinct}

    def depends(feature: Tensor) -> bool:
        crossed: set[Edge] = set()
        node = _edge(feature)[0]
        _walk([] if node is None else node.next_functions, owner, crossed=crossed)
        return bool(edges & crossed)

    return [feature for feature in distinct if not depends(feature)]


def discover(losses: Sequence[Tensor], owner: object = "lightning_mtl") -> Reach:
    """Find the shared leaves and the private ones.

    Raises: ``ValueError`` if a reentrant checkpoint hides part of the graph.
    """
    count = Counter(node for loss in losses for node in _walk([_edge(loss)], owner))
    shared: dict[int, Tensor] = {}
    private: dict[int, Tensor] = {}
    for node, times in count.items():
        if hasattr(node, "variable"):
            (shared if times > 1 else private)[id(node.variable)] = node.variable
    return Reach(list(shared.values()), list(private.values()))


def siblings(losses: Sequence[Sequence[Tensor]]) -> bool:
    """Whether two tasks read different scalars of one node: all that lies behind it is then reached by both.

    Looked at is the part of the graph that holds scalars, and vectors of which one element was picked: several outputs
    of a criterion, or a loss that was stacked with those of the other tasks and taken out again.
    """
    read: dict[Node, list[set[Any]]] = defaultdict(lambda: [set() for _ in losses])
    for task, parts in enumerate(losses):
        stack: list[tuple[Any, int, int | None]] = [(*_edge(loss), None) for loss in parts]
        seen = set()
        while stack:
            node, output, picked = edge = stack.pop()
            if node is None or edge in seen or hasattr(node, "variable"):
                continue
            seen.add(edge)
            kind, sizes = type(node).__name__, len(node._input_metadata[output].shape)
            if sizes > (picked is not None):
                continue
            if kind == "SelectBackward0":
                picked = node._saved_index
            elif kind == "UnbindBackward0":
                picked = output
            elif sizes == 0 or kind == "StackBackward0":
                read[node][task].add(output if sizes == 0 else picked)
            stack += [(child, number, picked) for child, number in node.next_functions]
    return any(len({frozenset(outputs) for outputs in tasks if outputs}) > 1 for tasks in read.values())


def entangled(roots: Sequence[Tensor]) -> bool:
    """Whether the node of one root lies behind that of another, as its other output may.

    Differentiating with respect to both then runs through what lies between.
    """
    nodes = {root.grad_fn for root in roots} - {None}
    below = _walk([edge for node in nodes if node is not None for edge in node.next_functions], "lightning_mtl")
    return len(nodes) > 1 and bool(nodes & below.keys())


def _edge(tensor: Tensor) -> Edge:
    """Where a tensor hangs in the graph: the node that made it, or that of a leaf, and the number of its output."""
    if tensor.grad_fn is None and tensor.requires_grad:
        return get_gradient_edge(tensor)[0], 0
    return tensor.grad_fn, tensor.output_nr


def _leaves(tensors: Sequence[Tensor], owner: object, stop: Set[Edge] = frozenset()) -> dict[int, Tensor]:
    nodes = _walk([edge for edge in map(_edge, tensors) if edge not in stop], owner, stop)
    return {id(node.variable): node.variable for node in nodes if hasattr(node, "variable")}


def _walk(
    edges: Sequence[Edge], owner: object, stop: Set[Edge] = frozenset(), crossed: set[Edge] | None = None
) -> dict[Node, None]:
    """All nodes from the edges on, in depth-first order, without what lies behind those in ``stop`` only."""
    seen: dict[Node, None] = {}
    stack: list[Edge] = list(reversed(edges))
    while stack:
        edge = stack.pop()
        node = edge[0]
        if node is None:
            continue
        if crossed is not None:
            crossed.add(edge)
        if node in seen:
            continue
        seen[node] = None
        if type(node).__name__ in _HIDING:
            raise _hidden(type(node).__name__, owner)
        ahead = node.next_functions[::-1]
        stack += [edge for edge in ahead if edge not in stop] if stop else ahead
    return seen


#: Nodes behind which the graph cannot be seen.
_HIDING = {"_DDPSinkBackward", "CheckpointFunctionBackward"}


def _hidden(kind: str, owner: object) -> Exception:
    if kind == "_DDPSinkBackward":
        return bad_argument(
            owner,
            "losses",
            "be computed from outputs whose graphs are apart",
            "outputs that DDP joined (find_unused_parameters or static_graph)",
            "Leave both out, or return the losses' inputs as features and pass features=",
        )
    return bad_argument(
        owner,
        "losses",
        "have a graph that can be walked",
        "a reentrant checkpoint, which hides the parameters behind it",
        "Call torch.utils.checkpoint.checkpoint(..., use_reentrant=False)",
    )
