"""Features of every kind: several from one node, computed from each other, parameters, frozen, read by nobody."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import lightning_mtl
from tests.engine.by_hand import (
    GROUPED,
    METHODS,
    TOLD,
    WAYS,
    Net,
    Own,
    assert_right,
    by_hand,
    check,
    make,
    numbers,
    train,
    update_of,
)

LEVELS = ("parameters", "features")
KINDS = ("chunk", "unbind", "function", "compiled")


class Reader(nn.Module):
    """A head that reads some of the features."""

    def __init__(self, *keys: Any) -> None:
        super().__init__()
        self.keys, self.linear = keys, nn.Linear(4 * len(keys), 1)

    def forward(self, z: Any) -> Tensor:
        return self.linear(torch.cat([z[key] for key in self.keys], dim=1))


class SinCos(torch.autograd.Function):
    """Two outputs of one node."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)
        return x.sin(), x.cos()

    @staticmethod
    def backward(ctx: Any, sin: Tensor | None, cos: Tensor | None) -> Tensor:
        (x,) = ctx.saved_tensors
        return (0 if sin is None else sin * x.cos()) - (0 if cos is None else cos * x.sin())


class Parts(nn.Module):
    """Two features that are outputs of one node."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.linear = kind, nn.Linear(3, 4 if kind in ("function", "compiled") else 8)

    def forward(self, x: Tensor) -> Any:
        if self.kind == "compiled":
            return compiled()(x, self.linear.weight)
        h = self.linear(x)
        if self.kind == "chunk":
            return h.tanh().chunk(2, 1)
        if self.kind == "unbind":
            return h.tanh().view(-1, 2, 4).unbind(1)
        return SinCos.apply(h)


@cache
def compiled() -> Any:
    """One graph with two outputs, compiled once for all tests."""
    lightning_mtl.allow_several_backwards()

    def two(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        h = x @ weight.T
        return h.sin(), h.cos()

    return torch.compile(two, backend="aot_eager")


class Pooled(nn.Module):
    """The last hidden state, and what a pooler makes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.pooler = nn.Linear(3, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = torch.tanh(self.linear(x))
        return {"pooled": torch.tanh(self.pooler(hidden)), "hidden": hidden}


class Scales(nn.Module):
    """Three features, each computed from the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        fine = torch.tanh(self.layers[0](x))
        middle = torch.sin(self.layers[1](fine))
        return {"coarse": self.layers[2](middle) * middle, "middle": middle, "hidden": fine}


class Around(Scales):
    """The last feature also has a way around the first."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        below = torch.tanh(self.layers[0](x))
        fine = torch.tanh(self.layers[1](below))
        return {"coarse": self.layers[2](fine) + below, "hidden": fine}


class Query(nn.Module):
    """A parameter among the features, on which the other one depends or not."""

    def __init__(self, depends: bool) -> None:
        super().__init__()
        self.linear, self.depends = nn.Linear(3, 4), depends
        self.query = nn.Parameter(torch.randn(6, 4))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = torch.tanh(self.linear(x))
        return {"z": z * self.query if self.depends else z, "query": self.query}


class Entangled(nn.Module):
    """One output of a node, and what is computed from the other one."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.more = nn.Linear(3, 8), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        one, other = torch.tanh(self.linear(x)).chunk(2, 1)
        return {"one": one, "more": torch.tanh(self.more(other))}


class Unread(nn.Module):
    """A feature that no head reads; it is 0 where its root has no slope."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.idle = nn.Linear(3, 4), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"z": torch.tanh(self.linear(x)), "unread": (0 * self.idle(x)).sqrt()}


def net_of(encoder: Callable[[], nn.Module], *reads: tuple[Any, ...], absent: tuple[str, ...] = ()) -> Net:
    torch.manual_seed(3)
    x = torch.randn(6, 3)
    y = {"a": x[:, :1], "b": 1 - 3 * x[:, :1], "c": x[:, 1:2] ** 2}
    heads = {name: Reader(*keys) for name, keys in zip("abc", reads, strict=False)}
    net = Net(encoder(), heads, x.double(), {name: y[name].double() for name in heads}, absent=absent)
    for module in (net.encoder, *heads.values()):
        module.double()
    return net


INDEPENDENT: dict[str, Callable[..., Net]] = {
    kind: lambda kind=kind, **more: net_of(lambda: Parts(kind), (0,), (1,), (0, 1), **more) for kind in KINDS
} | {
    "query": lambda **more: net_of(lambda: Query(False), ("z",), ("z", "query"), ("query",), **more),
    "entangled": lambda **more: net_of(Entangled, ("one",), ("more",), ("one", "more"), **more),
    "unread": lambda **more: net_of(Unread, ("z",), ("z",), ("z",), **more),
}
DEPENDENT: dict[str, Callable[..., Net]] = {
    "pooled": lambda **more: net_of(Pooled, ("hidden",), ("pooled",), ("hidden", "pooled"), **more),
    "only_pooled": lambda **more: net_of(Pooled, ("pooled",), ("pooled",), **more),
    "scales": lambda **more: net_of(Scales, ("hidden", "coarse"), ("middle",), ("coarse",), **more),
}
NOT_CUT: dict[str, Callable[..., Net]] = {
    "around": lambda **more: net_of(Around, ("hidden",), ("coarse",), ("hidden", "coarse"), **more),
    "depends_on_query": lambda **more: net_of(lambda: Query(True), ("z",), ("z", "query"), ("query",), **more),
}
EVERY = INDEPENDENT | DEPENDENT | NOT_CUT


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", ["fixed", "mgda", "moco"])
@pytest.mark.parametrize("name", EVERY)
def test_rows_at_the_parameters(name, method, way):
    net = EVERY[name]()
    check(net, method, way, shared=None if way in TOLD else reached_by_two(net))


def reached_by_two(net: Net) -> list[nn.Parameter]:
    losses = [loss for loss in net.losses()[0].values() if loss is not None]
    grads = [torch.autograd.grad(loss, net.parameters(), retain_graph=True, allow_unused=True) for loss in losses]
    return [p for i, p in enumerate(net.parameters()) if sum(task[i] is not None for task in grads) > 1]


@pytest.mark.parametrize("absent", [("a",), ("b",), ("c",), ("a", "c")])
@pytest.mark.parametrize("way", TOLD)
@pytest.mark.parametrize("name", [name for name in EVERY if name != "only_pooled"])
def test_rows_with_absent_tasks(name, way, absent):
    check(EVERY[name](absent=absent), "mgda", way)


@pytest.mark.parametrize("weight_heads", [False, True])
@pytest.mark.parametrize("way", TOLD)
@pytest.mark.parametrize("method", ["pcgrad", "mgda"])
@pytest.mark.parametrize("name", INDEPENDENT)
def test_rows_at_independent_features(name, method, way, weight_heads):
    check(INDEPENDENT[name](), method, way, "features", weight_heads=weight_heads)


@pytest.mark.parametrize("way", ["told", "loop_told"])
@pytest.mark.parametrize("method", ["pcgrad", "mgda", "gradnorm"])
@pytest.mark.parametrize("name", DEPENDENT)
def test_of_dependent_features_the_rows_are_those_of_the_first_and_the_weights_apply_to_all(name, method, way):
    check(DEPENDENT[name](), method, way, "features", at=lambda z: [z["hidden"]])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("way", ["told", "loop_told"])
@pytest.mark.parametrize("name", [*INDEPENDENT, *DEPENDENT])
def test_a_step_without_a_solve_applies_the_last_weights_to_all_that_lies_behind(name, way, level):
    net = EVERY[name]()
    balancer = make("mgda", len(net.heads), every_n_steps=2)
    train(way, net, balancer, level)
    weights = balancer.last_weights.tolist()
    for parameter in net.parameters():
        parameter.grad = None
    losses, shared = list(net.losses()[0].values()), {id(p) for p in net.shared()}
    grads = [torch.autograd.grad(loss, net.parameters(), retain_graph=True, allow_unused=True) for loss in losses]
    expected = []
    for p, column in zip(net.parameters(), zip(*grads, strict=True), strict=True):
        factors = weights if id(p) in shared else [1.0] * len(losses)
        terms = [factor * grad for factor, grad in zip(factors, column, strict=True) if grad is not None]
        expected.append(sum(terms) if terms else None)
    train(way, net, balancer, level)
    assert_right(net.parameters(), expected)


@pytest.mark.parametrize("method", ["pcgrad", "mgda"])
@pytest.mark.parametrize("name", [*DEPENDENT, *NOT_CUT])
def test_a_declared_module_takes_rows_at_each_feature_as_its_heads_read_it(name, method):
    net, balancer = EVERY[name](), make(method, len(EVERY[name]().heads))
    losses, z = net.losses()
    rows = []
    for task, head in net.heads.items():
        leaves = tree_map(lambda t: t.detach().requires_grad_(), z)
        ends = tree_leaves(leaves)
        grads = torch.autograd.grad(net.loss(task, head(leaves)), ends, allow_unused=True)
        rows.append(torch.cat([numbers(grad, end) for grad, end in zip(grads, ends, strict=True)]))
    weights, _ = update_of(method, rows, range(len(rows)), balancer)
    whole = [torch.autograd.grad(t, net.parameters(), retain_graph=True, allow_unused=True) for t in losses.values()]
    inside = {id(p) for p in net.shared()}
    expected = [
        sum((w if id(p) in inside else 1.0) * g for w, g in zip(weights, column, strict=True) if g is not None)
        for p, column in zip(net.parameters(), zip(*whole, strict=True), strict=True)
    ]
    train("declared", net, balancer, "features")
    assert_right(net.parameters(), expected)


@pytest.mark.parametrize("way", ["told", "loop_told"])
@pytest.mark.parametrize("name", NOT_CUT)
def test_features_that_are_no_cut_are_refused_at_level_features_and_right_at_level_parameters(name, way):
    with pytest.raises(ValueError, match='must be "parameters" where no cut at the features gives the whole gradient'):
        train(way, NOT_CUT[name](), make("mgda", 3), "features")
    check(NOT_CUT[name](), "mgda", way)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["told", "loop_told"])
