"""The last shared layer is one that every present task reaches: its gram is compared with one taken by hand."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_mtl
from lightning_mtl.balancers import load
from lightning_mtl.types import Balance
from tests.engine.by_hand import Net, Own, assert_right, by_hand, make, numbers


class Deep(nn.Module):
    """Three layers, of which each may be read; an extra module at the end."""

    def __init__(self, last: Callable[[], nn.Module] | None = None, *, used: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4)])
        self.last = last() if last else None
        self.used = used

    def forward(self, x: Tensor) -> list[Tensor]:
        found = []
        for layer in self.layers:
            x = torch.tanh(layer(x))
            found.append(x)
        if self.used and self.last is not None:
            found[-1] = self.last(x)
        return found


class At(nn.Module):
    """A head at one depth."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.depth, self.linear = depth, nn.Linear(4, 1)

    def forward(self, z: Sequence[Tensor]) -> Tensor:
        return self.linear(z[self.depth])


class RootMeanSquareNorm(nn.Module):
    """A normalisation of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain / (x.square().mean(1, keepdim=True) + 1e-6).sqrt()


def a_net(depths: Sequence[int], encoder: nn.Module | None = None, absent: Sequence[str] = ()) -> Net:
    torch.manual_seed(8)
    x = torch.randn(6, 3).double()
    heads = {name: At(depth).double() for name, depth in zip("abc", depths, strict=False)}
    y = {"a": x[:, :1], "b": 1 - 3 * x[:, :1], "c": x[:, 1:2] ** 2}
    return Net((encoder or Deep()).double(), heads, x, {name: y[name] for name in heads}, absent=absent)


def gram_by_hand(losses: Sequence[Tensor], layer: Sequence[Tensor]) -> Tensor:
    rows = []
    for loss in losses:
        grads = torch.autograd.grad(loss, list(layer), retain_graph=True, allow_unused=True)
        rows.append(torch.cat([numbers(grad, p) for grad, p in zip(grads, layer, strict=True)]))
    return torch.stack([torch.stack([a @ b for b in rows]) for a in rows])


def gradnorm(num_tasks: int, **options: Any) -> Any:
    return make("gradnorm", num_tasks, **({"norms_at": "last_layer"} | options))


def step(way: str, net: Net, balancer: Any, **options: Any) -> Balance:
    if way == "declared":
        tasks = {name: net.task(name) for name in net.heads}
        module: Any = lightning_mtl.MultiTaskModule(net.encoder, tasks, balancer, **options)
        module.training_step(net.batch(), 0).backward()
        return module.last_balance
    losses, z = net.losses()
    features = z if way.endswith("told") else None
    if way.startswith("loop"):
        return lightning_mtl.backward(losses, balancer, features, **options)
    shared = options.pop("shared", None)
    module = Own([net.encoder, *net.heads.values()], list(net.heads), balancer, **options)
    module.balance(losses, features, shared=shared).backward()
    return module.last_balance


def check(way: str, net: Net, layer: Sequence[Tensor], **options: Any) -> None:
    losses, _ = net.losses()
    there = [loss for loss in losses.values() if loss is not None]
    want = gram_by_hand(there, layer)
    every = list(losses.values())
    shared = net.shared()
    if way == "found":
        grads = [torch.autograd.grad(t, net.parameters(), retain_graph=True, allow_unused=True) for t in there]
        met = [sum(task[i] is not None for task in grads) > 1 for i in range(len(net.parameters()))]
        shared = [p for p, flag in zip(net.parameters(), met, strict=True) if flag]
    expected = by_hand("gradnorm", gradnorm(len(every)), every, net.parameters(), shared)
    balance = step(way, net, gradnorm(len(every)), **options)
    present = [task for task, loss in enumerate(every) if loss is not None]
    assert balance.gram is not None
    torch.testing.assert_close(balance.gram[present][:, present], want, rtol=1e-9, atol=1e-12)
    assert_right(net.parameters(), expected, or_zero=way == "declared" and bool(net.absent))


MODULES = pytest.mark.parametrize("way", ["declared", "told", "found"])


@MODULES
def test_a_layer_that_no_task_reaches_is_not_it(way):
    net = a_net([2, 2, 2], Deep(lambda: nn.Linear(4, 7)))
    check(way, net, list(net.encoder.layers[2].parameters()))


@MODULES
def test_heads_at_three_depths_meet_at_the_first(way):
    net = a_net([0, 1, 2])
    check(way, net, list(net.encoder.layers[0].parameters()))


@pytest.mark.parametrize("absent, depth", [(("a",), 1), (("b",), 0), (("c",), 0), (("a", "b"), 2)])
@pytest.mark.parametrize("way", ["declared", "told"])
def test_only_present_tasks_count(way, absent, depth):
    net = a_net([0, 1, 2], absent=absent)
    check(way, net, list(net.encoder.layers[depth].parameters()))


def test_who_is_present_may_change_from_step_to_step():
    net, seen = a_net([0, 1, 2]), []
    module = Own([net.encoder, *net.heads.values()], list(net.heads), gradnorm(3))
    for absent in ((), ("a",), (), ("a", "b")):
        net.absent = absent
        losses, z = net.losses()
        there = [loss for loss in losses.values() if loss is not None]
        depth = {0: 0, 1: 1, 2: 2}[len(absent)]
        want = gram_by_hand(there, list(net.encoder.layers[depth].parameters()))
        module.balance(losses, z).backward()
        present = [task for task, loss in enumerate(losses.values()) if loss is not None]
        seen.append(torch.allclose(module.last_balance.gram[present][:, present], want, rtol=1e-9))
    assert all(seen)


@MODULES
@pytest.mark.parametrize(
    "norm", [lambda: nn.LayerNorm(4), lambda: nn.BatchNorm1d(4), lambda: nn.GroupNorm(2, 4), RootMeanSquareNorm]
)
def test_normalisation_is_passed_over(norm, way):
    net = a_net([2, 2], Deep(norm, used=True))
    net.encoder.last.eval()  # its statistics do not move between the two looks at them
    check(way, net, list(net.encoder.layers[2].parameters()))


@MODULES
def test_normalisation_is_taken_where_there_is_nothing_else(way):
    net = a_net([2, 2], Deep(lambda: nn.LayerNorm(4), used=True))
    net.encoder.layers.requires_grad_(False)
    check(way, net, list(net.encoder.last.parameters()))


@MODULES
def test_a_parametrised_layer(way):
    net = a_net([2, 2], Deep(lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), used=True))
    check(way, net, list(net.encoder.last.parametrizations.weight.parameters()))


@MODULES
def test_sparse_gradients_at_the_last_layer(way):
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(5, 4, sparse=True)

        def forward(self, x: Tensor) -> list[Tensor]:
            return [self.words((x[:, 0] * 10).long() % 5)]

    net = a_net([0, 0], Words())
    check(way, net, [net.encoder.words.weight])


@pytest.mark.parametrize("way", ["told", "found", "loop_told", "loop"])
def test_a_layer_that_is_told(way):
    net = a_net([1, 2, 1])
    layer = list(net.encoder.layers[1].parameters())
    told = {"last_layer": layer if way.startswith("loop") else net.encoder.layers[1]}
    want = gram_by_hand(list(net.losses()[0].values()), layer)
    balance = step(way, net, gradnorm(3), **told)
    torch.testing.assert_close(balance.gram, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("way", ["declared", "told", "found", "loop_told"])
def test_a_layer_that_is_told_but_that_not_all_reach_is_refused_and_shared_norms_are_right(way):
    net = a_net([0, 2, 2])
    layer = net.encoder.layers[2]
    with pytest.raises(ValueError, match=r'be reached by every task of the batch.*Pass norms_at="shared"'):
        step(way, net, gradnorm(3), last_layer=list(layer.parameters()) if way.startswith("loop") else layer)
    want = gram_by_hand(list(net.losses()[0].values()), list(net.encoder.parameters()))
    balance = step(way, net, gradnorm(3, norms_at="shared"))
    torch.testing.assert_close(balance.gram, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("way", ["told", "found", "loop_told"])
def test_a_layer_that_is_no_part_of_what_is_shared_is_refused(way):
    net = a_net([2, 2])
    head = net.heads["a"]
    with pytest.raises(ValueError, match="be a part of what the tasks share"):
        step(way, net, gradnorm(2), last_layer=list(head.parameters()) if way.startswith("loop") else head)


class Chain(nn.Module):
    """The first two tasks share one layer, the last two another: no layer serves all."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 4), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> list[Tensor]:
        left, right = torch.tanh(self.left(x)), torch.tanh(self.right(x))
        return [left, left * right, right]


