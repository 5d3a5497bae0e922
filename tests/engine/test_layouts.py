"""However parameters lie in memory, and whatever their numbers are: gradients are right, and lie as they do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.engine.by_hand import (
    METHODS,
    TOLD,
    WAYS,
    Net,
    assert_right,
    by_hand,
    check,
    fills_memory,
    make,
    numbers,
    shaped,
    train,
)


class Labels(Tensor):
    """A tensor with meta data that breaks under whatever it was not written for."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in (
            "_foreach_copy_",
            "dot",
            "mv",
            "stack",
            "cat",
            "reshape",
            "split",
            "float",
        ):
            raise TypeError(f"no rule for {func}")
        return super().__torch_function__(func, types, args, kwargs or {})


class Complex(nn.Module):
    """Complex numbers behind an odd number of real ones; its output complex or real."""

    def __init__(self, real: bool) -> None:
        super().__init__()
        self.gain, self.real = nn.Parameter(torch.randn(3)), real
        self.weight = nn.Parameter(torch.randn(3, 4, dtype=torch.cfloat))
        self.turned = nn.Parameter(torch.randn(5, 4, dtype=torch.cfloat).t())

    def forward(self, x: Tensor) -> Tensor:
        z = (x * self.gain).to(self.weight.dtype) @ self.weight @ self.turned
        return z.abs() if self.real else z


class ComplexHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 1, dtype=torch.cfloat))

    def forward(self, z: Tensor) -> Tensor:
        return (z @ self.weight).imag


class Odd(nn.Module):
    """A transposed matrix, one that repeats its row, a number, and nothing at all."""

    def __init__(self) -> None:
        super().__init__()
        self.turned, self.empty = nn.Parameter(torch.randn(4, 3).t()), nn.Parameter(torch.zeros(0, 4))
        self.repeated, self.number = nn.Parameter(torch.randn(1, 4).expand(4, 4)), nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.turned * self.number) @ self.repeated + self.empty.sum(0)


class Bags(nn.Module):
    """Sparse gradients; one table is also read as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 4, sparse=True)
        self.bags = nn.EmbeddingBag(7, 4, sparse=True, mode="sum")
        self.tied = nn.Embedding(7, 4, sparse=True)
        self.picked = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        picked = self.picked.gather(0, x[:1].repeat(1, 2) % 3, sparse_grad=True)
        z = self.words(x).sum(1) * self.bags(x) + torch.tanh(self.tied(x).mean(1)) + picked
        return z @ self.tied.weight.T[:, :4]


class Worded(nn.Module):
    """A head with a table of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(5, 4, sparse=True)

    def forward(self, z: Tensor) -> Tensor:
        return (z * self.words(torch.tensor([3, 1]))).sum(1, keepdim=True)


class Whole(nn.Module):
    """A head that reads a table of another head."""

    def __init__(self, table: nn.Parameter) -> None:
        super().__init__()
        self.table = table

    def forward(self, z: Tensor) -> Tensor:
        return z.sum(1, keepdim=True) * self.table.sum()


