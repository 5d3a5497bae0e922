"""Losses that are columns of one criterion, or outputs of one compiled or scripted model: refused, with working cures.

In the graph all that lies behind is reached by both, heads included.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_mtl
from lightning_mtl.tasks import losses_per_task
from tests.engine.by_hand import Own, assert_right, by_hand, make

BESIDE = "`losses` must be apart in the graph where it shall tell who is shared"
METHODS = ("pcgrad", "mgda", "moco")


class Model(nn.Module):
    def __init__(self, outputs: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(5, 4), nn.Tanh()).double()
        self.heads = nn.ModuleList(nn.Linear(4, 1) for _ in range(2)).double()
        self.one = nn.Linear(4, 2).double() if outputs else None
        self.x, self.y = torch.randn(6, 5).double(), 3 * torch.randn(6, 2).double()

    def forward(self, z: Tensor) -> Tensor:
        return torch.cat([head(z) for head in self.heads], 1)


PARTS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "elements of a mean": lambda u: (u.mean(0)[0], u.mean(0)[1]),
    "a mean, unbound": lambda u: tuple(u.mean(0)),  # type: ignore[arg-type,return-value]
    "columns": lambda u: (u[:, 0].mean(), u[:, 1].mean()),
    "slices": lambda u: (u[:, :1].mean(), u[:, 1:].mean()),
    "split": lambda u: tuple(part.mean() for part in u.split(1, 1)),  # type: ignore[return-value]
    "index": lambda u: (u[:, [0]].mean(), u[:, [1]].mean()),
    "with a term": lambda u: (u[:, 0].mean() + 1, 2 * u[:, 1].mean()),
    "per task": lambda u: tuple(losses_per_task(u, ["a", "b"])[0].values()),  # type: ignore[return-value]
}
CRITERIA: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": lambda out, y: F.mse_loss(out, y, reduction="none"),
    "by hand": lambda out, y: (out - y) ** 2,
    "bce": lambda out, y: F.binary_cross_entropy_with_logits(out, (y > 0).double(), reduction="none"),
}


def step(loop: bool, model: nn.Module, losses: dict[str, Tensor], method: str, **options: object) -> None:
    if loop:
        lightning_mtl.backward(losses, make(method), **options)
    else:
        Own([model], list(losses), make(method)).balance(losses, **options).backward()


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("part", PARTS)
def test_columns_of_one_criterion_over_several_heads(part, criterion, loop):
    for method in METHODS:
        model = Model()
        z = model.encoder(model.x)
        losses = dict(zip("ab", PARTS[part](CRITERIA[criterion](model(z), model.y)), strict=True))
        with pytest.raises(ValueError, match=BESIDE):
            step(loop, model, losses, method)
        shared, parameters = list(model.encoder.parameters()), list(model.parameters())
        for cure in ({"features": z}, {"shared": shared}):
            expected = by_hand(method, make(method), list(losses.values()), parameters, shared)
            for parameter in parameters:
                parameter.grad = None
            step(loop, model, losses, method, **cure)
            assert_right(parameters, expected)
            z = model.encoder(model.x)
            losses = dict(zip("ab", PARTS[part](CRITERIA[criterion](model(z), model.y)), strict=True))


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("part", PARTS)
def test_columns_of_one_head_are_taken(part, loop):
    model = Model(outputs=2)
    assert model.one is not None
    out = model.one(model.encoder(model.x))
    losses = dict(zip("ab", PARTS[part]((out - model.y) ** 2), strict=True))
    parameters = [*model.encoder.parameters(), *model.one.parameters()]
    expected = by_hand("mgda", make("mgda"), list(losses.values()), parameters, parameters)
    step(loop, nn.ModuleList([model.encoder, model.one]), losses, "mgda")
    assert_right(parameters, expected)


@pytest.mark.parametrize("loop", [False, True])
def test_what_is_taken_apart_as_it_was_put_together_is_taken(loop):
    """Features, for instance: behind a part lies what both reach."""
    model = Model()
    first, second = torch.cat([model.encoder(model.x), model.encoder(model.x) ** 2], 1).chunk(2, 1)
    losses = {"a": (first**2).mean(), "b": (second - 1).abs().mean()}
    parameters = list(model.encoder.parameters())
    expected = by_hand("mgda", make("mgda"), list(losses.values()), parameters, parameters)
    step(loop, model.encoder, losses, "mgda")
    assert_right(parameters, expected)


class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(5, 4), nn.Tanh())
        self.a, self.b = nn.Linear(4, 1), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.encoder(x)
        return self.a(z), self.b(z)


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("how", ["compiled", "scripted"])
def test_outputs_of_one_graph(how, loop):
    lightning_mtl.allow_several_backwards()
    torch.manual_seed(0)
    model = TwoOutputs().double()
    x, y = torch.randn(6, 5).double(), torch.randn(6, 2).double()
    graph = torch.compile(model, backend="aot_eager") if how == "compiled" else torch.jit.script(model)
    for _ in range(3):  # a script becomes one node after some calls
        a, b = graph(x)
    losses = {"a": F.mse_loss(a, y[:, :1]), "b": F.mse_loss(b, y[:, 1:]) + 1}
    with pytest.raises(ValueError, match=BESIDE):
        step(loop, model, losses, "mgda")
    expected = by_hand(
        "mgda", make("mgda"), list(losses.values()), list(model.parameters()), list(model.encoder.parameters())
    )
    step(loop, model, losses, "mgda", shared=list(model.encoder.parameters()))
    assert_right(list(model.parameters()), expected)


@pytest.mark.parametrize("loop", [False, True])
def test_outputs_of_a_compiled_encoder_are_features(loop):
    lightning_mtl.allow_several_backwards()
    model, heads = TwoOutputs().double(), nn.ModuleList(nn.Linear(1, 1) for _ in range(2)).double()
    a, b = torch.compile(model, backend="aot_eager")(torch.randn(6, 5).double())
    losses = {"a": heads[0](a).square().mean(), "b": heads[1](b).square().mean()}
    every = [*model.parameters(), *heads.parameters()]
    expected = by_hand("mgda", make("mgda"), list(losses.values()), every, list(model.parameters()))
    step(loop, nn.ModuleList([model, heads]), losses, "mgda")
    assert_right(every, expected)
