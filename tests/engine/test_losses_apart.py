"""Losses that come from one node, or are given in pairs: told apart, or refused with a cure that works."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_mtl
from tests.engine.by_hand import HALVES, METHODS, Net, Own, assert_right, by_hand, make

BESIDE = "be apart in the graph where it shall tell who is shared"


class TwoLosses(torch.autograd.Function):
    """A criterion of one node, as a fused kernel is."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(a, b)
        return a.square().mean(), (b - 1).square().mean()

    @staticmethod
    def backward(ctx: Any, grad_a: Tensor, grad_b: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return grad_a * 2 * a / a.numel(), grad_b * 2 * (b - 1) / b.numel()


def a_net() -> Net:
    torch.manual_seed(4)
    x = torch.randn(8, 3).double()
    encoder = nn.Sequential(nn.Linear(3, 4), nn.Tanh()).double()
    return Net(encoder, {name: nn.Linear(4, 1).double() for name in "ab"}, x, {"a": x[:, :1], "b": 1 - 3 * x[:, :1]})


def joined(how: str, net: Net) -> tuple[dict[str, Any], Tensor, list[Tensor]]:
    """The losses as a user has them, the features, and the same losses apart."""
    z = net.encoder(net.x)
    outputs = [head(z) for head in net.heads.values()]
    apart = [net.loss(name, out) for name, out in zip("ab", outputs, strict=True)]
    if how == "one criterion":
        a, b = TwoLosses.apply(*outputs)
        apart = [outputs[0].square().mean(), (outputs[1] - 1).square().mean()]
        return {"a": a, "b": b}, z, apart
    if how == "one criterion, then scaled":
        a, b = TwoLosses.apply(*outputs)
        apart = [2 * outputs[0].square().mean(), (outputs[1] - 1).square().mean() + 1]
        return {"a": 2 * a, "b": b + 1}, z, apart
    stack = torch.stack(apart)
    if how == "unbound":
        return dict(zip("ab", stack, strict=True)), z, apart
    if how == "picked":
        return {"a": stack[0], "b": stack[1]}, z, apart
    if how == "weighted and picked":
        stack = stack * torch.tensor([2.0, 3.0]).double()
        return {"a": stack[0], "b": stack[1] + 0.5}, z, [2 * apart[0], 3 * apart[1] + 0.5]
    raise AssertionError


JOINED = ("one criterion", "one criterion, then scaled", "unbound", "picked", "weighted and picked")


def step(loop: bool, net: Net, losses: Any, method: str, features: Any = None, **options: Any) -> None:
    if loop:
        lightning_mtl.backward(losses, make(method, len(losses)), features, **options)
    else:
        module = Own([net.encoder, *net.heads.values()], list(losses), make(method, len(losses)))
        module.balance(losses, features, **options).backward()


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("method", [method for method in METHODS if method not in ("fixed", "graddrop")])
@pytest.mark.parametrize("how", JOINED)
def test_scalars_of_one_node_are_refused_and_each_cure_works(how, method, loop):
    net = a_net()
    losses, z, _ = joined(how, net)
    with pytest.raises(ValueError, match=BESIDE):
        step(loop, net, losses, method)
    for cure in ("apart", "features", "shared"):
        net = a_net()
        losses, z, apart = joined(how, net)
        expected = by_hand(method, make(method), apart, net.parameters(), net.shared())
        if cure == "apart":
            step(loop, net, dict(zip("ab", apart, strict=True)), method)
        else:
            step(loop, net, losses, method, **({"features": z} if cure == "features" else {"shared": net.shared()}))
        assert_right(net.parameters(), expected)


@pytest.mark.parametrize("loop", [False, True])
def test_a_loss_balancer_does_not_ask(loop):
    for how in JOINED:
        net = a_net()
        losses, _, apart = joined(how, net)
        expected = by_hand("fixed", make("fixed"), apart, net.parameters(), net.shared())
        step(loop, net, losses, "fixed")
        assert_right(net.parameters(), expected)


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("how", ["one term for both", "one loss for both", "stacked within a task", "one head"])
def test_scalars_that_are_really_shared_are_taken(how, loop):
    net = a_net()
    losses, z = net.losses()
    (a, b), shared = losses.values(), net.shared()
    if how == "one term for both":
        term = torch.stack([z.mean(), z.std()]).sum()
        a, b = a + term, b + 2 * term
    elif how == "one loss for both":
        b, shared = a, [*shared, *net.heads["a"].parameters()]
    elif how == "stacked within a task":
        a = torch.stack([a, z.mean()]).sum()
    else:  # one head: its columns are the tasks
        head = net.heads["a"] = nn.Linear(4, 2).double()
        a, b = (head(z) - 1).square().mean(0)
        shared = [*shared, *head.parameters()]
    expected = by_hand("mgda", make("mgda"), [a, b], net.parameters(), shared)
    step(loop, net, {"a": a, "b": b}, "mgda")
    assert_right(net.parameters(), expected)


# Pairs: the losses of two halves of the batch.


def halves(net: Net) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
    z = net.encoder(net.x)
    outputs = {name: head(z) for name, head in net.heads.items()}
    parts = (slice(0, None, 2), slice(1, None, 2))
    return {
        name: tuple((out[part] - net.targets[name][part]).square().mean() for part in parts)
        for name, out in outputs.items()
    }, z


@pytest.mark.parametrize("way", ["declared", "told", "found", "loop_told", "loop"])
@pytest.mark.parametrize("method", HALVES)
def test_pairs_are_compared(method, way):
    net = a_net()
    losses, z = halves(net)
    shares = [pair[half] / 2 for half in (0, 1) for pair in losses.values()]
    expected = by_hand(method, make(method), shares, net.parameters(), net.shared())
    features = z if way.endswith("told") else None
    if way == "declared":
        module = lightning_mtl.MultiTaskModule(net.encoder, {name: net.task(name) for name in "ab"}, make(method))
        module.training_step(net.batch(), 0).backward()
    else:
        step(way.startswith("loop"), net, losses, method, features)
    assert_right(net.parameters(), expected)


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("method", HALVES)
def test_pairs_with_an_absent_task_and_what_was_said_by_hand(method, loop):
    net = a_net()
    losses, _ = halves(net)
    shared = [net.encoder[0].weight]
    shares = [losses["b"][0] / 2, losses["b"][1] / 2]
    expected = by_hand(method, make(method), [None, shares[0], None, shares[1]], net.parameters(), shared)
    step(loop, net, {"a": None, "b": losses["b"]}, method, shared=shared)
    assert_right(net.parameters(), expected)


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("method", HALVES)
def test_pairs_that_were_stacked_are_refused_and_right_with_the_features(method, loop):
    for cure in (False, True):
        net = a_net()
        losses, z = halves(net)
        a, b, c, d = torch.stack([loss for pair in losses.values() for loss in pair])
        if not cure:
            with pytest.raises(ValueError, match=BESIDE):
                step(loop, net, {"a": (a, b), "b": (c, d)}, method)
            continue
        shares = [pair[half] / 2 for half in (0, 1) for pair in losses.values()]
        expected = by_hand(method, make(method), shares, net.parameters(), net.shared())
        step(loop, net, {"a": (a, b), "b": (c, d)}, method, z)
        assert_right(net.parameters(), expected)


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("method", ["fixed", "pcgrad", "moco"])
def test_pairs_for_a_method_that_compares_none_are_refused_and_one_loss_each_is_right(method, loop):
    net = a_net()
    losses, _ = halves(net)
    with pytest.raises(ValueError, match=r"`losses` must hold 1 per task, got 4 for 2 tasks\..*any other one loss per"):
        step(loop, net, losses, method)
    net = a_net()
    sums = {name: (one + other) / 2 for name, (one, other) in halves(net)[0].items()}
    expected = by_hand(method, make(method), list(sums.values()), net.parameters(), net.shared())
    step(loop, net, sums, method)
    assert_right(net.parameters(), expected)


@pytest.mark.parametrize("loop", [False, True])
def test_half_a_pair_and_a_single_loss_beside_pairs_are_refused(loop):
    net = a_net()
    losses, _ = halves(net)
    one = losses["b"][0]
    for wrong, got in (
        ((one, None), "2 entries"),
        (one, "one loss"),
        ((one, one, one), "3 entries"),
        ((), "0 entries"),
    ):
        with pytest.raises(ValueError, match=rf"`losses\['b'\]` must be one loss for every task.*, got {got}\."):
            step(loop, net, {**losses, "b": wrong}, "modo")
    with pytest.raises(ValueError, match=r"must hold 2 per task, of two independent samples, got 2 for 2 tasks"):
        step(loop, net, {name: pair[0] for name, pair in losses.items()}, "modo")
