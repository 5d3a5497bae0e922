"""Arguments by task name wait for the names, and are refused where nobody tells them."""

from __future__ import annotations

import pytest
import torch

from lightning_mtl.balancers import load

NAMED = [
    ("upgrad", {"preference": {"a": 5.0}}),
    ("dualproj", {"preference": {"a": 5.0}}),
    ("aligned", {"preference": {"b": 2.0}}),
    ("graddrop", {"leak": {"a": 0.5}}),
    ("cosmos", {"preference": {"a": 2.0}}),
    ("stch", {"reference": {"a": -1.0}}),
    ("famo", {"min_losses": {"a": -1.0}}),
    ("log_sum", {"loss_offset": {"a": -1.0}}),
    ("geometric_mean", {"loss_offset": {"a": -1.0}}),
    ("pbi", {"preference": {"a": 2.0}}),
    ("metabalance", {"main": "b"}),
    ("pcd", {"primary": "b"}),
]


@pytest.mark.parametrize("key, options", NAMED, ids=[key for key, _ in NAMED])
def test_names_without_bind_are_refused(key, options):
    (argument,) = options
    with pytest.raises(ValueError, match=rf"`{argument}` must be numbers in task order .* Call bind"):
        load(key, 2, **options).combine(torch.eye(2), torch.ones(2))


@pytest.mark.parametrize("key, options", NAMED, ids=[key for key, _ in NAMED])
def test_names_mean_the_same_as_places(key, options):
    named = load(key, 2, **options)
    named.bind(["a", "b"])
    ((argument, value),) = options.items()
    default = {"leak": 0.0, "reference": 0.0, "min_losses": 0.0, "loss_offset": 0.0}.get(argument, 1.0)
    place = ["a", "b"].index(value) if isinstance(value, str) else [value.get(name, default) for name in ("a", "b")]
    rows = torch.tensor([[1.0, 0.5], [-2.0, 3.0]])
    expected = load(key, 2, **{argument: place}).combine(rows, torch.tensor([1.0, 2.0]))
    assert torch.equal(named.combine(rows, torch.tensor([1.0, 2.0])), expected)


def test_a_checkpoint_loaded_before_the_names_are_known_keeps_its_state():
    used = load("gradnorm", 2, initial_losses={"a": 1.0})
    used.bind(["a", "b"])
    used.combine(torch.eye(2), torch.tensor([1.0, 5.0]))
    fresh = load("gradnorm", 2, initial_losses={"a": 1.0})
    fresh.load_state_dict(used.state_dict())
    fresh.bind(["a", "b"])
    assert fresh.initial_losses.tolist() == [1.0, 5.0]


@pytest.mark.parametrize("key", ["gradvac", "metabalance"])
def test_another_number_of_groups_is_refused(key):
    balancer = load(key, 2, granularity="tensor")
    rows = torch.tensor([[1.0, 0.5, 2.0], [-2.0, 3.0, 1.0]])
    balancer.combine(rows, torch.ones(2), sizes=[1, 1, 1])
    with pytest.raises(ValueError, match="3 groups, as many as before"):
        balancer.combine(rows, torch.ones(2), sizes=[1, 2])


@pytest.mark.parametrize("inside", ["uncertainty", "imtl"])
def test_a_chain_teaches_its_second_part_too(inside):
    balancer = load("chain", 2, first="dwa", then=inside)
    own = balancer.own_objective(torch.tensor([1.0, 3.0]))
    own.backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in balancer.parameters())