class Halves(nn.Module):
    """The first layer in half precision, the second in double."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4).bfloat16(), nn.Linear(4, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.second(self.first(x.bfloat16()).double()))


def convolutions() -> nn.Module:
    layers = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Tanh(), nn.Conv2d(4, 5, 3, bias=False), nn.Tanh(), nn.Conv2d(5, 1, 1))
    return layers.to(memory_format=torch.channels_last)


def linear(width: int = 4, out: int = 1) -> dict[str, nn.Module]:
    return {name: nn.Linear(width, out) for name in "abc"}


def ones(size: int = 6) -> dict[str, Tensor]:
    x = torch.randn(size, 1)
    return {"a": x, "b": -3 * x + 1, "c": x**2}


def complex_net(real: bool) -> Net:
    heads = linear(5) if real else {name: ComplexHead() for name in "abc"}
    return doubled(Net(Complex(real), heads, torch.randn(6, 3), ones()))


def doubled(net: Net) -> Net:
    for module in (net.encoder, *net.heads.values()):
        for parameter in module.parameters():
            parameter.data = parameter.data.to(torch.complex128 if parameter.is_complex() else torch.float64)
    net.x = net.x.double() if net.x.is_floating_point() else net.x
    net.targets = {name: target.double() for name, target in net.targets.items()}
    return net


def convolutional() -> Net:
    heads = {name: nn.Conv2d(1, 1, 1).to(memory_format=torch.channels_last) for name in "abc"}
    targets = {name: torch.randn(2, 1, 4, 4) * 3**scale for scale, name in enumerate("abc")}
    return doubled(Net(convolutions(), heads, torch.randn(2, 3, 6, 6), targets))


def labelled() -> Net:
    net = doubled(Net(nn.Sequential(nn.Linear(3, 4), nn.Tanh()), linear(), torch.randn(6, 3), ones()))
    net.x = net.x.as_subclass(Labels)
    return net


def worded() -> Net:
    return doubled(Net(Bags(), {name: Worded() for name in "abc"}, torch.tensor([[1, 2], [5, 2]]), ones(2)))


def repeated() -> Net:
    return doubled(Net(Odd(), linear(), torch.randn(6, 3), ones()))


def in_halves() -> Net:
    net = Net(Halves(), {name: nn.Linear(4, 1).double() for name in "abc"}, torch.randn(6, 3), ones())
    net.targets = {name: target.double() for name, target in net.targets.items()}
    return net


NETS: dict[str, tuple[Callable[[], Net], float]] = {
    "complex": (lambda: complex_net(True), 1e-9),
    "complex_features": (lambda: complex_net(False), 1e-9),
    "channels_last": (convolutional, 1e-9),
    "transposed_and_repeated": (repeated, 1e-9),
    "sparse": (worded, 1e-9),
    "half_and_double": (in_halves, 0.05),
    "subclass": (labelled, 1e-9),
}
PLACES = [
    (name, method, way)
    for name in NETS
    for method in METHODS
    for way in WAYS
    # Draws per coordinate: in a loop parameters come in the order of the graph.
    if method != "graddrop" or (name != "half_and_double" and not way.startswith("loop"))
]


def net_of(name: str) -> tuple[Net, float]:
    torch.manual_seed(2)
    build, rtol = NETS[name]
    return build(), rtol


@pytest.mark.parametrize("name, method, way", PLACES)
def test_rows_at_the_parameters(name, method, way):
    net, rtol = net_of(name)
    check(net, method, way, rtol=rtol)


@pytest.mark.parametrize("way", TOLD)
@pytest.mark.parametrize("method", ["pcgrad", "mgda"])
@pytest.mark.parametrize("name", NETS)
def test_rows_at_the_features(name, method, way):
    net, rtol = net_of(name)
    check(net, method, way, "features", rtol=rtol)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NETS)
def test_weighted_heads(name, way):
    net, rtol = net_of(name)
    check(net, "mgda", way, rtol=rtol, weight_heads=True)


@pytest.mark.parametrize("way", WAYS)
def test_a_gradient_is_sparse_where_all_of_its_tasks_are(way):
    net, _ = net_of("sparse")
    train(way, net, make("pcgrad", 3))
    tables = [net.encoder.words, net.encoder.bags, *(head.words for head in net.heads.values())]
    assert all(table.weight.grad.is_sparse for table in tables)
    assert net.encoder.picked.grad.is_sparse
    assert not net.encoder.tied.weight.grad.is_sparse
    torch.optim.SparseAdam([table.weight for table in tables], lr=0.1).step()


@pytest.mark.parametrize("way", WAYS)
def test_what_a_balancer_remembers_moves_entries_that_this_step_did_not_touch(way):
    net, _ = net_of("sparse")
    balancer = make("moco", 3)
    train(way, net, balancer)
    moved = net.encoder.words.weight.grad.to_dense().abs().sum(1) > 0
    net.encoder.words.weight.grad = None
    net.x = torch.tensor([[0, 4], [6, 6]])
    train(way, net, balancer)
    again = net.encoder.words.weight.grad
    assert again.is_sparse
    assert moved.tolist() == [row in (1, 2, 5) for row in range(7)]
    assert (again.to_dense().abs().sum(1) > 0).tolist() == [row != 3 for row in range(7)]


@pytest.mark.parametrize("weight_heads", [False, True])
@pytest.mark.parametrize("way", ["told", "loop_told"])
def test_a_private_table_read_sparsely_by_one_task_and_whole_by_another(way, weight_heads):
    net, _ = net_of("sparse")
    a, b = (net.heads[name].words.weight for name in "ab")
    net.heads["b"] = Whole(a)
    check(net, "mgda", way, weight_heads=weight_heads)
    assert b.grad is None


# Several steps.


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NETS)
def test_two_scaled_backwards_add_up(name, way):
    net, rtol = net_of(name)
    balancer, total = make("mgda", 3), [None] * len(net.parameters())
    for _ in range(2):
        losses, _ = net.losses()
        once = by_hand("mgda", balancer, list(losses.values()), net.parameters(), net.shared())
        total = [b if a is None else a if b is None else a + b for a, b in zip(total, once, strict=True)]
        train(way, net, balancer, scale=512.0)
        with torch.no_grad():
            for module in (net.encoder, *net.heads.values()):
                for parameter in module.parameters():
                    if fills_memory(parameter):
                        parameter.mul_(0.9)
    assert_right(net.parameters(), [None if grad is None else 512 * grad for grad in total], rtol, strides=False)


@pytest.mark.parametrize("way, level", [*((way, "parameters") for way in WAYS), *((way, "features") for way in TOLD)])
@pytest.mark.parametrize("name", NETS)
def test_a_step_without_a_solve(name, way, level):
    net, rtol = net_of(name)
    balancer = make("mgda", 3, every_n_steps=2)
    train(way, net, balancer, level)
    weights = balancer.last_weights.tolist()
    for parameter in net.parameters():
        parameter.grad = None
    losses, _ = net.losses()
    shared, expected = {id(p) for p in net.shared()}, []
    grads = [torch.autograd.grad(t, net.parameters(), retain_graph=True, allow_unused=True) for t in losses.values()]
    for p, column in zip(net.parameters(), zip(*grads, strict=True), strict=True):
        factors = weights if id(p) in shared else [1.0, 1.0, 1.0]
        terms = [factor * numbers(grad, p) for factor, grad in zip(factors, column, strict=True) if grad is not None]
        expected.append(shaped(sum(terms), p) if terms else None)
    train(way, net, balancer, level)
    assert_right(net.parameters(), expected, rtol)


@pytest.mark.parametrize("granularity", ["tensor", "whole"])
@pytest.mark.parametrize("way", ["declared", "told", "found"])
@pytest.mark.parametrize("name", NETS)
def test_balancers_that_work_on_groups(name, way, granularity):
    net, rtol = net_of(name)
    losses, _ = net.losses()
    shared = [p for p in net.shared() if p.numel()]
    groups = [[p] for p in shared] if granularity == "tensor" else [shared]
    balancer = make("metabalance", 3, granularity=granularity)
    every = list(losses.values())
    expected = by_hand("metabalance", balancer, every, net.parameters(), shared, groups=groups)
    train(way, net, balancer)
    assert_right(net.parameters(), expected, rtol)
