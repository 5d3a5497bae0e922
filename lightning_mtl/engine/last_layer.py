"""The last layer that every task reaches: where some methods look at the gradients."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from lightning_mtl.checks import bad_argument
from lightning_mtl.engine.collectives import union_over_ranks
from lightning_mtl.engine.graph import reached
from lightning_mtl.engine.model import Model
from lightning_mtl.types import Step


def last_layer(
    step: Step, shared: Sequence[Tensor], model: Model, told: nn.Module | Sequence[Tensor] | None
) -> list[Tensor]:
    """Its parameters, found once for each set of tasks that is present, and for these shared parameters.

    Raises: as :func:`find_layer`.
    """
    there = None if step.present is None else tuple(step.present.tolist())
    key = (there, told is None, *(id(parameter) for parameter in shared))
    if key not in model.last_layers:
        model.last_layers[key] = find_layer(step, shared, model, told)
    return model.last_layers[key]


def find_layer(
    step: Step, shared: Sequence[Tensor], model: Model, told: nn.Module | Sequence[Tensor] | None
) -> list[Tensor]:
    """Of the layer that was told, or of the last module, in order of registration, that all losses of the step reach.

    Normalisation is passed over where there is another layer: the scales of a few channels say little of a task.

    Raises: ``ValueError`` if the layer that was told is not shared, or no layer is reached by all present tasks.
    """
    layers = _told(shared, model, told) if told is not None else _candidates(shared, model)
    common = _common(step, shared)
    fits = [any(id(p) in common for p in layer) for layer in layers]
    # A layer must do on every rank; where a task has no labels here, another rank knows what it reaches.
    fails = union_over_ranks([not fit for fit in fits], step.losses[0].device)
    layers = [layer for layer, failed in zip(layers, fails, strict=True) if not failed]
    if not layers:
        raise _none(model, told)
    return layers[-1]


def _told(shared: Sequence[Tensor], model: Model, told: nn.Module | Sequence[Tensor]) -> list[list[Tensor]]:
    parameters = told.parameters() if isinstance(told, nn.Module) else told
    layer = [parameter for parameter in parameters if parameter.requires_grad]
    if not {id(p) for p in layer} <= {id(p) for p in shared}:
        raise bad_argument(
            model.owner,
            "last_layer",
            "be a part of what the tasks share",
            type(told).__name__ if isinstance(told, nn.Module) else "parameters of which some are not",
            "Pass the last module that all heads read from",
        )
    return [layer]


def _candidates(shared: Sequence[Tensor], model: Model) -> list[list[Tensor]]:
    """The shared parameters of each module, in order, normalisation before all others."""
    ids = {id(parameter) for parameter in shared}
    norms: list[list[Tensor]] = []
    layers: list[list[Tensor]] = []
    for module in model.modules:
        own: list[Tensor] = [p for p in module.parameters(recurse=False) if id(p) in ids]
        if own:
            (norms if "norm" in type(module).__name__.lower() else layers).append(own)
    return [*norms, *layers]


def _common(step: Step, shared: Sequence[Tensor]) -> set[int]:
    """The leaves that every loss of a present task reaches, through the features where its head read leaves of them."""
    common: set[int] | None = None
    present = [True] if step.present is None else step.present.tolist()
    for task, loss in enumerate(step.losses):
        if not loss.requires_grad or not present[task % len(present)]:
            continue
        leaves = {id(leaf) for leaf in reached([loss])}
        if step.leaves is not None and step.roots is not None:
            pairs = zip(step.roots[task], step.leaves[task], strict=True)
            through = [root for root, leaf in pairs if id(leaf) in leaves]
            leaves |= {id(leaf) for leaf in reached(through)}
        common = leaves if common is None else common & leaves
    # Nobody here says nothing; the other ranks do.
    return common if common is not None else {id(parameter) for parameter in shared}


def _none(model: Model, told: object) -> Exception:
    return bad_argument(
        model.owner,
        "last_layer",
        "be reached by every task of the batch, because their gradients are compared there",
        "no such layer" if told is None else "one that is not",
        'Pass norms_at="shared" to the balancer, or last_layer= with a layer that all tasks read',
    )
