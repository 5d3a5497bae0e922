"""Who is shared, said by hand; and inputs that require a gradient, which nobody trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_mtl
from tests.engine.by_hand import GROUPED, METHODS, Maybe, Net, Own, assert_right, by_hand, make

WITH_ORDER = [method for method in METHODS if method != "graddrop"]


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4)])
        self.idle = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def a_net(absent: Sequence[str] = ()) -> Net:
    torch.manual_seed(7)
    x = torch.randn(6, 3).double()
    heads = {name: nn.Linear(4, 1).double() for name in "abc"}
    targets = {"a": x[:, :1], "b": 1 - 3 * x[:, :1], "c": x[:, 1:2] ** 2}
    return Net(Stack().double(), heads, x, targets, absent=absent)


#: What is said, and which parameters that are.
SAID: dict[str, Callable[[Net], Sequence[Tensor]]] = {
    "encoder": lambda net: list(net.encoder.parameters()),
    "last block": lambda net: list(net.encoder.layers[-1].parameters()),
    "first and a head": lambda net: [*net.encoder.layers[0].parameters(), net.heads["b"].weight],
    "one that nobody reads": lambda net: [net.encoder.idle, *net.encoder.layers[1].parameters()],
    "all": lambda net: net.parameters(),
}


def step(
    loop: bool, net: Any, losses: dict[str, Maybe], method: str, shared: Any, features: Any = None, **options: Any
) -> Any:
    if loop:
        return lightning_mtl.backward(losses, make(method, len(losses)), features, shared, **options)
    parts = net if isinstance(net, nn.Module) else nn.ModuleList([net.encoder, *net.heads.values()])
    given = {key: options.pop(key) for key in ("plain", "labelled") if key in options}
    module = Own(parts, list(losses), make(method, len(losses)), **options)
    module.balance(losses, features, shared=shared, **given).backward()
    return module.last_balance


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("features", [False, True])
@pytest.mark.parametrize("absent", [(), ("b",)])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("said", SAID)
def test_the_weights_apply_to_what_was_said_and_a_plain_sum_to_the_rest(said, method, absent, features, loop):
    if loop and (method == "graddrop" or said == "one that nobody reads"):
        return  # a loop knows only what the losses reach, in the order of the graph
    net = a_net(absent)
    losses, z = net.losses()
    shared = SAID[said](net)
    ordered = [p for p in net.parameters() if any(p is other for other in shared)]
    expected = by_hand(method, make(method, 3), list(losses.values()), net.parameters(), ordered)
    given: Any = "all" if said == "all" else iter(ordered)
    step(loop, net, losses, method, given, z if features else None)
    assert_right(net.parameters(), expected)


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("said", ["encoder", "last block", "all"])
def test_with_weighted_heads_the_weights_apply_everywhere(said, loop):
    net = a_net()
    losses, _ = net.losses()
    shared = SAID[said](net)
    every = list(losses.values())
    expected = by_hand("mgda", make("mgda", 3), every, net.parameters(), shared, weight_heads=True)
    step(loop, net, losses, "mgda", shared, weight_heads=True)
    assert_right(net.parameters(), expected)


@pytest.mark.parametrize("granularity", ["tensor", "layer", "whole"])
@pytest.mark.parametrize("method", GROUPED)
def test_groups_of_what_was_said(method, granularity):
    net = a_net()
    losses, _ = net.losses()
    layers = [list(layer.parameters()) for layer in net.encoder.layers]
    shared = [p for layer in layers for p in layer]
    groups = {"tensor": [[p] for p in shared], "layer": layers, "whole": [shared]}[granularity]
    every = list(losses.values())
    expected = by_hand(method, make(method, 3), every, net.parameters(), shared, groups=groups)
    module = Own([net.encoder, *net.heads.values()], list("abc"), make(method, 3, granularity=granularity))
    module.balance(losses, shared=shared).backward()
    assert_right(net.parameters(), expected)


@pytest.mark.parametrize("method", ["mgda", "fixed"])
def test_features_and_the_same_said_by_hand_agree(method):
    """Then the graph can be cut at the features, so level "features" is there too."""
    for level in ("parameters", "features"):
        net = a_net()
        losses, z = net.losses()
        shared = [p for layer in net.encoder.layers for p in layer.parameters()]
        at = [z] if level == "features" else None
        expected = by_hand(method, make(method, 3), list(losses.values()), net.parameters(), shared, at=at)
        step(False, net, losses, method, shared, z, level=level)
        assert_right(net.parameters(), expected)


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("wrong", ["everything", [], "weight", [1.0], [None], 3])
def test_what_is_no_iterable_of_parameters_is_refused(wrong, loop):
    net = a_net()
    losses, _ = net.losses()
    wrong = net.encoder.idle if wrong == "weight" else wrong
    with pytest.raises((ValueError, TypeError), match='`shared` must be "all" or an iterable of parameters, got'):
        step(loop, net, losses, "mgda", wrong)


def test_parameters_of_others_are_refused_by_a_module():
    net = a_net()
    losses, _ = net.losses()
    with pytest.raises(ValueError, match=r"be parameters that are trained here, got 2 others, one of shape \[5, 5\]"):
        step(False, net, losses, "mgda", [*net.encoder.parameters(), *nn.Linear(5, 5).parameters()])


def test_rows_at_the_features_of_something_else_are_refused():
    for loop, features in product((False, True), (False, True)):
        net = a_net()
        losses, z = net.losses()
        with pytest.raises(ValueError, match=r"and leave out shared=\."):
            step(
                loop, net, losses, "mgda", net.encoder.layers[1].parameters(), z if features else None, level="features"
            )


# Energy and forces: a loss that contains a gradient of the inputs.


class Potential(nn.Module):
    """Positions ``[B, 3]`` -> energies ``[B]``; its last bias is reached by the energy alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).squeeze(1)


