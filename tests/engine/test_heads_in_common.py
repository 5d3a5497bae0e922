"""Heads that have something in common: a matrix tied to the encoder's, or a layer. Gradients are those by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from lightning_mtl import MultiTaskModule
from lightning_mtl.balancers import GradNorm
from lightning_mtl.tasks import ClassificationTask, TaskRegistry
from tests.balancers import oracles
from tests.engine.by_hand import Net, assert_right, check, make, numbers, train, update_of
from tests.nets import trainer


class Words(nn.Module):
    """Ids ``[B, 5]`` -> features ``[B, 4]``."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(7, 4), nn.Linear(4, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.layer(self.table(ids).mean(1)))


def a_net(kind: str) -> Net:
    torch.manual_seed(1)
    encoder, names = Words(), ("a", "b", "c")
    heads: dict[str, nn.Module] = {name: nn.Linear(4, 7, bias="bias" in kind) for name in names}
    if "tied" in kind:
        for name in names if "all" in kind else "ab":
            heads[name].weight = encoder.table.weight
    if "layer" in kind:
        layer = nn.Linear(4, 4)
        for name in names if "all" in kind else "ab":
            heads[name] = nn.Sequential(layer, nn.Tanh(), heads[name])
    if "last" in kind:
        last = nn.Linear(7, 7)
        heads["b"], heads["c"] = (nn.Sequential(heads[name], nn.Sigmoid(), last) for name in "bc")
    ids = torch.randint(7, (6, 5))
    first, last = 3 * torch.randn(6, 7).double(), torch.randn(6, 7).double()
    targets = {"a": first, "b": -2 * first, "c": last}
    return Net(encoder.double(), {name: head.double() for name, head in heads.items()}, ids, targets)


KINDS = [
    "tied",
    "tied bias",
    "tied all",
    "tied all bias",
    "layer",
    "layer all bias",
    "last",
    "layer last",
    "tied layer last bias",
]


def in_common(net: Net) -> list[Tensor]:
    """What several heads have, and the encoder has not."""
    inside = {id(p) for p in net.encoder.parameters()}
    heads = [{id(p) for p in head.parameters()} for head in net.heads.values()]
    return [p for p in net.parameters() if id(p) not in inside and sum(id(p) in head for head in heads) > 1]


@pytest.mark.parametrize(
    "method, weight_heads",
    [("pcgrad", False), ("pcgrad", True), ("mgda", False), ("mgda", True), ("graddrop", False), ("fixed", True)],
)
@pytest.mark.parametrize("kind", KINDS)
def test_at_the_parameters_they_belong_to_the_rows(kind, method, weight_heads):
    net = a_net(kind)
    check(net, method, "declared", shared=[*net.shared(), *in_common(net)], weight_heads=weight_heads)


def through_and_past(net: Net) -> tuple[list[list[Tensor]], list[list[Tensor]], list[Tensor]]:
    """Per task the gradient of every parameter through the features, and past them; and that at the features."""
    losses, z = net.losses()
    parameters, through, past, rows = net.parameters(), [], [], []
    for loss in losses.values():
        at_z, *whole = torch.autograd.grad(loss, [z, *parameters], retain_graph=True, allow_unused=True)
        inner = torch.autograd.grad(z, parameters, at_z, retain_graph=True, allow_unused=True)
        through.append([numbers(grad, p) for grad, p in zip(inner, parameters, strict=True)])
        past.append([numbers(w, p) - t for w, t, p in zip(whole, through[-1], parameters, strict=True)])
        rows.append(at_z.flatten())
    return through, past, rows


@pytest.mark.parametrize("weight_heads", [False, True])
@pytest.mark.parametrize("method", ["pcgrad", "mgda"])
@pytest.mark.parametrize("kind", KINDS)
def test_at_the_features_they_get_what_heads_get(kind, method, weight_heads):
    """What comes to them through the features is weighted, what comes past these is a head's own gradient."""
    net, balancer = a_net(kind), make(method, 3)
    through, past, rows = through_and_past(net)
    weights, _ = update_of(method, rows, range(3), balancer)
    assert len({round(weight, 6) for weight in weights}) > 1
    own: Sequence[float] = weights if weight_heads else (1.0, 1.0, 1.0)
    expected = []
    for place, p in enumerate(net.parameters()):
        parts = [*(grads[place] for grads in through), *(grads[place] for grads in past)]
        expected.append(oracles.weighted_sum([*weights, *own], parts).view(p.shape))
    train("declared", net, balancer, "features", weight_heads=weight_heads)
    assert_right(net.parameters(), expected)


@pytest.mark.parametrize("level", ["parameters", "features"])
def test_a_language_model_with_two_tied_heads_trains(level):
    encoder = Words()
    heads = {name: nn.Linear(4, 7) for name in ("word", "next")}
    for head in heads.values():
        head.weight = encoder.table.weight
    tasks = {name: ClassificationTask(head, num_classes=7) for name, head in heads.items()}
    model, before = MultiTaskModule(encoder, tasks, GradNorm(2), level), encoder.table.weight.detach().clone()
    batch = (torch.randint(7, (8, 5)), {name: torch.randint(7, (8,)) for name in tasks})
    trainer().fit(model, torch.utils.data.DataLoader([batch] * 3, batch_size=None))
    assert not torch.equal(encoder.table.weight, before)
    assert all(head.weight is encoder.table.weight for head in heads.values())


@pytest.mark.parametrize(
    "wrap", [lambda head: head, lambda head: nn.Sequential(nn.Tanh(), head)], ids=["same", "inside"]
)
def test_a_whole_head_twice_is_a_mistake(wrap):
    head = nn.Linear(4, 7)
    for first, second in ((head, wrap(head)), (wrap(head), head)):
        tasks = {"a": ClassificationTask(first, num_classes=7), "b": ClassificationTask(second, num_classes=7)}
        with pytest.raises(ValueError, match=r"`tasks\['b'\]` must have a head of its own, got that of 'a'"):
            TaskRegistry(tasks)
