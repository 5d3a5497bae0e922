"""Containers of features: which tensors they hold, and copies of the same type with leaves of their own."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import FrozenInstanceError

import pytest
import torch
from torch import nn

from lightning_mtl.engine.features import leaves_per_head, tensors_of, unknown_types
from tests.containers import (
    CONTAINERS,
    Frozen,
    GraphData,
    Labelled,
    ModelOutput,
    Named,
    Opaque,
    Plain,
    Registered,
    SharingData,
    SubNamed,
    labelled,
    packed,
)


def two():
    base = torch.randn(8, 3, requires_grad=True)
    return base * 2, base.sin()


def leaf_of(container):
    ((copy, _),) = leaves_per_head(container, 1)
    return copy


@pytest.mark.parametrize("name", CONTAINERS)
def test_the_tensors_of_a_container(name):
    make, take = CONTAINERS[name]
    container = make(*two())
    if name in ("packed sequence", "jagged"):
        found = [container[0].data if name == "packed sequence" else container[0], container[1]]
    else:
        found = list(take(container))
    tensors = tensors_of(container)
    assert len(tensors) == 2
    if name != "tensor subclass":
        assert all(a is b for a, b in zip(tensors, found, strict=True))
    assert unknown_types(container) == []


@pytest.mark.parametrize("name", CONTAINERS)
def test_copies_have_the_same_type_and_values_and_leaves_of_their_own(name):
    make, take = CONTAINERS[name]
    container = make(*two())
    before = tensors_of(container)
    copies = [copy for copy, _ in leaves_per_head(container, 3)]
    assert [id(tensor) for tensor in tensors_of(container)] == [id(tensor) for tensor in before]
    leaves = [tensor for copy in copies for tensor in tensors_of(copy)]
    assert len({id(leaf) for leaf in leaves}) == 6
    assert all(leaf.is_leaf and leaf.requires_grad for leaf in leaves)
    for copy in copies:
        assert type(copy) is type(container)
        for mine, given in zip(take(copy), take(container), strict=True):
            assert torch.equal(mine, given)
            assert mine.untyped_storage().data_ptr() == given.untyped_storage().data_ptr()


def test_what_is_no_tensor_stays():
    z, more = two()
    plain = leaf_of(Plain(z, "note", [more]))
    assert (plain.name, plain.length) == ("note", 1)
    frozen = leaf_of(Frozen(z, {"n": torch.arange(3)}))
    with pytest.raises(FrozenInstanceError):
        frozen.z = z
    assert torch.equal(frozen.more["n"], torch.arange(3))
    output = leaf_of(ModelOutput(z))
    assert output.pooler_output is None
    assert list(output) == ["last_hidden_state"]
    assert output["last_hidden_state"] is output.last_hidden_state is output[0]
    graph = leaf_of(GraphData(x=z, num_nodes=8))
    assert graph.num_nodes == 8
    registered = leaf_of(Registered(z, [more], "note"))
    assert registered.note == "note"
    sequence = leaf_of(packed(z))
    assert torch.equal(sequence.batch_sizes, packed(z).batch_sizes)
    assert isinstance(leaf_of(SubNamed((z, more))), SubNamed)


def test_what_hangs_on_a_tensor_hangs_on_its_leaf():
    leaf = leaf_of(labelled(two()[0]))
    assert type(leaf) is Labelled
    assert leaf.labels == ["a", "b"]


@pytest.mark.parametrize(
    "make",
    [
        lambda z: (z, z),
        lambda z: Plain(z, "n", [z, z]),
        lambda z: Frozen(z, {"z": z}),
        lambda z: ModelOutput(z, z, (z,)),
        lambda z: GraphData(x=z, y=[z]),
        lambda z: [Named(z, z), {"a": Registered(z, [z], "n")}],
    ],
)
def test_a_tensor_that_stands_twice_is_one_leaf(make):
    container = make(two()[0])
    assert len(tensors_of(container)) == 1
    for copy, leaves in leaves_per_head(container, 2):
        assert [id(tensor) for tensor in tensors_of(copy)] == [id(leaf) for leaf in leaves]
        assert len(leaves) == 1


def test_a_copy_that_shares_its_tensors_is_refused():
    with pytest.raises(TypeError, match=r"`features` must have copies of their own .*, got a SharingData whose copy"):
        leaves_per_head(SharingData(x=two()[0]), 2)


def test_what_nobody_knows_is_named():
    z, more = two()
    assert unknown_types([Opaque(z, more), (z, nn.Linear(1, 1)), Opaque(z, z)]) == ["Opaque", "Linear"]
    plain = (None, 1, 2.0, "a", True, torch.float32, z.detach().numpy(), z.shape, OrderedDict())
    assert unknown_types(plain) == []
    assert tensors_of([Opaque(z, more)]) == []
