"""Walking autograd graphs: what is reached, who is shared, and which features are a cut."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
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


#: Parts put together, of which a pick may take one out again.
_JOINTS = {"CatBackward0", "StackBackward0"}
#: Nodes of several inputs through which a loss keeps its entries apart.
_ELEMENTWISE = {"AddBackward0", "SubBackward0", "MulBackward0", "DivBackward0", "WhereBackward0"}


def siblings(losses: Sequence[Sequence[Tensor]]) -> bool:
    """Whether two tasks read different parts of one node, with no parameter of their own in between.

    All that lies behind it is then reached by both, heads included: several outputs of a criterion or of a compiled
    model; scalars that were stacked; columns of a criterion over outputs that were put together. What is taken apart
    again as it was, such as features, is not meant.
    """
    read: dict[Node, list[set[Any]]] = defaultdict(lambda: [set() for _ in losses])
    for task, parts in enumerate(losses):
        # The last entry says whether the last node was a pick.
        stack: list[tuple[Any, int, tuple[Any, ...], bool]] = [(*_edge(loss), (), False) for loss in parts]
        seen = set()
        while stack:
            node, output, picks, just = edge = stack.pop()
            if node is None or edge in seen or hasattr(node, "variable"):
                continue
            seen.add(edge)
            kind, ahead = type(node).__name__, [(n, number) for n, number in node.next_functions if n is not None]
            scalar, pick = len(node._input_metadata[output].shape) == 0, _pick(kind, node, output)
            if is_graph(kind):
                read[node][task].add(output)
                continue
            if kind in _JOINTS:
                ahead = [(n, number) for n, number in ahead if not len(n._input_metadata[number].shape)]
                if picks and (ahead or not just):
                    read[node][task].add(picks)
            elif scalar:
                if pick is None:
                    read[node][task].add(output)
            elif len(ahead) > 1 and (kind not in _ELEMENTWISE or any(hasattr(n, "variable") for n, _ in ahead)):
                continue
            picks = picks if pick is None else (*picks, pick)
            stack += [(n, number, picks, pick is not None) for n, number in ahead]
    return any(len({frozenset(each) for each in tasks if each}) > 1 for tasks in read.values())


def _pick(kind: str, node: Any, output: int) -> Any:
    """Which entries a node takes; ``None`` if all."""
    if kind == "SelectBackward0":
        return kind, node._saved_dim, node._saved_index
    if kind == "SliceBackward0":
        return kind, node._saved_dim, node._saved_start, node._saved_end
    if kind.startswith(("Unbind", "Split")):
        return kind, output
    return node if kind.startswith(("Index", "Gather", "Take", "MaskedSelect")) else None


def is_graph(kind: str) -> bool:
    """Whether a node of this kind is a whole graph, compiled or scripted, with as many outputs as that has."""
    return "CompiledFunction" in kind or kind == "CppFunction"


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


def _leaves(tensors: Sequence[Tensor], owner: object, stop: Collection[Edge] = ()) -> dict[int, Tensor]:
    nodes = _walk([edge for edge in map(_edge, tensors) if edge not in stop], owner, stop)
    return {id(node.variable): node.variable for node in nodes if hasattr(node, "variable")}


def _walk(
    edges: Sequence[Edge], owner: object, stop: Collection[Edge] = (), crossed: set[Edge] | None = None
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