def test_the_other_output_of_the_node_is_a_way_beside(kind, level, way):
    net = net_of(lambda: Parts(kind), (0,), (1,))
    losses, z = net.losses()
    with pytest.raises(ValueError, match=r"also reach .* beside them\. Add the other tensors"):
        step(way, net, losses, z[0], level)
    check(net, "mgda", way, level)


def step(
    way: str, net: Net, losses: dict[str, Tensor], features: Any, level: str = "parameters", **options: Any
) -> None:
    """As ``train``, with other features than the encoder's output."""
    balancer = make("mgda", len(losses))
    if way.startswith("loop"):
        lightning_mtl.backward(losses, balancer, features, level=level, **options)
    else:
        module = Own([net.encoder, *net.heads.values()], list(losses), balancer, level=level)
        module.balance(losses, features, **options).backward()


@pytest.mark.parametrize("way", TOLD)
@pytest.mark.parametrize("level", LEVELS)
def test_what_no_head_reads_stays_without_a_gradient(way, level):
    net = INDEPENDENT["unread"]()
    train(way, net, make("mgda", 3), level)
    assert net.encoder.idle.weight.grad is None
    assert net.encoder.linear.weight.grad.isfinite().all()


@pytest.mark.parametrize("way", ["declared", "told", "loop"])
@pytest.mark.parametrize("method", [*METHODS, *GROUPED])
@pytest.mark.parametrize("absent", [(), ("b",)])
def test_a_frozen_encoder_leaves_the_heads_a_plain_sum(way, method, absent):
    for level in LEVELS if method in ("fixed", "mgda") else LEVELS[:1]:
        net = net_of(lambda: Parts("chunk"), (0,), (1,), (0, 1), absent=absent)
        net.encoder.requires_grad_(False)
        check(net, method, way, level)


