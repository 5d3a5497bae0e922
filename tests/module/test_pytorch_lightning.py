"""``Balanced`` before a LightningModule of ``pytorch_lightning``, the other name under which Lightning comes."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mtl import Balanced
from lightning_mtl.callbacks import BalanceMonitor, ConflictHeatmap, FinalTable
from lightning_mtl.module.trainer_checks import check_trainer
from tests.nets import loader, module
from tests.versions import needs

pl = pytest.importorskip("pytorch_lightning")

LR = 0.1


class Mine(Balanced, pl.LightningModule):
    """Two regressions of one input whose gradients conflict."""

    def __init__(self, balancer: str = "pcgrad") -> None:
        super().__init__(tasks=["up", "down"], balancer=balancer)
        self.save_hyperparameters()
        self.encoder, self.up, self.down = nn.Linear(8, 6), nn.Linear(6, 1), nn.Linear(6, 1)

    def losses(self, x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        z = torch.tanh(self.encoder(x))
        return {"up": F.mse_loss(self.up(z), x[:, :1]), "down": F.mse_loss(self.down(z), -x[:, :1] - 1)}, z

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses, z = self.losses(batch[0])
        return self.balance(losses, features=z)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        losses, _ = self.losses(batch[0])
        self.log_dict({f"val/loss/{name}": loss for name, loss in losses.items()})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=LR)


def trainer(folder: Path, **options: Any) -> Any:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    options = {**quiet, "enable_model_summary": False, "max_epochs": 2, **options}
    return pl.Trainer(accelerator="cpu", devices=1, default_root_dir=folder, **options)


def vector(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def by_hand(model: Mine, balancer: str) -> Tensor:
    """The parameters after two epochs of plain torch; a projection of each gradient off the other, or their sum."""
    for batch in [*loader(64), *loader(64)]:
        losses, _ = model.losses(batch[0])
        encoder = list(model.encoder.parameters())
        up, down = (
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, encoder, retain_graph=True)])
            for loss in losses.values()
        )
        update, dot = up + down, up @ down
        if balancer == "pcgrad" and dot < 0:
            update = update - dot / (down @ down) * down - dot / (up @ up) * up
        sum(losses.values()).backward()
        nn.utils.vector_to_parameters(update, [p.grad for p in encoder])
        with torch.no_grad():
            for p in model.parameters():
                p -= LR * p.grad
                p.grad = None
    return vector(model)


@pytest.mark.parametrize("balancer", ["fixed", "pcgrad"])
def test_trains_as_by_hand(balancer, tmp_path):
    mine, same = Mine(balancer), Mine(balancer)
    same.load_state_dict(mine.state_dict())
    trainer(tmp_path).fit(mine, loader(64))
    torch.testing.assert_close(vector(mine), by_hand(same, balancer))


@pytest.mark.parametrize("given_to", ["trainer", "module"])
def test_balance_and_callbacks_reach_its_logger(given_to, tmp_path):
    logger, model, options = pl.loggers.CSVLogger(tmp_path), Mine(), {"log_every_n_steps": 1}
    if given_to == "trainer":
        needs("pytorch_lightning", "2.6", "a Trainer that takes callbacks of the lightning package")
        options["callbacks"] = [ConflictHeatmap(), FinalTable()]
    else:
        own = model.configure_callbacks
        model.configure_callbacks = lambda: [*own(), ConflictHeatmap(), FinalTable()]
    fitted = trainer(tmp_path, logger=logger, **options)
    fitted.fit(model, loader(64), loader(64))
    assert sum(isinstance(callback, BalanceMonitor) for callback in fitted.callbacks) == 1
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sum(bool(row["balance/cosine/up/down"]) for row in rows) == 8
    assert (Path(logger.log_dir) / "balance_conflict_heatmap.png").exists()
    assert (Path(logger.log_dir) / "final_val.csv").exists()


def test_resumes_bit_for_bit(tmp_path):
    torch.manual_seed(1)
    whole = Mine("gradnorm")
    start = {name: value.clone() for name, value in whole.state_dict().items()}
    trainer(tmp_path).fit(whole, loader(64))
    half = Mine("gradnorm")
    half.load_state_dict(start)
    first = trainer(tmp_path, max_epochs=1)
    first.fit(half, loader(64))
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed = Mine.load_from_checkpoint(tmp_path / "half.ckpt")
    assert resumed.hparams["balancer"] == "gradnorm"
    trainer(tmp_path).fit(resumed, loader(64), ckpt_path=tmp_path / "half.ckpt")
    assert torch.equal(vector(resumed), vector(whole))


def test_its_accumulation_schedule_is_seen(tmp_path):
    schedule = pl.callbacks.GradientAccumulationScheduler({0: 1, 1: 2})
    fitted = trainer(tmp_path, callbacks=[schedule])
    fitted.fit(Mine(), loader(64))
    assert fitted.global_step == 4 + 2
    static = trainer(tmp_path, callbacks=[schedule], strategy=pl.strategies.DDPStrategy(static_graph=True))
    with pytest.raises(ValueError, match=r"Trainer\(accumulate_grad_batches=...\).*got 2"):
        check_trainer(static, Mine(), compares_gradients=True)


def test_a_declared_module_belongs_to_the_lightning_package(tmp_path):
    with pytest.raises(TypeError, match="LightningModule"):
        trainer(tmp_path).fit(module(), loader(64))
