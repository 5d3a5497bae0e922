"""Who is shared, found in the graph; and which features can be a cut."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_mtl.engine import reached
from lightning_mtl.engine.graph import discover, reached_beside, upstream
from tests.engine.zoo import NETS

UNTOLD = {name for name, net in NETS.items() if getattr(net.build, "keywords", {}).get("tell") is False}


@pytest.mark.parametrize("name", sorted(UNTOLD))
def test_discover(name):
    net = NETS[name]
    model = net.make("fixed", "parameters")
    names = {id(parameter): n for n, parameter in model.named_parameters()}
    losses, _ = net.by_hand(model, net.batch())
    found = discover(losses)
    shared, private = ({names[id(leaf)] for leaf in leaves} for leaves in (found.shared, found.private))
    assert shared == {n for n in names.values() if n.startswith(net.shared)}
    assert private == set(names.values()) - shared


def test_one_loss_shares_nothing():
    model = NETS["found"].make("fixed", "parameters")
    (first, *_), _ = NETS["found"].by_hand(model, NETS["found"].batch())
    found = discover([first])
    assert found.shared == []
    assert len(found.private) == 6


def test_reached_takes_what_is_itself_a_leaf():
    weight, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    assert [id(leaf) for leaf in reached([weight * 2, other, torch.ones(2)])] == [id(weight), id(other)]


def test_beside_the_features():
    below, beside, feature = (nn.Parameter(torch.ones(2)) for _ in range(3))
    z = below * 2
    losses = [(z * feature).sum(), (z * beside).sum()]
    assert [id(leaf) for leaf in reached_beside(losses, [z, feature])] == [id(beside)]


def test_another_output_of_the_node_is_a_way_beside():
    weight = nn.Parameter(torch.ones(4))
    z, other = (weight * 2).chunk(2)
    assert reached_beside([z.sum()], [z]) == []
    assert [id(leaf) for leaf in reached_beside([(z * other).sum()], [z])] == [id(weight)]


def test_features_may_come_twice():
    weight = nn.Parameter(torch.ones(2))
    z, y = weight * 2, weight * 3
    assert [id(feature) for feature in upstream([z, y, z, weight + 1, y])][:2] == [id(z), id(y)]


@pytest.mark.parametrize("leaf", [False, True])
def test_of_features_that_are_computed_from_each_other_the_first_remain(leaf):
    weight = nn.Parameter(torch.ones(2))
    first = weight if leaf else weight * 2
    second = torch.tanh(first) + 1
    assert [id(feature) for feature in upstream([second * 3, second, first])] == [id(first)]


def test_outputs_of_one_node_are_independent():
    z, other = (nn.Parameter(torch.ones(4)) * 2).chunk(2)
    assert len(upstream([z, other])) == 2
    assert len(upstream([z, other.sin()])) == 2