def test_a_loop_knows_of_no_frozen_encoder():
    net = net_of(lambda: Parts("chunk"), (0,), (1,))
    net.encoder.requires_grad_(False)
    with pytest.raises(ValueError, match="for a frozen encoder leave features out"):
        train("loop_told", net, make("mgda"))
    check(net, "mgda", "loop")


@pytest.mark.parametrize("way", TOLD)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("absent", [(), ("b",)])
def test_a_half_frozen_encoder(way, level, absent):
    net = DEPENDENT["scales"](absent=absent)
    net.encoder.layers[0].requires_grad_(False)
    at = (lambda z: [z["middle"]]) if way != "declared" else tree_leaves
    if way == "declared" and level == "features":
        return  # its rows are partial derivatives, which have a test of their own
    check(net, "mgda", way, level, at=at)


@pytest.mark.parametrize("way", ["told", "loop_told"])
def test_features_that_were_detached_are_refused(way):
    net = net_of(lambda: Parts("chunk"), (0,), (1,))
    losses, z = net.losses()
    with pytest.raises(ValueError, match="`features` must require grad, got tensors without a gradient"):
        step(way, net, losses, [part.detach() for part in z])
    with pytest.raises(ValueError, match=r"also reach .* beside them"):
        step(way, net, losses, [z[0], z[1].detach()])
    expected = by_hand("mgda", make("mgda"), list(losses.values()), net.parameters(), net.shared())
    step(way, net, losses, z)
    assert_right(net.parameters(), expected)


