"""One encoder per task, and the parameters that correspond in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mtl.checks import bad_argument, listed
from lightning_mtl.sharing.soft import Constraint, resolve_constraint


class Encoders(nn.ModuleDict):
    """One encoder per task, as the ``encoder`` of a ``MultiTaskModule``; heads stand in :class:`OwnFeatures`.

    Args:
        encoders: task name -> encoder. All of one architecture, so that their parameters correspond. Start them from
            one copy (``copy.deepcopy``) to begin with equal parameters.

    Shapes: inputs -> task name -> that encoder's features.
    Raises: ``ValueError`` if the encoders' parameters do not correspond.

    Example:
        >>> encoders = Encoders({"depth": nn.Linear(8, 4), "seg": nn.Linear(8, 4)})
        >>> {name: list(features.shape) for name, features in encoders(torch.ones(2, 8)).items()}
        {'depth': [2, 4], 'seg': [2, 4]}
    """

    def __init__(self, encoders: Mapping[str, nn.Module]) -> None:
        super().__init__(encoders)
        matching(self)

    def forward(self, inputs: Any) -> dict[str, Any]:
        """The features of every task."""
        return {name: encoder(inputs) for name, encoder in self.items()}


class OwnFeatures(nn.Module):
    """A head behind :class:`Encoders`: it reads the features of its own task.

    Args:
        name: the task's name among the encoders.
        head: features -> output.

    Raises: ``ValueError`` if there is no encoder of that name.
    """

    def __init__(self, name: str, head: nn.Module) -> None:
        super().__init__()
        self.name, self.head = name, head

    def forward(self, features: Mapping[str, Any]) -> Any:
        """The head's output."""
        if self.name not in features:
            raise bad_argument(
                self, "name", f"be one of {listed(features)}", repr(self.name), "Use the key of the task's encoder"
            )
        return self.head(features[self.name])


def matching(
    encoders: nn.Module | Iterable[nn.Module], names: Sequence[str] | None = None
) -> dict[str, list[nn.Parameter]]:
    """The parameters that correspond in ``T`` encoders of one architecture.

    Args:
        encoders: an :class:`Encoders`, a ``ModuleDict``, or a list of modules.
        names: those wanted, as one encoder's ``named_parameters`` calls them; by default all.

    Returns: name -> ``T`` parameters of one shape, in the order of the encoders.
    Raises: ``ValueError`` if names or shapes differ, if a parameter belongs to several encoders, or if a name is not
    there.

    Example:
        >>> [(name, len(found)) for name, found in matching([nn.Linear(2, 1), nn.Linear(2, 1)]).items()]
        [('weight', 2), ('bias', 2)]
    """
    modules = _listed_modules(encoders)
    each = [dict(module.named_parameters()) for module in modules]
    shapes = [{name: tuple(parameter.shape) for name, parameter in found.items()} for found in each]
    for other in shapes[1:]:
        if other != shapes[0]:
            apart = sorted(name for name in shapes[0] | other if shapes[0].get(name) != other.get(name))
            raise bad_argument(
                "matching",
                "encoders",
                "have parameters of the same names and shapes",
                f"different {listed(apart[:3])}",
                "Give every task an encoder of one architecture",
            )
    if len({id(parameter) for found in each for parameter in found.values()}) < sum(map(len, each)):
        raise bad_argument(
            "matching",
            "encoders",
            "have parameters of their own",
            "one parameter in several of them",
            "Copy the encoder for each task (copy.deepcopy)",
        )
    unknown = [name for name in names or () if name not in each[0]]
    if unknown:
        raise bad_argument("matching", "names", f"be among {listed(each[0])}", listed(unknown), "Correct the name")
    return {name: [found[name] for found in each] for name in (each[0] if names is None else names)}


def _listed_modules(encoders: nn.Module | Iterable[nn.Module]) -> list[nn.Module]:
    modules: list[nn.Module] | None = None
    if isinstance(encoders, nn.ModuleDict):
        modules = list(encoders.values())
    elif isinstance(encoders, nn.ModuleList | list | tuple):
        modules = list(encoders)
    if not modules:
        raise bad_argument(
            "matching",
            "encoders",
            "be an Encoders, a ModuleDict or a list of modules",
            type(encoders).__name__ if modules is None else "none",
            "Make one encoder per task",
        )
    return modules


def penalty_of(
    encoders: nn.Module | Iterable[nn.Module],
    constraint: str | Constraint = "mean",
    names: Sequence[str] | None = None,
) -> Tensor:
    """A constraint's penalty, summed over the parameters that correspond; with its gradient.

    Add it, times a strength, to what ``training_step`` returns: the balancer does not see it.

    Args:
        encoders: as :func:`matching`.
        constraint: "mean", "joint_features", "trace_norm", or a :class:`Constraint`. It is applied to each parameter
            alone.
        names: as :func:`matching`; by default all.

    Shapes: -> ``[]``.
    Raises: ``ValueError`` as :func:`matching`, and for an unknown constraint.

    Example:
        >>> twins = [nn.Linear(2, 1), nn.Linear(2, 1)]
        >>> penalty_of(twins).requires_grad
        True
    """
    penalty = resolve_constraint(constraint, "penalty_of").penalty
    return torch.stack([penalty(torch.stack(found)) for found in _vectors(matching(encoders, names))]).sum()


def _vectors(found: Mapping[str, list[nn.Parameter]]) -> Iterable[list[Tensor]]:
    """A parameter without dimensions is a vector of one number."""
    return ([parameter.reshape(parameter.shape or (1,)) for parameter in each] for each in found.values())
