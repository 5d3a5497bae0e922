"""With the fixed balancer nothing is different from a hand-written module that sums the losses."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch import callbacks as available
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_avg_fn

from tests.nets import HandWritten, Transformer, conv, loader, mlp, module, network, trainer
from tests.versions import needs

STEPS = 50


class Rate(Callback):
    """A changing learning rate, so that the order of steps and callbacks shows."""

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = 0.01 / (1 + 0.02 * trainer.global_step)


def ema() -> Callback:
    needs("lightning", "2.6", "weight averaging")
    return available.EMAWeightAveraging(decay=0.9)


def weight_averaging() -> Callback:
    needs("lightning", "2.6", "weight averaging")

    class Late(available.WeightAveraging):
        def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
            return step_idx is not None and step_idx >= 10

    return Late(avg_fn=get_ema_avg_fn(0.8))


def swa() -> Callback:
    return StochasticWeightAveraging(swa_lrs=5e-3, swa_epoch_start=2, annealing_epochs=2)


# Per run: the Trainer's arguments, its callbacks, and the number of batches for 50 optimizer steps.
RUNS: dict[str, tuple[dict[str, Any], list[Any], int]] = {
    "plain": ({}, [], STEPS),
    "learning rate": ({}, [Rate], STEPS),
    "accumulate 2": ({"accumulate_grad_batches": 2}, [], 2 * STEPS),
    "clip 0.5 norm": ({"gradient_clip_val": 0.5}, [], STEPS),
    "clip 0.5 value": ({"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"}, [], STEPS),
    "bf16-mixed": ({"precision": "bf16-mixed"}, [], STEPS),
    "SWA": ({"max_epochs": 5}, [swa], STEPS // 5),
    "EMA": ({}, [ema], STEPS),
    "weight averaging": ({"max_epochs": 5}, [weight_averaging], STEPS // 5),
}


def trained(
    model: L.LightningModule, options: dict[str, Any], callbacks: list[Any], batches: int, **data: Any
) -> Tensor:
    """The parameters after the run, then the buffers of the encoder (batch norm's statistics)."""
    size = data.get("batch_size", 16)
    run = trainer(callbacks=[make() for make in callbacks], **options)
    run.fit(model, loader(batches * size, **data))
    assert run.global_step >= STEPS  # SWA counts its epoch over batch norm's statistics too
    buffers = [buffer.double().flatten() for buffer in model.encoder.buffers()]
    return torch.cat([network(model).double(), *buffers])


def difference(name: str, encoder: Any, **data: Any) -> float:
    ours = trained(module("fixed", encoder=encoder), *RUNS[name], **data)
    theirs = trained(HandWritten(encoder=encoder), *RUNS[name], **data)
    start = network(HandWritten(encoder=encoder))
    assert (theirs[: len(start)] - start).abs().max() > 0.1, "the run must go somewhere"
    return float((ours - theirs).abs().max())


CASES = [(name, mlp) for name in RUNS]
CASES += [(name, conv) for name in ("plain", "bf16-mixed", "SWA", "EMA")]
CASES += [(name, Transformer) for name in ("plain", "clip 0.5 norm")]


@pytest.mark.parametrize("name, encoder", CASES)
def test_fixed_equals_the_hand_written_sum(name, encoder):
    assert difference(name, encoder) <= 1e-6


def test_batches_whose_size_is_no_power_of_two():
    assert difference("plain", mlp, batch_size=11) <= 1e-6


@pytest.mark.parametrize("weights", [{"size": 0.1, "kind": 2.0}])
def test_fixed_weights_equal_the_hand_written_weighted_sum(weights):
    class Weighted(HandWritten):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, targets = batch
            z = self.encoder(x)
            size = nn.functional.mse_loss(self.size(z).squeeze(1), targets["size"])
            shape = nn.functional.l1_loss(self.shape(z), targets["shape"])
            return 2.0 * nn.functional.cross_entropy(self.kind(z), targets["kind"]) + 0.1 * size + shape

    spec = {"class_path": "fixed", "init_args": {"weights": weights}}
    ours, theirs = (trained(model, *RUNS["plain"]) for model in (module(spec), Weighted()))
    assert float((ours - theirs).abs().max()) <= 1e-6
