"""Where the heads begin: features as any nested structure of tensors, and one leaf of them per head."""

from __future__ import annotations

import copy
from collections.abc import Callable, MutableMapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_mtl.checks import bad_argument, listed

# What stands in a structure beside tensors, and cannot hold one.
_PLAIN = (type(None), bool, int, float, complex, str, bytes, Enum, np.ndarray, np.generic, torch.Size, torch.dtype)
_KNOWN = (Tensor, *_PLAIN)


def mapped(structure: Any, change: Callable[[Any], Any]) -> Any:
    """A structure of the same types with ``change(leaf)`` in place of each leaf: a tensor, or what is no container.

    Containers are those that ``torch.utils._pytree`` knows (tuples, lists, dicts, what is registered there), named
    tuples, subclasses of these, mutable mappings, dataclasses (frozen ones too), and graph data with an ``apply`` of
    its own, as in PyTorch Geometric.
    """
    if isinstance(structure, Tensor):
        return change(structure)

    def within(leaf: Any) -> Any:
        return change(leaf) if isinstance(leaf, Tensor) else _mapped_within(leaf, change)

    return tree_map(within, structure, is_leaf=_is_named_tuple)


def leaves_of(structure: Any) -> list[Any]:
    """The leaves of a structure, in a fixed order, found without copying it."""
    if isinstance(structure, Tensor):
        return [structure]
    parts = tree_leaves(structure, is_leaf=_is_named_tuple)
    return [leaf for part in parts for leaf in ([part] if isinstance(part, Tensor) else _leaves_within(part))]


def _mapped_within(value: Any, change: Callable[[Any], Any]) -> Any:
    """A copy of what pytree takes for a leaf, by assignment: its constructor may do more than assign."""
    if _is_leaf(value):
        return change(value)
    if _is_named_tuple(value):
        return value._make(mapped(part, change) for part in value)
    new = copy.copy(value)
    if _is_graph(value):
        applied = new.apply(lambda part: mapped(part, change))
        return new if applied is None else applied
    if isinstance(value, MutableMapping):
        for key, part in value.items():
            new[key] = mapped(part, change)
    if isinstance(value, list):
        new[:] = [mapped(part, change) for part in value]
    for name in _fields(value):
        object.__setattr__(new, name, mapped(getattr(value, name), change))  # frozen ones refuse an ordinary one
    return new


def _leaves_within(value: Any) -> list[Any]:
    if _is_leaf(value):
        return [value]
    parts: list[Any] = []
    if _is_graph(value):

        def note(part: Any) -> Any:
            parts.append(part)
            return part

        copy.copy(value).apply(note)
    elif isinstance(value, MutableMapping):
        parts += value.values()
    elif isinstance(value, tuple | list):
        parts += value
    return leaves_of(parts + [getattr(value, name) for name in _fields(value)])


def _is_leaf(value: Any) -> bool:
    return isinstance(value, (*_KNOWN, type, nn.Module)) or not (_is_container(value) or _is_graph(value))


def _is_container(value: Any) -> bool:
    return isinstance(value, MutableMapping | list) or is_dataclass(value) or _is_named_tuple(value)


def _is_named_tuple(value: Any) -> bool:
    # Its type may be a subclass with another constructor, by which pytree would make a new one.
    return isinstance(value, tuple) and hasattr(value, "_make")


def _is_graph(value: Any) -> bool:
    return not _is_container(value) and callable(getattr(value, "apply", None))


def _fields(value: Any) -> list[str]:
    names = [field.name for field in fields(value)] if is_dataclass(value) else []
    return [name for name in names if hasattr(value, name)]


def tensors_of(features: Any) -> list[Tensor]:
    """The tensors of a nested structure that carry a gradient, in a fixed order, each once."""
    if isinstance(features, Tensor):  # nearly always, and in every step
        return [features] if features.requires_grad else []
    found = {id(leaf): leaf for leaf in leaves_of(features) if isinstance(leaf, Tensor) and leaf.requires_grad}
    return list(found.values())


def unknown_types(features: Any) -> list[str]:
    """The types of objects in a structure in which tensors could be hidden, each once."""
    if isinstance(features, Tensor):
        return []
    unknown = [leaf for leaf in leaves_of(features) if not isinstance(leaf, _KNOWN)]
    return list(dict.fromkeys(type(leaf).__name__ for leaf in unknown))


def given_tensors(features: Any, owner: object) -> list[Tensor]:
    """:func:`tensors_of` of features that a user names.

    Raises: ``TypeError`` if there are none, and an object of an unknown type may hide some.
    """
    found = tensors_of(features)
    if not found and (unknown := unknown_types(features)):
        raise bad_argument(
            owner,
            "features",
            "be tensors in tuples, lists, dicts, dataclasses or types that torch.utils._pytree knows",
            f"an object of type {listed(unknown)}",
            "Pass the tensors that it holds, or leave features out",
            TypeError,
        )
    return found


@torch.compiler.disable
def leaves_per_head(features: Any, num_heads: int) -> list[tuple[Any, list[Tensor]]]:
    """Copies of the structure whose differentiable tensors are fresh leaves (views, not copies of memory).

    With a leaf per head, one backward over all heads yields every task's feature gradients apart.
    Returns: each copy and its leaves, in the order of :func:`tensors_of`.
    Raises: ``TypeError`` if a container's copy is not independent of it.
    """

    def one() -> tuple[Any, list[Tensor]]:
        fresh: dict[int, Tensor] = {}

        def leaf(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.requires_grad:
                return value
            if id(value) not in fresh:
                fresh[id(value)] = _leaf(value)
            return fresh[id(value)]

        return mapped(features, leaf), list(fresh.values())

    copies = [one() for _ in range(num_heads)]
    first, leaves = copies[0]
    if [id(tensor) for tensor in tensors_of(first)] != [id(leaf) for leaf in leaves]:
        raise bad_argument(
            "lightning_mtl",
            "features",
            "have copies of their own under copy.copy",
            f"a {type(features).__name__} whose copy shares its tensors",
            "Give the type a __copy__, or return its tensors in a tuple, dict or dataclass",
            TypeError,
        )
    return copies


def _leaf(value: Tensor) -> Tensor:
    leaf = value.detach().requires_grad_()
    # What a subclass, or a user, hung on the tensor; a wrapper's own inner tensors are there already.
    for name, attribute in vars(value).items():
        vars(leaf).setdefault(name, attribute)
    return leaf


@torch.compiler.disable
def boundary(features: Any) -> Any:
    """Return the features unchanged, outside any compiled graph.

    In a module that is compiled as a whole, the encoder and the heads become one graph with one backward, and no
    task's gradient can be told apart. ``z = boundary(encoder(x))`` splits it in two there.
    """
    return features
