"""Make several backwards over one compiled graph legal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_mtl.checks import bad_argument
from lightning_mtl.engine.graph import is_graph
from lightning_mtl.types import Step

_TAG = "-several-backwards"


def allow_several_backwards() -> None:
    """Tell ``torch.compile`` not to reuse ("donate") buffers that a second backward over the graph would read.

    Must run before the first forward of anything compiled; ``Balanced`` does it at fit start, plain loops call it
    themselves. It is process-wide: what was compiled before is compiled again, and a tag keeps these graphs apart
    in the caches on disk. Setting the flag alone is not enough: a cached graph with donated buffers would give
    wrong gradients without an error.
    """
    import torch._functorch.config as functorch_config

    if functorch_config.donated_buffer:
        functorch_config.donated_buffer = False
        torch.compiler.config.cache_key_tag += _TAG
        torch._dynamo.reset()


def several_backwards_allowed() -> bool:
    """Whether :func:`allow_several_backwards` is in force."""
    import torch._functorch.config as functorch_config

    return not functorch_config.donated_buffer


def is_compiled(tensor: Tensor) -> bool:
    """Whether the tensor is a direct output of a compiled graph."""
    return is_graph(type(tensor.grad_fn).__name__)


def check_several_backwards(ends: Sequence[object], owner: object) -> None:
    """Refuse a graph that was compiled for one backward: a second one could be silently wrong."""
    if any(isinstance(end, Tensor) and is_compiled(end) for end in ends) and not several_backwards_allowed():
        raise bad_argument(
            owner,
            "losses",
            "come from a graph that allows several backwards",
            "one compiled before allow_several_backwards()",
            "Call lightning_mtl.allow_several_backwards() before the first forward",
        )


def check_not_siblings(step: Step, owner: object) -> None:
    """Refuse losses that one compiled graph computes without a cut at the features: who is shared cannot be told.

    One graph over the heads alone is fine: it is differentiated once per task, from the losses to the features.
    """
    nodes = [loss.grad_fn for loss in step.losses if is_compiled(loss)]
    if len(nodes) == len(set(nodes)) or step.leaves is not None:
        return
    roots = [root for task in step.roots or [] for root in task]
    if step.roots is not None and all(root.grad_fn not in nodes for root in roots):
        return
    raise bad_argument(
        owner,
        "losses",
        "come from graphs that can be told apart",
        "several losses from one compiled graph",
        "Compile the encoder and the heads instead of the whole module, or write "
        "`z = lightning_mtl.boundary(encoder(x))` between them and pass features=z",
    )