@pytest.mark.parametrize("way", ["told", "loop_told"])
def test_a_penalty_beside_the_features_is_refused_and_both_cures_work(way):
    for cure in ("leave", "add"):
        net = net_of(lambda: Parts("chunk"), (0,), (1,))
        losses, z = net.losses()
        losses["a"] = losses["a"] + 0.3 * net.encoder.linear.weight.square().sum()
        with pytest.raises(ValueError, match=r"beside them\. Add the other tensors, as in features=\(z, skip\), or"):
            step(way, net, losses, z)
        expected = by_hand("mgda", make("mgda"), list(losses.values()), net.parameters(), net.shared())
        step(way, net, losses, None if cure == "leave" else (z, net.encoder.linear.weight))
        assert_right(net.parameters(), expected)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("way", ["told", "loop_told"])
@pytest.mark.parametrize("how", ["activation", "view", "after_the_name_was_given"])
def test_features_that_were_changed_in_place(how, level, way):
    net = net_of(lambda: nn.Linear(3, 4))
    heads = net.heads = {name: nn.Linear(4, 1).double() for name in "ab"}
    z = named = net.encoder(net.x)
    if how == "activation":
        z = named = torch.sigmoid_(z)
    elif how == "view":
        z[:, :2].mul_(3)
    else:
        z.tanh_()
    losses = {"a": heads["a"](z).square().mean(), "b": (heads["b"](z) - 1).abs().mean()}
    at = [named] if level == "features" else None
    expected = by_hand("mgda", make("mgda"), list(losses.values()), net.parameters(), net.shared(), at=at)
    step(way, net, losses, named, level)
    assert_right(net.parameters(), expected)


@pytest.mark.parametrize("kind", ["chunk", "unbind", "function"])
def test_a_declared_module_whose_head_reads_another_output_past_the_features(kind):
    class Past(nn.Module):
        def __init__(self, encoder: nn.Module) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 1).double()
            object.__setattr__(self, "encoder", encoder)

        def forward(self, z: Tensor) -> Tensor:
            return self.linear(self.encoder.other)

    class One(Parts):
        def forward(self, x: Tensor) -> Tensor:
            z, self.other = super().forward(x)
            return z

    net = net_of(lambda: One(kind), (0,), (0,))
    net.heads = {"a": nn.Linear(4, 1).double(), "b": Past(net.encoder)}
    with pytest.raises(ValueError, match="return everything that heads and losses read of it"):
        train("declared", net, make("mgda"))
