"""Small networks, data and modules that many tests use."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_mtl import MultiTaskModule
from lightning_mtl.tasks import ClassificationTask, RegressionTask, Task

BALANCERS = ("fixed", "uncertainty", "pcgrad", "gradnorm")
GRAM_BALANCERS = ("pcgrad", "gradnorm")
LEVELS = ("parameters", "features")
WIDTH = 6


def mlp() -> nn.Module:
    """Inputs ``[B, 8]`` -> features ``[B, 6]``."""
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, WIDTH))


def conv() -> nn.Module:
    """Inputs ``[B, 8]``, seen as one-channel images, -> features ``[B, 6]``; with batch norm and pooling."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 4)),
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(8, WIDTH),
    )


class Transformer(nn.Module):
    """Inputs ``[B, 8]``, seen as 4 tokens of 2, -> features ``[B, 6]``."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(2, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 2, dim_feedforward=12, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.embed(x.unflatten(1, (4, 2)))).mean(1)


class Pyramid(nn.Module):
    """Inputs ``[B, 8]`` -> features at two scales, nested as ``{"fine": [B, 6], "coarse": ([B, 6],)}``."""

    def __init__(self) -> None:
        super().__init__()
        self.bottom, self.fine, self.coarse = nn.Linear(8, 10), nn.Linear(10, WIDTH), nn.Linear(10, WIDTH)

    def forward(self, x: Tensor) -> dict[str, Any]:
        h = torch.tanh(self.bottom(x))
        return {"fine": torch.sin(self.fine(h)), "coarse": (self.coarse(h),)}


class PyramidHead(nn.Module):
    """Reads both scales of :class:`Pyramid`."""

    def __init__(self, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * WIDTH, out)

    def forward(self, features: dict[str, Any]) -> Tensor:
        return self.linear(torch.cat([features["fine"], features["coarse"][0]], dim=1))


class Instances(nn.Module):
    """Features of the images, and those of the instances that were found in them."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.body(x) for name, x in inputs.items()}


def three_tasks(width: int = WIDTH) -> dict[str, Task]:
    """A classification and two regressions whose losses differ in scale and whose gradients conflict."""
    return {
        "kind": ClassificationTask(nn.Linear(width, 3), 3),
        "size": RegressionTask(nn.Linear(width, 1)),
        "shape": RegressionTask(nn.Linear(width, 2), loss="l1"),
    }


def samples(num: int, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """``num`` inputs and the targets of :func:`three_tasks`: sizes are large, so that loss scales differ."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num, 8, generator=generator)
    shape = torch.stack([x[:, 0] * x[:, 1], -x[:, 0]], dim=1)
    return x, {"kind": torch.randint(3, (num,), generator=generator), "size": 4 * x[:, 0], "shape": shape}


class Samples(Dataset):
    """The rows of :func:`samples`, or of any tensors given in its form."""

    def __init__(self, x: Tensor, targets: dict[str, Tensor]) -> None:
        self.x, self.targets = x, targets

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        return self.x[index], {name: target[index] for name, target in self.targets.items()}


def loader(num: int = 64, batch_size: int = 16, seed: int = 0, **options: Any) -> DataLoader:
    """A loader over :func:`samples`, in order unless asked otherwise."""
    return DataLoader(Samples(*samples(num, seed)), batch_size=batch_size, **options)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


def module(balancer: Any = "fixed", seed: int = 0, encoder: Any = mlp, **options: Any) -> MultiTaskModule:
    """A seeded module with :func:`three_tasks`."""
    torch.manual_seed(seed)
    return MultiTaskModule(encoder(), three_tasks(), balancer, **({"optimizer": sgd} | options))


class HandWritten(L.LightningModule):
    """What a Lightning user writes without this package: the same three tasks, their losses summed."""

    def __init__(self, seed: int = 0, encoder: Any = mlp) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.encoder = encoder()
        self.kind, self.size, self.shape = nn.Linear(WIDTH, 3), nn.Linear(WIDTH, 1), nn.Linear(WIDTH, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, targets = batch
        z = self.encoder(x)
        # In the order of the tasks: in bf16 the order in which gradients meet at `z` is seen in the result.
        kind = F.cross_entropy(self.kind(z), targets["kind"])
        size = F.mse_loss(self.size(z).squeeze(1), targets["size"])
        return kind + size + F.l1_loss(self.shape(z), targets["shape"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return sgd(self.parameters())


def trainer(**options: Any) -> L.Trainer:
    """A quiet Trainer on the CPU."""
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 1,
    }
    return L.Trainer(**(quiet | options))


def network(model: nn.Module) -> Tensor:
    """All parameters of encoder and heads as one vector ``[N]``, without the balancer's, in order of registration."""
    return torch.cat([p.detach().flatten() for n, p in model.named_parameters() if not n.startswith("balancer")])
