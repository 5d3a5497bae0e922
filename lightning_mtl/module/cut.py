"""Whether the graph may be cut at the features, so that every head reads leaves of its own."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import nn

from lightning_mtl.checks import bad_argument, listed
from lightning_mtl.engine import Model, Owned, reached, tensors_of
from lightning_mtl.module.results import Encoded, TaskResult


def inputs_in_reach(parts: Sequence[Encoded], parameters: Collection[int]) -> bool:
    """Whether heads could differentiate an input, as for forces or the equation of a PINN: a cut would hide the way.

    Args:
        parts: inputs and features.
        parameters: the ``id`` of every parameter. Any other leaf among the features is an input.
    """
    return any(
        tensors_of(part.group.inputs) or any(root.is_leaf and id(root) not in parameters for root in part.roots)
        for part in parts
    )


def inputs_behind(parts: Sequence[Encoded], parameters: Collection[int], owner: object) -> bool:
    """The same, found in the graph, however deep an input is hidden.

    Raises: ``ValueError`` if a reentrant checkpoint hides part of the graph: no row can be taken through it.
    """
    leaves = reached([root for part in parts for root in part.roots], owner)
    return any(id(leaf) not in parameters for leaf in leaves)


def check_features_can_be_cut(parts: Sequence[Encoded], inputs: bool, owner: object) -> None:
    """Raises: ``ValueError`` if level "features" would lose a part of the gradient."""
    hidden = [kind for part in parts if not part.roots for kind in part.unknown]
    got = f"features of type {listed(hidden)}, in which no tensor is found" if hidden else ""
    if inputs:
        got = "an input that requires grad, so that heads may differentiate it"
    if got:
        cure = "leave requires_grad off the input" if inputs else "return the tensors in a tuple, dict or dataclass"
        raise bad_argument(
            owner, "level", 'be "parameters" here', f"'features' with {got}", f'Pass level="parameters", or {cure}'
        )


def needs_the_features(error: RuntimeError) -> bool:
    """Whether a head failed because it reads leaves in place of the features.

    It was about to overwrite them, or to differentiate by an input that lies behind them.
    """
    text = str(error)
    in_place = "leaf Variable that requires grad" in text and "in-place" in text
    return in_place or "appears to not have been used in the graph" in text


def uncut_at_features(owner: object) -> Exception:
    """The refusal where every head needs leaves of its own."""
    return bad_argument(
        owner,
        "level",
        'be "parameters" where a head changes the features in place, or differentiates by an input behind them',
        "'features'",
        'Pass level="parameters", or write nn.ReLU() instead of nn.ReLU(inplace=True) as the first layer of a head',
    )


def check_only_features(results: Mapping[str, TaskResult], owned: Owned, model: nn.Module) -> None:
    """The graph is cut at the features, so a loss that reaches the encoder by another way would lose gradient."""
    encoder = {id(p) for p in owned.shared} - {id(p) for p in owned.tied}
    reads = {name: reached([result.loss], model) for name, result in results.items()}
    for name, result in results.items():
        others = [other.leaves or [] for other in results.values() if other.leaves is not result.leaves]
        if {id(leaf) for leaves in others for leaf in leaves} & {id(leaf) for leaf in reads[name]}:
            raise bad_argument(
                model,
                "tasks",
                "have heads that read nothing but the features and what they own",
                f"that of {name!r}, which reads what another head has computed",
                "Let it compute that itself, or use Balanced without features=",
            )
    beside = [leaf for leaves in reads.values() for leaf in leaves if id(leaf) in encoder]
    if beside:
        raise bad_argument(
            model,
            "encoder",
            "return everything that heads and losses read of it",
            f"losses that also reach {Model(model).named(beside)} beside the features",
            "Return these tensors as features too, or use Balanced without features=",
        )
