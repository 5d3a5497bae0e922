"""Containers of tensors as other libraries have them, in a few lines each."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils import _pytree as pytree


@dataclass
class Plain:
    """A dataclass whose fields are not all tensors, nor all arguments."""

    z: Tensor
    name: str
    more: list[Tensor]
    length: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.length += 1  # a copy that ran this again would count on


@dataclass(frozen=True, slots=True)
class Frozen:
    z: Tensor
    more: dict[str, Tensor]


@dataclass
class ModelOutput(OrderedDict):
    """As in Hugging Face transformers: a dataclass that is a mapping of the fields that are not None."""

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if value is not None:
                self[each.name] = value

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else tuple(self.values())[key]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self and value is not None:
            super().__setitem__(name, value)
        super().__setattr__(name, value)

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        super().__setattr__(key, value)

    def __reduce__(self) -> Any:
        return type(self), tuple(getattr(self, each.name) for each in fields(self))


class GraphData:
    """As in PyTorch Geometric: attributes in a store, ``apply`` to all tensors in place, a shallow copy."""

    def __init__(self, **values: Any) -> None:
        self.__dict__["store"] = values

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["store"][name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self.store[name] = value

    def __copy__(self) -> GraphData:
        return GraphData(**self.store)

    def apply(self, function: Callable[[Any], Any]) -> GraphData:
        for name, value in self.store.items():
            self.store[name] = [function(part) for part in value] if isinstance(value, list) else function(value)
        return self


class SharingData(GraphData):
    """Its copies share one store."""

    def __copy__(self) -> SharingData:
        new = SharingData()
        new.__dict__["store"] = self.store
        return new


class Registered:
    """A type that pytree is told about."""

    def __init__(self, z: Tensor, more: list[Tensor], note: str) -> None:
        self.z, self.more, self.note = z, more, note


pytree.register_pytree_node(
    Registered,
    lambda node: ([node.z, node.more], node.note),
    lambda parts, note: Registered(*parts, note),
    serialized_type_name="tests.containers.Registered",
)


class Opaque:
    """A type that nobody knows."""

    def __init__(self, z: Tensor, more: Tensor) -> None:
        self.z, self.more = z, more


class Labelled(Tensor):
    """A subclass with something on it, as LabelTensor and MetaTensor have it."""

    labels: list[str]


Named = namedtuple("Named", "z more")


class SubNamed(Named):
    """A subclass of a named tuple with a constructor of its own."""

    def __new__(cls, both: tuple[Tensor, Tensor]) -> SubNamed:
        return super().__new__(cls, *both)


class ListOf(list):
    pass


class DictOf(dict):
    pass


def labelled(tensor: Tensor) -> Labelled:
    found = tensor.as_subclass(Labelled)
    found.labels = ["a", "b"]
    return found


def packed(z: Tensor) -> PackedSequence:
    return pack_padded_sequence(z[:, None].expand(-1, 2, -1), torch.tensor([2, 1] * (len(z) // 2)), True, False)


def jagged(z: Tensor) -> Tensor:
    """The rows of ``z`` as sequences of lengths 1, 3, 1, 3, ..."""
    offsets = torch.tensor([0] + [1, 3] * (len(z) // 4)).cumsum(0)
    return torch.nested.nested_tensor_from_jagged(z, offsets)


# From two tensors to a container of both; and back.
CONTAINERS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], tuple[Tensor, Tensor]]]] = {
    "tuple": (lambda a, b: (a, b), lambda c: c),
    "nested": (lambda a, b: {"x": [a, {"y": (b, 3)}], "n": None}, lambda c: (c["x"][0], c["x"][1]["y"][0])),
    "dataclass": (lambda a, b: Plain(a, "note", [b]), lambda c: (c.z, c.more[0])),
    "frozen dataclass": (lambda a, b: Frozen(a, {"b": b}), lambda c: (c.z, c.more["b"])),
    "dataclass in a list": (lambda a, b: [Frozen(a, {}), Frozen(b, {})], lambda c: (c[0].z, c[1].z)),
    "model output, by name": (lambda a, b: ModelOutput(a, b), lambda c: (c.last_hidden_state, c["pooler_output"])),
    "model output, by place": (lambda a, b: ModelOutput(a, hidden_states=(b,)), lambda c: (c[0], c[1][0])),
    "graph data": (lambda a, b: GraphData(x=a, edges=torch.tensor([[0, 1]]), more=[b]), lambda c: (c.x, c.more[0])),
    "registered": (lambda a, b: Registered(a, [b], "note"), lambda c: (c.z, c.more[0])),
    "named tuple": (lambda a, b: Named(a, b), lambda c: (c.z, c.more)),
    "subclass of a named tuple": (lambda a, b: SubNamed((a, b)), lambda c: (c.z, c.more)),
    "subclass of a list": (lambda a, b: ListOf([a, b]), lambda c: (c[0], c[1])),
    "subclass of a dict": (lambda a, b: DictOf(a=a, b=b), lambda c: (c["a"], c["b"])),
    "user dict": (lambda a, b: UserDict(a=a, b=b), lambda c: (c["a"], c["b"])),
    "ordered dict": (lambda a, b: OrderedDict(a=a, b=b), lambda c: (c["a"], c["b"])),
    "packed sequence": (lambda a, b: (packed(a), b), lambda c: (c[0].data, c[1])),
    "jagged": (lambda a, b: [jagged(a), b], lambda c: (c[0].values(), c[1])),
    "tensor subclass": (lambda a, b: (labelled(a), b), lambda c: (c[0].as_subclass(Tensor), c[1])),
}
