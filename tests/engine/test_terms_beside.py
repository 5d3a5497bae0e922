"""A term beside the tasks, added to the balanced loss or passed along: its gradient arrives as it is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lightning_mtl
from lightning_mtl.engine import free_graph
from tests.engine.by_hand import ROWS, Net, Own, assert_right, by_hand, make
from tests.nets import trainer

LEVELS = ("parameters", "features")
#: What the term reads: the features, a shared matrix, a head, a parameter that no task reaches, a task's own loss.
TERMS = ("features", "shared", "head", "alone", "loss", "constant")


class Encoder(nn.Module):
    def __init__(self, *, recomputed: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 5), nn.Linear(5, 4)
        self.alone, self.recomputed = nn.Parameter(torch.randn(2)), recomputed

    def forward(self, x: Tensor) -> Tensor:
        h = checkpoint(self.first, x, use_reentrant=False) if self.recomputed else self.first(x)
        return torch.tanh(self.second(torch.tanh(h)))


def a_net(*, recomputed: bool = False) -> Net:
    torch.manual_seed(5)
    x = torch.randn(6, 3).double()
    heads = {name: nn.Linear(4, 1).double() for name in "abc"}
    targets = {"a": x[:, :1], "b": 1 - 3 * x[:, :1], "c": x[:, 1:2] ** 2}
    return Net(Encoder(recomputed=recomputed).double(), heads, x, targets)


def term(kind: str, net: Net, z: Tensor, losses: dict[str, Tensor]) -> Tensor:
    if kind == "constant":
        return torch.tensor(0.25)
    read = {"features": z, "shared": net.encoder.first.weight, "head": net.heads["b"].weight, "loss": losses["b"]}
    return 0.3 * read.get(kind, net.encoder.alone).square().mean()


def expected(net: Net, method: str, level: str, losses: dict[str, Tensor], z: Tensor, extra: Tensor) -> list:
    balancer = make(method, 3)
    at = [z] if level == "features" else None
    shared = [p for p in net.shared() if p is not net.encoder.alone]
    balanced = by_hand(method, balancer, list(losses.values()), net.parameters(), shared, at=at)
    if not extra.requires_grad:
        return balanced
    plain = torch.autograd.grad(extra, net.parameters(), retain_graph=True, allow_unused=True)
    pairs = zip(balanced, plain, strict=True)
    return [a if b is None else b if a is None else a + b for a, b in pairs]


PLACES = [("fixed", "parameters"), ("mgda", "parameters"), ("mgda", "features"), *((m, "parameters") for m in ROWS)]


@pytest.mark.parametrize("how", ["plus", "plain", "loop"])
@pytest.mark.parametrize("kind", TERMS)
@pytest.mark.parametrize("method, level", PLACES)
@pytest.mark.parametrize("told", [True, False])
def test_a_term_beside_the_tasks(method, level, kind, how, told):
    if (how == "loop" and method == "graddrop") or (not told and level == "features"):
        return  # draws come in the order of the parameters, which a loop finds in the graph; features must be told
    net = a_net()
    losses, z = net.losses()
    extra = term(kind, net, z, losses)
    want = expected(net, method, level, losses, z, extra)
    features = z if told else None
    if how == "loop":
        lightning_mtl.backward(losses, make(method, 3), features, level=level, plain=extra)
    else:
        module = Own([net.encoder, *net.heads.values()], list(losses), make(method, 3), level=level)
        if how == "plain":
            loss = module.balance(losses, features, plain=extra)
        else:
            loss = module.balance(losses, features) + extra
        loss.backward()
    assert_right(net.parameters(), want)


@pytest.mark.parametrize("freed", [False, True])
@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("level", LEVELS)
def test_a_factor_and_a_second_balanced_loss_beside_it(level, recomputed, freed):
    net = a_net(recomputed=recomputed)
    losses, z = net.losses()
    two = {"b": losses["b"], "c": losses["c"].sin()}
    at = [z] if level == "features" else None
    first = by_hand("mgda", make("mgda", 3), list(losses.values()), net.parameters(), net.shared(), at=at)
    second = by_hand("pcgrad", make("pcgrad", 2), list(two.values()), net.parameters(), net.shared(), at=at)
    modules = [
        Own([net.encoder, *net.heads.values()], list(given), make(method, len(given)), level=level)
        for method, given in (("mgda", losses), ("pcgrad", two))
    ]
    balanced = modules[0].balance(losses, z) * 512 + modules[1].balance(two, z, plain=z.mean()) / 4
    plain = torch.autograd.grad(z.mean() / 4, net.parameters(), retain_graph=True, allow_unused=True)
    if freed:
        free_graph(balanced)
    balanced.backward()
    sums = [
        None if all(part is None for part in parts) else sum(f * part for f, part in parts if part is not None)
        for parts in ([(512, a), (0.25, b), (1, c)] for a, b, c in zip(first, second, plain, strict=True))
    ]
    sums = [None if p is net.encoder.alone else total for p, total in zip(net.parameters(), sums, strict=True)]
    assert_right(net.parameters(), sums)


@pytest.mark.parametrize("method", ["fixed", "mgda"])
def test_what_is_shown_is_the_sum(method):
    net = a_net()
    losses, z = net.losses()
    module = Own([net.encoder, *net.heads.values()], list(losses), make(method, 3))
    shown = module.balance(losses, z)
    with_term = module.balance(losses, z, plain=torch.tensor(0.5))
    assert with_term.item() == pytest.approx(shown.item() + 0.5)


def test_a_loop_without_a_term_lets_the_graph_go_and_with_one_keeps_it():
    """As any backward: what was saved for it is freed, unless a term beside the tasks still needs it."""
    for plain in (False, True):
        net = a_net()
        losses, z = net.losses()
        lightning_mtl.backward(losses, make("mgda", 3), z, plain=z.mean() if plain else None)
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            z.sum().backward()


@pytest.mark.parametrize("method", ["fixed", "mgda", "moco"])
@pytest.mark.parametrize("automatic", [True, False])
def test_in_a_fit(method, automatic):
    """In automatic optimization a term is added; by hand it may also go backward afterwards, through what was kept."""
    net = a_net()
    losses, z = net.losses()
    want = expected(net, method, "parameters", losses, z, 0.3 * z.square().mean())

    class Fitted(Own):
        def training_step(self, batch, batch_idx):
            losses, z = net.losses()
            if automatic:
                return self.balance(losses, z) + 0.3 * z.square().mean()
            self.manual_backward(self.balance(losses, z), retain_graph=True)
            self.manual_backward(0.3 * z.square().mean())
            return None

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

        def on_train_batch_end(self, *_):
            assert_right(net.parameters(), want)

    module = Fitted([net.encoder, *net.heads.values()], list(losses), make(method, 3))
    module.automatic_optimization = automatic
    trainer(max_steps=1).fit(module, [0])
