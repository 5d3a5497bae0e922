"""Every balancer under the Trainer: resumed in the middle of an epoch, in half precision, clipped and accumulated."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision

from lightning_mtl.balancers import available, load
from tests.module.test_resume import check
from tests.nets import BALANCERS, loader, module, network, trainer

NEW = [key for key in available() if key not in BALANCERS]


@pytest.mark.parametrize("key", NEW)
def test_resume_within_an_epoch_changes_no_bit(key, tmp_path):
    check(key, "parameters", 2, tmp_path, at=4)


@pytest.mark.parametrize("key", [key for key in NEW if "features" in load(key, 3).levels and key != "metabalance"])
def test_resume_at_level_features_changes_no_bit(key, tmp_path):
    check(key, "features", 1, tmp_path, at=4)


def fitted(key, **options):
    model = module(key)
    trainer(max_epochs=2, gradient_clip_val=0.5, **options).fit(model, loader(80))
    return network(model)


@pytest.mark.parametrize("key", NEW)
def test_float16_with_a_scaler_is_close_to_float32(key):
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
    exact, half = fitted(key), fitted(key, plugins=precision)
    start = network(module(key))
    assert (exact - start).abs().max() > 1e-3
    assert (half - exact).abs().max() <= 1e-3
