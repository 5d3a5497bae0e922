"""A module as a Lightning user writes it, and the same turned to ``Balanced``."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_mtl import Balanced


def batches(num: int = 16, batch_size: int = 4) -> DataLoader:
    x = torch.randn(num, 5, generator=torch.Generator().manual_seed(0))
    return DataLoader(x, batch_size=batch_size)


class Net(L.LightningModule):
    """An encoder and two heads whose losses fall at different rates."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 1), nn.Linear(4, 1)
        self.batch_size, self.lr = 4, 0.05

    def losses(self, x: Tensor) -> dict[str, Tensor]:
        z = torch.tanh(self.encoder(x))
        return {"a": self.a(z).square().mean(), "b": (3 * self.b(z) - x[:, :1]).abs().mean()}

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return sum(self.losses(batch).values())

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log_dict({f"val/{name}/error": loss for name, loss in self.losses(batch).items()})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def train_dataloader(self) -> DataLoader:
        return batches(batch_size=self.batch_size)

    def val_dataloader(self) -> DataLoader:
        return batches(8)


class Step:
    """The only thing that a user changes in a training_step."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.balance(self.losses(batch))


class Plain(Step, Balanced, Net):
    pass


def made(cls: type[L.LightningModule] = Plain, balancer: Any = "dwa", **options: Any) -> Any:
    """A module of the class with the two tasks."""
    return cls(tasks=["a", "b"], balancer=balancer, **options)
