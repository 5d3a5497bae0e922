"""What a Trainer offers works as ever. Fixed equals a hand-written module; the others train and end finite."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch import callbacks as available
from lightning.pytorch.callbacks import (
    Callback,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
)
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities import grad_norm
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from tests.nets import HandWritten, conv, loader, mlp, module, network, sgd, trainer
from tests.versions import needs

Make = Callable[..., L.LightningModule]


class Given:
    """What a feature's run is given: how to make the module under test, a Trainer, and a folder."""

    def __init__(self, make: Make, folder: Path) -> None:
        self.make, self.folder = make, folder

    def fit(self, model: L.LightningModule | None = None, batches: int = 8, **options: Any) -> Tensor:
        """The parameters after a run."""
        model = self.make() if model is None else model
        trainer(default_root_dir=self.folder, **options).fit(model, loader(batches * 16))
        return network(model)

    def with_optimizer(self, build: Callable[[list[Any]], torch.optim.Optimizer]) -> L.LightningModule:
        """All parameters in one group, as some optimizers demand."""
        model = self.make()
        model.configure_optimizers = lambda: build(list(model.parameters()))
        return model


class GradNorms(Callback):
    def __init__(self) -> None:
        self.found: list[Tensor] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: L.LightningModule, optimizer: Any) -> None:
        norms = grad_norm(pl_module, norm_type=2)
        self.found += [norms[key] for key in sorted(norms) if "total" in key]


def accumulation_schedule(given: Given) -> Tensor:
    return given.fit(max_epochs=3, callbacks=[GradientAccumulationScheduler({0: 1, 1: 2, 2: 4})])


def swa(given: Given) -> Tensor:
    return given.fit(max_epochs=4, callbacks=[StochasticWeightAveraging(swa_lrs=5e-3, swa_epoch_start=2)])


def swa_with_batch_norm(given: Given) -> Tensor:
    model = given.make(encoder=conv)
    given.fit(model, max_epochs=4, callbacks=[StochasticWeightAveraging(swa_lrs=5e-3, swa_epoch_start=2)])
    return torch.cat([network(model), *(b.float().flatten() for b in model.encoder.buffers())])


def ema(given: Given) -> Tensor:
    needs("lightning", "2.6", "weight averaging")
    return given.fit(callbacks=[available.EMAWeightAveraging(decay=0.9)])


def detect_anomaly(given: Given) -> Tensor:
    return given.fit(detect_anomaly=True)


def simple_profiler(given: Given) -> Tensor:
    return given.fit(profiler="simple")


def advanced_profiler(given: Given) -> Tensor:
    return given.fit(profiler="advanced")


def fused_adamw(given: Given) -> Tensor:
    model = given.with_optimizer(lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, fused=True))
    return given.fit(model, gradient_clip_val=0.5)


def clip_by_norm_and_accumulate(given: Given) -> Tensor:
    return given.fit(gradient_clip_val=0.5, accumulate_grad_batches=2)


def lr_find(given: Given) -> Tensor:
    model = given.make()
    run = trainer(default_root_dir=given.folder, max_epochs=1)
    options = {"num_training": 10, "min_lr": 1e-4, "max_lr": 1e-2, "early_stop_threshold": None}
    finder = Tuner(run).lr_find(model, loader(128), update_attr=False, **options)
    run.fit(model, loader(128))
    return torch.cat([network(model), torch.tensor(finder.results["loss"])])


def lr_finder_callback(given: Given) -> Tensor:
    needs("lightning", "2.5.3", "a fit that goes on after this callback")
    finder = LearningRateFinder(num_training_steps=8, max_lr=1e-2, update_attr=False)
    return given.fit(callbacks=[finder])


def scale_batch_size(given: Given) -> Tensor:
    model = given.make()
    model.batch_size = 4
    model.train_dataloader = lambda: loader(64, batch_size=model.batch_size)
    if is_overridden("validation_step", model):
        model.val_dataloader = lambda: loader(16)  # the tuner insists on one where there is a validation_step
    run = trainer(default_root_dir=given.folder)
    size = Tuner(run).scale_batch_size(model, steps_per_trial=2, max_trials=2)
    run.fit(model)
    return torch.cat([network(model), torch.tensor([size])])


def fast_dev_run(given: Given) -> Tensor:
    return given.fit(fast_dev_run=3)


def grad_norm_in_a_hook(given: Given) -> Tensor:
    norms = GradNorms()
    network_after = given.fit(callbacks=[norms])
    assert len(norms.found) == 8
    return torch.cat([network_after, torch.stack(norms.found)])


def skipped_batches(given: Given) -> Tensor:
    model = given.make()
    step = model.training_step
    model.training_step = lambda batch, batch_idx: None if batch_idx % 3 == 2 else step(batch, batch_idx)
    return given.fit(model)


def loss_in_a_dict(given: Given) -> Tensor:
    model = given.make()
    step = model.training_step
    model.training_step = lambda batch, batch_idx: {"loss": step(batch, batch_idx), "more": torch.ones(3)}
    return given.fit(model)


def barebones(given: Given) -> Tensor:
    model = given.make()
    L.Trainer(accelerator="cpu", max_epochs=1, barebones=True).fit(model, loader(128))
    return network(model)