@pytest.mark.parametrize("way", ["declared", "told", "found"])
def test_where_no_layer_serves_all_it_is_said_in_the_first_step_and_shared_norms_are_right(way):
    net = a_net([0, 1, 2], Chain())
    expected = r'be reached by every task of the batch, .* got no such layer\. Pass norms_at="shared" to the balancer'
    with pytest.raises(ValueError, match=expected):
        step(way, net, gradnorm(3))
    want = gram_by_hand(list(net.losses()[0].values()), list(net.encoder.parameters()))
    balance = step(way, net, gradnorm(3, norms_at="shared"))
    torch.testing.assert_close(balance.gram, want, rtol=1e-9, atol=1e-12)


def test_a_loop_knows_no_modules_and_asks_for_the_layer():
    net = a_net([2, 2])
    with pytest.raises(ValueError, match='Pass norms_at="shared" to the balancer, or last_layer='):
        step("loop", net, gradnorm(2))
    step("loop", net, gradnorm(2), last_layer=net.encoder.layers[2].parameters())


def test_at_the_features_no_layer_is_needed():
    net = a_net([0, 1, 2], Chain())
    losses, z = net.losses()
    want = gram_by_hand(list(losses.values()), [z[0], z[2]])  # the other is computed from these
    balance = step("told", net, gradnorm(3), level="features")
    torch.testing.assert_close(balance.gram, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["pcgrad", "mgda"])
def test_methods_that_do_not_look_at_it_do_not_ask_for_it(name):
    net = a_net([0, 1, 2], Chain())
    assert step("told", net, load(name, 3)).gram is not None


def test_the_layer_is_said_once(caplog):
    net = a_net([0, 1, 2])
    module = Own([net.encoder, *net.heads.values()], list(net.heads), gradnorm(3))
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            losses, z = net.losses()
            module.balance(losses, z).backward()
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "GradNorm compares the gradients of the tasks at 'parts.0.layers.0.weight', 'parts.0.layers.0.bias'."
    ]
