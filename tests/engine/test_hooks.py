"""Hooks of tensors see the final gradient once, as in an ordinary backward, and no gradient inside the engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_mtl
from lightning_mtl.balancers import load
from tests.engine.by_hand import WAYS, Net, Own, assert_right, by_hand, make, train

HOOKS: dict[str, Callable[[Tensor], Tensor]] = {"reversed": lambda g: -g, "scaled": lambda g: 0.5 * g}
METHODS = ("fixed", "pcgrad", "mgda", "gradnorm", "moco")


class Hooked(nn.Module):
    """An encoder that has a hook on its output, or on a tensor further inside."""

    def __init__(self, hook: Callable[[Tensor], Tensor], inside: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 4), nn.Linear(4, 4)
        self.hook, self.inside = hook, inside

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        z = torch.tanh(self.second(h))
        (h if self.inside else z).register_hook(self.hook)
        return z


def a_net(encoder: nn.Module | None = None) -> Net:
    torch.manual_seed(0)
    encoder = encoder or nn.Sequential(nn.Linear(5, 4), nn.Tanh())
    heads = {name: nn.Linear(4, 1).double() for name in "ab"}
    targets = {name: torch.randn(6, 1).double() for name in "ab"}
    return Net(encoder.double(), heads, torch.randn(6, 5).double(), targets)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("method", METHODS)
def test_a_hook_of_a_feature_runs_once_in_each_gradient(method, hook, inside, way):
    net, balancer = a_net(Hooked(HOOKS[hook], inside)), make(method)
    losses, _ = net.losses()
    expected = by_hand(method, balancer, list(losses.values()), net.parameters(), net.shared())
    train(way, net, balancer)
    assert_right(net.parameters(), expected)


class Reversing(nn.Linear):
    """A head whose gradient arrives at the encoder turned round, as for an adversarial domain."""

    def forward(self, z: Tensor) -> Tensor:
        z = z.view_as(z)
        z.register_hook(HOOKS["reversed"])
        return super().forward(z)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("weight_heads", [False, True])
@pytest.mark.parametrize("method", ["fixed", "pcgrad", "gradnorm"])
def test_a_hook_inside_a_head(method, weight_heads, way):
    net, balancer = a_net(), make(method)
    net.heads["a"] = Reversing(4, 1).double()
    losses, _ = net.losses()
    options = {"weight_heads": weight_heads}
    expected = by_hand(method, balancer, list(losses.values()), net.parameters(), net.shared(), **options)
    train(way, net, balancer, **options)
    assert_right(net.parameters(), expected)


@pytest.mark.parametrize("level", ["parameters", "features"])
@pytest.mark.parametrize("weight_heads", [False, True])
def test_a_hook_of_what_a_declared_head_reads(weight_heads, level):
    class OnItsInput(nn.Linear):
        def forward(self, z: Tensor) -> Tensor:
            z.register_hook(HOOKS["reversed"])
            return super().forward(z)

    net, plain = a_net(), a_net()
    net.heads["a"], plain.heads["a"] = OnItsInput(4, 1).double(), Reversing(4, 1).double()
    plain.heads["a"].load_state_dict(net.heads["a"].state_dict())
    for one in (net, plain):
        train("declared", one, make("mgda"), level, weight_heads=weight_heads)
    assert_right(net.parameters(), [parameter.grad for parameter in plain.parameters()])


@pytest.mark.parametrize("way", ["declared", "told", "loop_told"])
def test_at_level_features_it_runs_on_the_way_into_the_encoder(way):
    net = a_net(Hooked(HOOKS["scaled"], False))
    weights = train(way, net, make("mgda"), "features").weights
    losses, _ = net.losses()
    rows = [torch.autograd.grad(loss, net.shared(), retain_graph=True) for loss in losses.values()]
    assert_right(
        net.shared(), [sum(w * g for w, g in zip(weights, column, strict=True)) for column in zip(*rows, strict=True)]
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", METHODS)
def test_a_hook_of_a_parameter_sees_the_final_gradient_alone(method, way):
    net, balancer, seen = a_net(), make(method), {}
    losses, _ = net.losses()
    expected = by_hand(method, balancer, list(losses.values()), net.parameters(), net.shared())

    def hook(place: int) -> Callable[[Tensor], Tensor]:
        def scale(grad: Tensor) -> Tensor:
            seen.setdefault(place, []).append(grad.clone())
            return 3 * grad

        return scale

    handles = [parameter.register_hook(hook(place)) for place, parameter in enumerate(net.parameters())]
    train(way, net, balancer)
    assert_right(net.parameters(), [3 * grad for grad in expected])
    assert [len(seen[place]) for place in range(len(expected))] == [1] * len(expected)
    for handle in handles:
        handle.remove()
    before = [len(grads) for grads in seen.values()]
    train(way, net, make(method))
    assert [len(grads) for grads in seen.values()] == before


@pytest.mark.parametrize("level", ["parameters", "features"])
def test_hooks_are_in_place_again_after_an_error(level):
    net = a_net(Hooked(HOOKS["scaled"], False))
    losses, z = net.losses()
    weight = net.parameters()[0]
    weight.register_hook(HOOKS["scaled"])

    def fails(grad: Tensor) -> Any:
        raise RuntimeError("of the user's")

    net.heads["a"].weight.register_hook(lambda grad: grad)
    bad = losses["a"] * 1
    bad.register_hook(fails)
    with pytest.raises(RuntimeError, match="of the user's"):
        lightning_mtl.backward({"a": bad, "b": losses["b"]}, load("mgda", 2), z, level=level)
    assert len(weight._backward_hooks) == len(z._backward_hooks) == len(net.heads["a"].weight._backward_hooks) == 1


def test_what_a_feature_retains_is_no_sum_over_inner_passes():
    net = a_net()
    losses, z = net.losses()
    z.retain_grad()
    losses, features = {name: net.loss(name, head(z)) for name, head in net.heads.items()}, z
    rows = [torch.autograd.grad(loss, z, retain_graph=True)[0] for loss in losses.values()]
    z.grad = None
    balance = lightning_mtl.backward(losses, load("mgda", 2), features, level="features")
    want = sum(w * row for w, row in zip(balance.weights, rows, strict=True))
    torch.testing.assert_close(z.grad, want)


@pytest.mark.parametrize("level", ["parameters", "features"])
@pytest.mark.parametrize("method", ["pcgrad", "gradnorm", "moco"])
def test_a_graph_of_the_gradients_is_refused(method, level):
    if (method, level) == ("moco", "features"):
        pytest.skip("rows are taken at the parameters only")
    net = a_net()
    losses, z = net.losses()
    module = Own([net.encoder, *net.heads.values()], ["a", "b"], make(method), level=level)
    with pytest.raises(RuntimeError, match=r"`create_graph` must be False where the gradients of tasks are compared"):
        torch.autograd.grad(module.balance(losses, z), net.parameters(), create_graph=True)


def test_a_loss_balancer_gives_gradients_with_a_graph():
    net = a_net()
    losses, z = net.losses()
    module = Own([net.encoder, *net.heads.values()], ["a", "b"], make("fixed"))
    grads = torch.autograd.grad(module.balance(losses, z), net.parameters(), create_graph=True)
    assert all(grad.requires_grad for grad in grads)


@pytest.mark.parametrize("method", ["pcgrad", "gradnorm", "mgda"])
def test_a_graph_that_is_retained_goes_backward_again(method):
    net = a_net()
    losses, z = net.losses()
    expected = torch.autograd.grad(losses["a"], net.shared(), retain_graph=True)
    lightning_mtl.backward(losses, make(method), z, backward_fn=lambda loss: loss.backward(retain_graph=True))
    for grad, want in zip(torch.autograd.grad(losses["a"], net.shared()), expected, strict=True):
        torch.testing.assert_close(grad, want)