def energy_and_forces() -> tuple[Potential, Tensor, dict[str, Tensor]]:
    torch.manual_seed(0)
    model, x = Potential().double(), torch.randn(6, 3).double().requires_grad_()
    energy = model(x)
    (forces,) = torch.autograd.grad(-energy.sum(), x, create_graph=True)
    return model, x, {"energy": (energy - 1).square().mean(), "forces": (forces + x.detach()).square().mean()}


@pytest.mark.parametrize("method", WITH_ORDER)
@pytest.mark.parametrize("said", [None, "all", "first"])
def test_energy_and_forces_in_a_module(said, method):
    model, x, losses = energy_and_forces()
    every = list(model.parameters())
    shared: Any = {None: every[:-1], "all": every, "first": every[:2]}[said]
    expected = by_hand(method, make(method), list(losses.values()), every, shared)
    step(False, model, losses, method, said if said != "first" else shared)
    assert_right(every, expected, strides=method != "fixed")
    # As in any balanced step where the rows are taken at parameters; under a loss balancer an ordinary backward runs.
    assert (x.grad is None) == (method != "fixed")


@pytest.mark.parametrize("method", WITH_ORDER)
@pytest.mark.parametrize("said", [None, "all"])
def test_a_loop_asks_what_an_input_is(said, method):
    model, x, losses = energy_and_forces()
    every = list(model.parameters())
    if method != "fixed":
        with pytest.raises(ValueError, match=r"got a tensor of shape \[6, 3\] that requires grad beside parameters"):
            step(True, model, losses, method, said)
    # The cure: say who is trained. What is not gets what a plain sum gives it.
    expected = by_hand(method, make(method), list(losses.values()), [*every, x], every)
    step(True, model, losses, method, model.parameters())
    assert_right([*every, x], expected, strides=method != "fixed")


@pytest.mark.parametrize("level", ["parameters", "features"])
def test_an_input_behind_the_features_of_a_loop(level):
    """At the features nothing is taken at it, so nothing has to be said."""
    net = a_net()
    net.x.requires_grad_()
    losses, z = net.losses()
    at = [z] if level == "features" else None
    ends = [*net.parameters(), net.x]
    shared = net.shared() if level == "parameters" else [*net.shared(), net.x]
    expected = by_hand("mgda", make("mgda", 3), list(losses.values()), ends, shared, at=at)
    if level == "parameters":
        with pytest.raises(ValueError, match=r"be an iterable where tensors that are no nn\.Parameter are shared too"):
            step(True, net, losses, "mgda", None, z)
    given = net.shared()[1:] if level == "parameters" else None  # without the one that nobody reads
    step(True, net, losses, "mgda", given, z, level=level)
    assert_right(ends, expected)


@pytest.mark.parametrize("method", WITH_ORDER)
def test_raw_tensors_of_a_loop_are_its_parameters(method):
    generator = torch.Generator().manual_seed(0)
    w, a, b = (torch.randn(3, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(3))
    losses = {"a": (w * a).square().sum(), "b": (w.sin() @ b - 1).square()}
    expected = by_hand(method, make(method), list(losses.values()), [w, a, b], [w])
    step(True, None, losses, method, None)
    assert_right([w, a, b], expected)


@pytest.mark.parametrize("method", WITH_ORDER)
def test_a_private_raw_tensor_beside_shared_parameters_just_gets_its_gradient(method):
    net = a_net()
    offset = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    losses, _ = net.losses()
    losses["a"] = losses["a"] + (offset - 2).square().sum()
    ends = [*net.parameters(), offset]
    expected = by_hand(method, make(method, 3), list(losses.values()), ends, net.shared())
    step(True, net, losses, method, None)
    assert_right(ends, expected)


@pytest.mark.parametrize("loop", [False, True])
def test_physics_informed_losses(loop):
    """A residual with second derivatives and a boundary condition, over the whole network."""
    torch.manual_seed(1)
    model = Potential().double()
    inside, edge = torch.randn(5, 3).double().requires_grad_(), torch.randn(4, 3).double()
    (slope,) = torch.autograd.grad(model(inside).sum(), inside, create_graph=True)
    (bend,) = torch.autograd.grad(slope[:, 0].sum(), inside, create_graph=True)
    losses = {"inside": (bend[:, 0] + slope[:, 1]).square().mean(), "edge": (model(edge) - 1).square().mean()}
    every: Iterable[Any] = list(model.parameters())
    expected = by_hand("pcgrad", make("pcgrad"), list(losses.values()), every, every)
    step(loop, model, losses, "pcgrad", model.parameters() if loop else "all")
    assert_right(every, expected)
