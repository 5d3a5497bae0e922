"""One encoder per task, and the parameters that correspond in them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mtl.checks import bad_argument, carried, check_head, listed
from lightning_mtl.sharing.soft import Constraint, resolve_constraint


class Encoders(nn.ModuleDict):
    """One encoder per task, as the ``encoder`` of a ``MultiTaskModule``; heads stand in :class:`OwnFeatures`.

    Args:
        encoders: task name -> encoder. All of one architecture, so that their parameters correspond. Start them from
            one copy (``copy.deepcopy``) to begin with equal parameters.

    Shapes: inputs -> task name -> that encoder's features.
    Raises: ``TypeError`` if it is no mapping or an encoder is no module; ``ValueError`` for a name that no module can
    have and if the encoders' parameters do not correspond.

    Example:
        >>> encoders = Encoders({"depth": nn.Linear(8, 4), "seg": nn.Linear(8, 4)})
        >>> {name: list(features.shape) for name, features in encoders(torch.ones(2, 8)).items()}
        {'depth': [2, 4], 'seg': [2, 4]}
    """

    def __init__(self, encoders: Mapping[str, nn.Module]) -> None:
        super().__init__()
        if not isinstance(encoders, Mapping | nn.ModuleDict):
            raise bad_argument(
                self,
                "encoders",
                "be a mapping of task names to encoders",
                type(encoders).__name__,
                "Pass a dict",
                TypeError,
            )
        for name, encoder in encoders.items():
            if not carried(name) or "." in name or hasattr(self, name):
                raise bad_argument(
                    self,
                    "encoders",
                    "have names without a dot that are no attribute of a ModuleDict",
                    repr(name),
                    "Give the encoder another name than the task, and OwnFeatures that name",
                )
            if not isinstance(encoder, nn.Module):
                raise bad_argument(
                    self,
                    f"encoders['{name}']",
                    "be an nn.Module",
                    type(encoder).__name__,
                    "Pass the encoder of this task",
                    TypeError,
                )
        self.update(encoders)
        matching(self)

    def forward(self, inputs: Any) -> dict[str, Any]:
        """The features of every task."""
        return {name: encoder(inputs) for name, encoder in self.items()}


class OwnFeatures(nn.Module):
    """A head behind :class:`Encoders`: it reads the features of its own task.

    Args:
        name: the task's name among the encoders.
        head: features -> output.

    Raises: ``TypeError`` if the name is no string or the head no module, and in ``forward`` if the features do not come
    from :class:`Encoders`; there ``ValueError`` if there is no encoder of that name.
    """

    def __init__(self, name: str, head: nn.Module) -> None:
        super().__init__()
        if not isinstance(name, str):
            raise bad_argument(self, "name", "be a string", repr(name), "Use the key of the task's encoder", TypeError)
        check_head(head, self)
        self.name, self.head = name, head

    def forward(self, features: Mapping[str, Any]) -> Any:
        """The head's output."""
        if not isinstance(features, Mapping):
            raise bad_argument(
                self,
                "features",
                "be a mapping of task names to features",
                type(features).__name__,
                "Make the module's encoder an Encoders, or use the head without OwnFeatures",
                TypeError,
            )
        if self.name not in features:
            raise bad_argument(
                self, "name", f"be one of {listed(features)}", repr(self.name), "Use the key of the task's encoder"
            )
        return self.head(features[self.name])


def matching(
    encoders: nn.Module | Iterable[nn.Module], names: Collection[str] | None = None
) -> dict[str, list[nn.Parameter]]:
    """The parameters that correspond in ``T`` encoders of one architecture.

    Args:
        encoders: an :class:`Encoders`, a ``ModuleDict``, or a list of modules.
        names: those wanted, as one encoder's ``named_parameters`` calls them; by default all.

    Returns: name -> ``T`` parameters of one shape, in the order of the encoders.
    Raises: ``TypeError`` if an encoder is no module or ``names`` no list of names; ``ValueError`` if names or shapes
    differ, if a parameter belongs to several encoders, if a name is not there, or if ``names`` is empty.

    Example:
        >>> [(name, len(found)) for name, found in matching([nn.Linear(2, 1), nn.Linear(2, 1)]).items()]
        [('weight', 2), ('bias', 2)]
    """
    check_names(names, "matching")
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
    known = list(each[0])  # a name that cannot be hashed is merely unknown
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise bad_argument("matching", "names", f"be among {listed(known)}", listed(unknown), "Correct the name")
    return {name: [found[name] for found in each] for name in (known if names is None else names)}


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
    for module in modules:
        if not isinstance(module, nn.Module):
            raise bad_argument(
                "matching", "encoders", "hold modules", type(module).__name__, "Make one encoder per task", TypeError
            )
    return modules


def check_names(names: Collection[str] | None, owner: object) -> None:
    """None, or one name of a parameter at least."""
    # Of a single name every letter would be taken for one.
    if names is not None and (isinstance(names, str) or not isinstance(names, Collection)):
        raise bad_argument(
            owner, "names", "be None or a list of names", repr(names), 'Pass a list such as ["0.weight"]', TypeError
        )
    if names is not None and not names:
        raise bad_argument(
            owner, "names", "hold the name of one parameter at least", repr(names), "For all of them pass None"
        )


def constrained(
    encoders: nn.Module | Iterable[nn.Module],
    constraint: Constraint,
    names: Collection[str] | None,
    owner: object,
) -> dict[str, list[nn.Parameter]]:
    """As :func:`matching`, those that a constraint is applied to.

    Raises: as :func:`matching`, and ``ValueError`` if there is only one encoder or no such parameter.
    """
    found = matching(encoders, names)
    if names is None and constraint.weights_only:
        found = {name: each for name, each in found.items() if each[0].ndim >= 2}
    if not found:
        kind = "weight of two dimensions or more" if constraint.weights_only else "parameter"
        raise bad_argument(
            owner, "encoders", f"have a {kind}, for the constraint", "none", "Name what is to be constrained"
        )
    if any(len(each) < 2 for each in found.values()):
        raise bad_argument(
            owner, "encoders", "be two or more, for the constraint", "1", "For a single task leave the constraint out"
        )
    return found


def penalty_of(
    encoders: nn.Module | Iterable[nn.Module],
    constraint: str | Constraint = "mean",
    names: Collection[str] | None = None,
) -> Tensor:
    """A constraint's penalty, summed over the parameters that correspond; with its gradient.

    Add it, times a strength, to what ``training_step`` returns: the balancer does not see it.

    Args:
        encoders: as :func:`matching`.
        constraint: "mean", "joint_features", "trace_norm", or a :class:`Constraint`. It is applied to each parameter
            alone.
        names: as :func:`matching`; by default all, under "joint_features" those of two dimensions or more.

    Shapes: -> ``[]``.
    Raises: ``TypeError`` and ``ValueError`` as :func:`matching`; ``ValueError`` for an unknown constraint, for a single
    encoder, and if there is no parameter to constrain.

    Example:
        >>> twins = [nn.Linear(2, 1), nn.Linear(2, 1)]
        >>> penalty_of(twins).requires_grad
        True
    """
    chosen = resolve_constraint(constraint, "penalty_of")
    found = constrained(encoders, chosen, names, "penalty_of")
    return torch.stack([chosen.penalty(torch.stack(each)) for each in _vectors(found)]).sum()


def _vectors(found: Mapping[str, list[nn.Parameter]]) -> Iterable[list[Tensor]]:
    """A parameter without dimensions is a vector of one number."""
    return ([parameter.reshape(parameter.shape or (1,)) for parameter in each] for each in found.values())
