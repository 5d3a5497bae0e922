"""What is exported predicts as the module does, with or without a balancer, and the balancer is no part of it."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_mtl import Balanced
from tests.nets import loader, module, samples, trainer

# Lightning and torch advise against TorchScript.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torchscript.* has been deprecated"),
    pytest.mark.filterwarnings("ignore:`torch.jit.*` is (deprecated|not supported)"),
    # A metric's, when torch looks at all its properties.
    pytest.mark.filterwarnings("ignore:This property will be removed in 2.0.0"),
]


class Pair(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.a, self.b = nn.Linear(8, 4), nn.Linear(4, 1), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.encoder(x).relu()
        return self.a(z), self.b(z)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        a, b = self(batch[0])
        return self.losses(a, b)

    def losses(self, a: Tensor, b: Tensor) -> Tensor:
        return a.square().mean() + b.abs().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Turned(Balanced, Pair):
    def losses(self, a: Tensor, b: Tensor) -> Tensor:
        return self.balance({"a": a.square().mean(), "b": b.abs().mean()})


@pytest.mark.parametrize("method", ["script", "trace"])
@pytest.mark.parametrize("balancer", [None, "uncertainty", "gradnorm", "pcgrad", "graddrop"])
def test_a_written_module(balancer, method, tmp_path):
    model = Pair() if balancer is None else Turned(tasks=["a", "b"], balancer=balancer)
    trainer().fit(model, loader())
    x = samples(4)[0]
    made = model.to_torchscript(tmp_path / "module.pt", method=method, example_inputs=x)
    again = torch.jit.load(tmp_path / "module.pt")
    for found, wanted in zip((*made(x), *again(x)), (*model(x), *model(x)), strict=True):
        assert torch.equal(found, wanted)
    if method == "script":
        assert again.state_dict().keys() == Pair().state_dict().keys()


def test_a_declared_module_is_traced(tmp_path):
    model, x = module("pcgrad"), samples(4)[0]
    trainer().fit(model, loader())
    with pytest.raises(
        ValueError, match=r"^MultiTaskModule: `method` must be \"trace\", got 'script'\. Pass method=\"trace\""
    ):
        model.to_torchscript()
    made = model.to_torchscript(tmp_path / "module.pt", method="trace", strict=False, example_inputs=x)
    for found in (made(x), torch.jit.load(tmp_path / "module.pt")(x)):
        assert found.keys() == model(x).keys()
        assert all(torch.equal(found[name], output) for name, output in model(x).items())
    encoder = torch.jit.script(model.encoder)
    heads = {name: torch.jit.script(task.head) for name, task in model.tasks.items()}
    assert all(torch.equal(heads[name](encoder(x)), output) for name, output in model(x).items())
