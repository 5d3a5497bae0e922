"""Gradients, precision and resume on every device of this machine: the CPU always, a GPU where there is one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader

from tests.nets import BALANCERS, LEVELS, HandWritten, Samples, conv, loader, mlp, module, network, samples, trainer

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
ON_EACH = pytest.mark.parametrize("device", DEVICES)
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


@pytest.fixture(autouse=True)
def _exact_convolutions():
    """TF32 would compare two roundings of 1e-3 with each other."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def fitted(model: Any, device: str, **options: Any) -> Any:
    accelerator = "cpu" if device == "cpu" else "gpu"
    trainer(accelerator=accelerator, devices=1, max_epochs=-1, **options).fit(model, loader())
    return network(model.cpu())


def scaler(device: str) -> MixedPrecision:
    return MixedPrecision("16-mixed", device, torch.amp.GradScaler(device, init_scale=1024.0))


@ON_EACH
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("encoder", [mlp, conv])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", BALANCERS)
def test_gradients_equal_brute_force(device, dtype, encoder, level, name):
    model = module(name, encoder=encoder, level=level).to(device, dtype)
    x, targets = tree_map(lambda t: t.to(device, dtype if t.is_floating_point() else t.dtype), samples(16))
    encoder_parameters = list(model.encoder.parameters())
    model.training_step((x, targets), 0).backward()
    found = torch.cat([parameter.grad.flatten() for parameter in encoder_parameters])
    assert model.last_balance is not None
    weights = model.last_balance.weights.to(device, torch.float64)

    z = model.encoder(x)
    rows = []
    for task, head in model.tasks.items():
        loss, _ = head.mean_loss(head(z), targets[task], task)
        grads = torch.autograd.grad(loss, encoder_parameters, retain_graph=True)
        rows.append(torch.cat([grad.flatten() for grad in grads]).double())
    expected = weights @ torch.stack(rows)
    assert float((found - expected).norm() / expected.norm()) <= TOLERANCE[dtype]


@ON_EACH
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.5},
        {"precision": "bf16-mixed"},
    ],
    ids=str,
)
def test_fixed_equals_the_sum(device, options):
    ours = fitted(module("fixed"), device, max_steps=50, **options)
    assert float((ours - fitted(HandWritten(), device, max_steps=50, **options)).abs().max()) <= 1e-6


@ON_EACH
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", BALANCERS)
def test_fp16_stays_close_to_fp32(device, level, name):
    options = {"max_steps": 20, "gradient_clip_val": 0.5}
    whole = fitted(module(name, level=level), device, **options)
    half = fitted(module(name, level=level), device, plugins=[scaler(device)], **options)
    assert float((whole - half).abs().max()) <= 1e-3


@ON_EACH
@pytest.mark.parametrize("name", BALANCERS)
def test_an_overflow_is_skipped(device, name):
    model = module(name)
    before: dict[str, Tensor] = {key: value.clone() for key, value in model.state_dict().items()}
    x, targets = samples(16)
    targets["size"][3] = float("inf")
    plugin = scaler(device)
    run = trainer(accelerator="cpu" if device == "cpu" else "gpu", devices=1, max_steps=1, plugins=[plugin])
    run.fit(model, DataLoader(Samples(x, targets), batch_size=16))
    assert plugin.scaler.get_scale() == 512
    after = model.cpu().state_dict()
    assert after.keys() == before.keys()
    assert all(torch.allclose(after[key], before[key], rtol=0, atol=0, equal_nan=True) for key in before)
