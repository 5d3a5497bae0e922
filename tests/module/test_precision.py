"""On one process: float16 with a gradient scaler, and what other precisions do to a balancer."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.amp import GradScaler
from torch.utils.data import DataLoader

from lightning_mtl import MultiTaskModule
from lightning_mtl.tasks import RegressionTask
from tests.nets import (
    BALANCERS,
    GRAM_BALANCERS,
    LEVELS,
    Samples,
    conv,
    loader,
    mlp,
    module,
    network,
    samples,
    sgd,
    three_tasks,
    trainer,
)

EVERY_LEVEL = pytest.mark.parametrize("level", LEVELS)
EVERY_BALANCER = pytest.mark.parametrize("balancer", BALANCERS)


def state(model: Any) -> Tensor:
    values = [value.double().flatten() for value in model.balancer.state_dict().values()]
    return torch.cat([torch.zeros(0), *values]).nan_to_num(-7)


class Record(Callback):
    """The network, the balancer's state and the scale before the first batch and after every one."""

    def __init__(self) -> None:
        self.networks: list[Tensor] = []
        self.states: list[Tensor] = []
        self.scales: list[float] = []
        self.dtypes: set[torch.dtype] = set()

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        pl_module.encoder.register_forward_hook(lambda m, args, out: self.dtypes.add(out.dtype))
        self._take(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        self._take(trainer, pl_module)

    def _take(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.networks.append(network(pl_module))
        self.states.append(state(pl_module))
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self.scales.append(scaler.get_scale() if scaler is not None else 1.0)


def half(scale: float = 1024.0) -> MixedPrecision:
    """Float16 on the CPU; the string "16-mixed" would be bfloat16 there."""
    return MixedPrecision("16-mixed", "cpu", GradScaler("cpu", init_scale=scale))


def fit(model: Any, data: Any, **options: Any) -> Record:
    record = Record()
    trainer(callbacks=[record], **options).fit(model, data)
    return record


def smooth(balancer: str, level: str) -> MultiTaskModule:
    """Without the kink of the absolute error, at which one rounding flips the sign of a gradient."""
    torch.manual_seed(0)
    tasks = three_tasks()
    tasks["shape"] = RegressionTask(tasks["shape"].head, loss="smooth_l1")
    return MultiTaskModule(mlp(), tasks, balancer, level, sgd)


def in_float16_and_float32(balancer: str, level: str, **options: Any) -> float:
    runs = []
    for plugins in ([], [half()]):
        record = fit(
            smooth(balancer, level),
            loader(20 * 16 * options.get("accumulate_grad_batches", 1)),
            plugins=plugins,
            **options,
        )
        assert record.dtypes == {torch.float16 if plugins else torch.float32}
        assert set(record.scales) == {1024.0 if plugins else 1.0}, "no step was skipped"
        runs.append(record.networks[-1])
    assert (runs[0] - record.networks[0]).abs().max() > 0.02
    return float((runs[0] - runs[1]).abs().max())


@EVERY_LEVEL
@EVERY_BALANCER
@pytest.mark.parametrize("clip", [None, 0.5])
def test_float16_stays_near_float32(balancer, level, clip):
    assert in_float16_and_float32(balancer, level, gradient_clip_val=clip) <= 1e-3


@EVERY_BALANCER
def test_float16_with_accumulation_stays_near_float32(balancer):
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
    assert in_float16_and_float32(balancer, "parameters", **options) <= 1e-3


def with_inf_in_batch_2() -> DataLoader:
    """In one sample of the third batch the target of one task is infinite, and so are its loss and gradient."""
    x, targets = samples(6 * 16)
    targets["size"][2 * 16 + 5] = torch.inf
    return DataLoader(Samples(x, targets), batch_size=16)


@EVERY_LEVEL
@EVERY_BALANCER
@pytest.mark.parametrize("clip", [None, 0.5])
def test_a_step_with_inf_in_one_task_is_skipped(balancer, level, clip):
    record = fit(module(balancer, level=level), with_inf_in_batch_2(), plugins=[half()], gradient_clip_val=clip)
    assert record.scales == [1024, 1024, 1024, 512, 512, 512, 512]
    moved = [not torch.equal(a, b) for a, b in zip(record.networks[:-1], record.networks[1:], strict=True)]
    assert moved == [True, True, False, True, True, True]
    assert record.networks[-1].isfinite().all()
    before, after = record.states[2], record.states[3]
    assert torch.equal(before, after)
    if balancer != "fixed":
        assert not torch.equal(record.states[1], before)


@EVERY_LEVEL
@EVERY_BALANCER
def test_an_overflow_of_the_backward_is_skipped(balancer, level):
    """The losses are finite; their scaled gradients are not, until the scale has come down."""
    record = fit(module(balancer, level=level), loader(24 * 16), plugins=[half(2.0**30)])
    skipped = [b < a for a, b in zip(record.scales[:-1], record.scales[1:], strict=True)]
    assert skipped[0]
    assert not skipped[-1]
    for step, skip in enumerate(skipped):
        assert torch.equal(record.networks[step], record.networks[step + 1]) == skip
    assert record.networks[-1].isfinite().all()
    if balancer in GRAM_BALANCERS:
        first = record.states[0]
        assert torch.equal(record.states[1], first)


@EVERY_LEVEL
@EVERY_BALANCER
@pytest.mark.parametrize("precision", ["bf16-true", "64-true", "bf16-mixed"])
@pytest.mark.parametrize("encoder", [mlp, conv])
def test_other_precisions_keep_the_balancers_buffers(balancer, level, precision, encoder):
    model = module(balancer, level=level, encoder=encoder)
    before = {name: value.dtype for name, value in model.balancer.named_state()}
    data: Any = loader(5 * 16)
    if precision.endswith("true"):
        dtype = torch.bfloat16 if precision == "bf16-true" else torch.float64
        x, targets = samples(5 * 16)
        data = DataLoader(
            Samples(x.to(dtype), {n: t.to(dtype) if t.is_floating_point() else t for n, t in targets.items()}),
            batch_size=16,
        )
    record = fit(model, data, precision=precision)
    assert {name: value.dtype for name, value in model.balancer.named_state()} == before
    assert record.networks[-1].isfinite().all()
    assert record.states[-1].isfinite().all()
    if balancer in GRAM_BALANCERS:
        assert int(model.balancer.step) == 5