def overfit_batches(given: Given) -> Tensor:
    return given.fit(overfit_batches=2, max_epochs=4)


def half_frozen_encoder(given: Given) -> Tensor:
    model = given.make()
    model.encoder[0].requires_grad_(False)
    before = model.encoder[0].weight.clone()
    after = given.fit(model)
    assert torch.equal(model.encoder[0].weight, before)
    return after


def frozen_encoder(given: Given) -> Tensor:
    model = given.make()
    model.encoder.requires_grad_(False)
    return given.fit(model)


def thawed_between_epochs(given: Given) -> Tensor:
    model = given.with_optimizer(sgd)

    class Thaw(Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            pl_module.encoder[0].requires_grad_(trainer.current_epoch > 0)

    return given.fit(model, max_epochs=2, callbacks=[Thaw()])


def lbfgs(given: Given) -> Tensor:
    def build(parameters: list[Any]) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(parameters, lr=0.1, max_iter=2, line_search_fn="strong_wolfe")

    return given.fit(given.with_optimizer(build), batches=4)


def manual_optimization(given: Given) -> Tensor:
    model = given.make()
    step = model.training_step
    model.automatic_optimization = False

    def by_hand(batch: Any, batch_idx: int) -> None:
        optimizer = model.optimizers()
        optimizer.zero_grad()
        model.manual_backward(step(batch, batch_idx))
        model.clip_gradients(optimizer, gradient_clip_val=0.5)
        optimizer.step()

    model.training_step = by_hand
    return given.fit(model)


def one_cycle(given: Given) -> Tensor:
    model = given.make()
    build = model.configure_optimizers

    def with_schedule() -> Any:
        optimizer = build()
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.02, total_steps=8)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    model.configure_optimizers = with_schedule
    return given.fit(model)


FEATURES = [
    accumulation_schedule,
    swa,
    swa_with_batch_norm,
    ema,
    detect_anomaly,
    simple_profiler,
    advanced_profiler,
    fused_adamw,
    clip_by_norm_and_accumulate,
    lr_find,
    lr_finder_callback,
    scale_batch_size,
    fast_dev_run,
    grad_norm_in_a_hook,
    skipped_batches,
    loss_in_a_dict,
    barebones,
    overfit_batches,
    half_frozen_encoder,
    frozen_encoder,
    thawed_between_epochs,
    lbfgs,
    manual_optimization,
    one_cycle,
]
EVERY_FEATURE = pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.__name__)
# Lightning asks whether skipping a batch was on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:`training_step` returned `None`")


@EVERY_FEATURE
def test_fixed_equals_the_hand_written_module(feature, tmp_path):
    ours = feature(Given(module, tmp_path))
    theirs = feature(Given(HandWritten, tmp_path))
    start = network(HandWritten())
    assert len(theirs) != len(start) or (theirs - start).abs().max() > 0.01, "the run must go somewhere"
    assert (ours - theirs).abs().max() <= 1e-6


@EVERY_FEATURE
@pytest.mark.parametrize(
    "balancer, level", [("uncertainty", "parameters"), ("pcgrad", "parameters"), ("gradnorm", "features")]
)
def test_the_others_train_and_end_finite(feature, balancer, level, tmp_path):
    models: list[L.LightningModule] = []

    def make(**options: Any) -> L.LightningModule:
        models.append(module(balancer, level=level, **options))
        return models[-1]

    assert feature(Given(make, tmp_path)).isfinite().all()
    model = models[-1]
    untrained = module(balancer, level=level, encoder=conv if feature is swa_with_batch_norm else mlp)
    assert (network(model) - network(untrained)).abs().max() > 0.001
    assert all(value.nan_to_num(0).isfinite().all() for value in model.balancer.state_dict().values())


@pytest.mark.parametrize("balancer", ["uncertainty", "pcgrad", "gradnorm"])
def test_lr_find_leaves_the_balancer_as_it_was(balancer, tmp_path):
    model = module(balancer)
    before = {name: value.clone() for name, value in model.balancer.state_dict().items()}
    run = trainer(default_root_dir=tmp_path, max_epochs=1)
    Tuner(run).lr_find(model, loader(128), num_training=6, update_attr=False, early_stop_threshold=None)
    for name, value in model.balancer.state_dict().items():
        assert torch.equal(value.nan_to_num(-7), before[name].nan_to_num(-7)), name


@pytest.mark.parametrize("balancer", ["pcgrad", "gradnorm"])
def test_the_epoch_over_batch_norms_statistics_is_no_step_of_the_balancer(balancer):
    model = module(balancer, encoder=conv)
    run = trainer(max_epochs=4, callbacks=[StochasticWeightAveraging(swa_lrs=5e-3, swa_epoch_start=2)])
    run.fit(model, loader(64))
    assert int(model.balancer.step) == 16


@pytest.mark.parametrize("balancer", ["pcgrad", "gradnorm"])
def test_validation_moves_no_state_of_the_balancer(balancer):
    model = module(balancer)
    run = trainer(max_epochs=2, val_check_interval=1)
    run.fit(model, loader(64), loader(32))
    run.validate(model, loader(32), verbose=False)
    run.test(model, loader(32), verbose=False)
    assert int(model.balancer.step) == 8
