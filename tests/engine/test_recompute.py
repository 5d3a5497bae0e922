"""Activations that are computed again in the backward: gradients are right, and the step counts once in all buffers."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lightning_mtl
from tests.engine.by_hand import TOLD, WAYS, Net, assert_right, by_hand, make, train

TASKS = [f"t{number}" for number in range(10)]


class Recomputed(nn.Module):
    """Its parts are computed again in the backward."""

    def __init__(self, *parts: nn.Module, nested: bool = False) -> None:
        super().__init__()
        self.parts, self.nested = nn.ModuleList(parts), nested

    def forward(self, x: Tensor) -> Tensor:
        if not self.nested:
            return checkpoint(self.run, x, use_reentrant=False)
        return checkpoint(lambda x: checkpoint(self.run, torch.sin(x), use_reentrant=False), x, use_reentrant=False)

    def run(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = torch.tanh(part(x))
        return x


class Tracked(nn.Module):
    """Statistics of the user's own: written in place, bound anew, written into a child, counted by a function."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.child = nn.Linear(4, 4, bias=False), nn.Module()
        self.register_buffer("in_place", torch.zeros(4))
        self.register_buffer("anew", torch.zeros(4))
        self.register_buffer("by_function", torch.zeros(4))
        self.child.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        if self.training:
            self.in_place.lerp_(x.detach().mean(0).to(self.in_place), 0.1)
            self.anew = 0.9 * self.anew + x.detach().mean(0)
            self.child.calls += 1
            x = F.batch_norm(x, self.by_function, torch.ones_like(self.by_function), training=True)
        return x


def old_spectral_norm() -> nn.Module:
    return nn.utils.spectral_norm(nn.Linear(4, 4))


ENCODERS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: Recomputed(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 4)),
    "a sequence": lambda: Recomputed(nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 4))),
    "nested": lambda: Recomputed(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nested=True),
    "one in another": lambda: Recomputed(nn.Linear(3, 4), Recomputed(nn.BatchNorm1d(4), nn.Linear(4, 4))),
    "dropout": lambda: Recomputed(nn.Linear(3, 4), nn.Dropout(0.5), nn.BatchNorm1d(4)),
    "own statistics": lambda: Recomputed(nn.Linear(3, 4), Tracked()),
    "parametrised": lambda: Recomputed(nn.Linear(3, 4), nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))),
    "spectral norm": lambda: Recomputed(nn.Linear(3, 4), old_spectral_norm(), nn.BatchNorm1d(4)),
    "not tracked": lambda: Recomputed(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False)),
    "instance norm": lambda: nn.Sequential(
        nn.Linear(3, 8),
        nn.Unflatten(1, (2, 4)),
        Recomputed(nn.InstanceNorm1d(2, track_running_stats=True)),
        nn.Flatten(),
        nn.Linear(8, 4),
    ),
}


def net_of(name: str, tasks: list[str] = TASKS) -> Net:
    torch.manual_seed(9)
    x = torch.randn(8, 3).double()
    heads = {task: nn.Linear(4, 1).double() for task in tasks}
    targets = {task: torch.sin(x[:, :1] * number) * (1 - number) for number, task in enumerate(tasks)}
    return Net(ENCODERS[name]().double(), heads, x, targets)


def buffers(module: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


def once(net: Net) -> tuple[Net, dict[str, Tensor], Any]:
    """A copy on which to compute by hand; the buffers after a single forward; its losses and features."""
    copy = deepcopy(net)
    torch.manual_seed(1)
    losses = copy.losses()
    return copy, buffers(copy.encoder), losses


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", ["pcgrad", "mgda", "moco"])
@pytest.mark.parametrize("name", ENCODERS)
def test_of_many_tasks_the_step_counts_once(name, method, way):
    tasks = TASKS if method in ("pcgrad", "moco") else TASKS[:3]
    net = net_of(name, tasks)
    copy, after_one, (losses, _) = once(net)
    balancer = make(method, len(tasks))

    def as_after_the_forward() -> None:  # spectral norm computes with what it keeps
        for key, buffer in copy.encoder.named_buffers():
            buffer.data.copy_(after_one[key])

    every = list(losses.values())
    expected = by_hand(method, balancer, every, copy.parameters(), copy.shared(), before_each=as_after_the_forward)
    torch.manual_seed(1)
    train(way, net, balancer)
    assert_right(net.parameters(), expected)
    for key, buffer in buffers(net.encoder).items():
        torch.testing.assert_close(buffer, after_one[key], rtol=0, atol=0)


@pytest.mark.parametrize("way", TOLD)
@pytest.mark.parametrize("name", [name for name in ENCODERS if name not in ("parametrised", "spectral norm")])
def test_at_the_features_the_encoder_runs_as_often_as_under_a_plain_sum(name, way):
    """There one ordinary backward goes through it, in which torch computes the activations again and counts them."""
    net = net_of(name, TASKS[:3])
    copy, _, (losses, z) = once(net)
    expected = by_hand("mgda", make("mgda", 3), list(losses.values()), copy.parameters(), copy.shared(), at=[z])
    plain = deepcopy(net)
    torch.manual_seed(1)
    torch.stack(list(plain.losses()[0].values())).sum().backward()
    torch.manual_seed(1)
    train(way, net, make("mgda", 3), "features")
    assert_right(net.parameters(), expected)
    counted = buffers(plain.encoder)
    for key, buffer in buffers(net.encoder).items():
        torch.testing.assert_close(buffer, counted[key])


@pytest.mark.parametrize("name", ["batch norm", "own statistics", "spectral norm"])
def test_in_evaluation_nothing_moves(name):
    net = net_of(name, TASKS[:2])
    net.encoder.eval()
    before = buffers(net.encoder)
    train("told", net, make("mgda", 2))
    for key, buffer in buffers(net.encoder).items():
        assert torch.equal(buffer, before[key]), key


def test_two_steps_count_twice():
    net, copy = net_of("batch norm", TASKS[:2]), net_of("batch norm", TASKS[:2])
    for _ in range(2):
        train("told", net, make("mgda", 2))
        copy.losses()
    for key, buffer in buffers(net.encoder).items():
        assert torch.equal(buffer, buffers(copy.encoder)[key]), key


def test_a_forward_that_fails_in_the_backward_leaves_no_hook_and_no_trace():
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.runs = nn.BatchNorm1d(4).double(), 0

        def forward(self, x: Tensor) -> Tensor:
            self.runs += 1
            x = self.norm(x)
            if self.runs > 1:
                raise ArithmeticError("again")
            return x

    net = net_of("batch norm", TASKS[:2])
    net.encoder = Recomputed(nn.Linear(3, 4), Fails(), nn.Linear(4, 4)).double()
    loss, _ = net.losses()
    after_one = buffers(net.encoder)
    with pytest.raises(ArithmeticError, match="again"):
        lightning_mtl.backward(loss, make("mgda"))
    for key, buffer in buffers(net.encoder).items():
        assert torch.equal(buffer, after_one[key]), key
    assert not nn.modules.module._global_forward_hooks
    assert not nn.modules.module._global_forward_pre_hooks
