"""The hooks of a class belong to its user: whether or not they call ``super()``, a run is the same.

Each run has a hook of the user's somewhere; the oracle is the run without it.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn

from lightning_mtl import Balanced
from lightning_mtl.balancers import DWA, PCGrad
from lightning_mtl.callbacks import BalanceMonitor
from lightning_mtl.module.core import core_of
from tests.module.written import Net, Plain, Step, batches, made
from tests.nets import trainer
from tests.versions import TENSORS_ONLY

DTP = {"class_path": "dtp", "init_args": {"metric": "error"}}
STCH = {"class_path": "stch", "init_args": {"warmup_epochs": 1}}


def run(model: Any, **options: Any) -> tuple[Tensor, dict[str, Tensor], dict[str, float]]:
    """Parameters, the balancer's state and what was logged of the balance, after three epochs."""
    go = trainer(**({"max_epochs": 3, "log_every_n_steps": 1} | options))
    go.fit(model)
    logged = {key: float(value) for key, value in go.callback_metrics.items() if key.startswith("balance/")}
    parameters = torch.cat([p.detach().flatten() for p in model.parameters()])
    return parameters, model.balancer.state_dict(), logged


def assert_same(found: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    assert torch.equal(found[0], expected[0])
    assert found[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        assert torch.equal(found[1][name].nan_to_num(-7), value.nan_to_num(-7)), name
    assert found[2] == pytest.approx(expected[2])
    assert found[2]


HOOKS = [
    "setup", "configure_callbacks", "on_fit_start", "on_train_start", "on_train_epoch_start",
    "on_train_batch_start", "on_train_batch_end", "on_train_epoch_end", "on_validation_end", "on_fit_end", "teardown",
    "on_save_checkpoint", "on_load_checkpoint",
]  # fmt: skip


def silent(hook: str, calls: list[str]) -> Callable[..., Any]:
    """A hook that does not call ``super()``."""

    def own(*args: Any, **kwargs: Any) -> Any:
        calls.append(hook)
        return [] if hook == "configure_callbacks" else None

    return own


def in_the_class(hooks: dict[str, Any]) -> Any:
    return made(type("Own", (Plain,), hooks))


def in_a_mixin(hooks: dict[str, Any]) -> Any:
    return made(type("Own", (type("Mixin", (), hooks), Step, Balanced, Net), {}))


def in_the_base(hooks: dict[str, Any]) -> Any:
    return made(type("Own", (Step, Balanced, type("Base", (Net,), hooks)), {}))


def two_levels_up(hooks: dict[str, Any]) -> Any:
    return made(type("Own", (type("First", (Plain,), hooks),), {}))


def on_the_module(hooks: dict[str, Any]) -> Any:
    model = made()
    for hook, own in hooks.items():
        setattr(model, hook, own)
    return model


@pytest.fixture(scope="module")
def without() -> tuple[Any, ...]:
    return run(made())


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_that_does_not_call_super_changes_nothing(hook, without):
    calls: list[str] = []
    assert_same(run(in_the_class({hook: silent(hook, calls)})), without)
    assert calls or hook in ("on_save_checkpoint", "on_load_checkpoint")  # nothing was saved


@pytest.mark.parametrize("place", [in_a_mixin, in_the_base, two_levels_up, on_the_module])
def test_wherever_the_hooks_are(place, without):
    calls: list[str] = []
    assert_same(run(place({hook: silent(hook, calls) for hook in HOOKS})), without)
    assert {*calls, "on_save_checkpoint", "on_load_checkpoint"} == set(HOOKS)


@pytest.mark.parametrize("balancer", [STCH, DTP, "uncertainty", "pcgrad"])
def test_all_hooks_at_once_with_other_balancers(balancer):
    own = type("Own", (Plain,), {hook: silent(hook, []) for hook in HOOKS})
    assert_same(run(made(own, balancer)), run(made(Plain, balancer)))


class Counting(DWA):
    ends = 0

    def end_epoch(self) -> None:
        type(self).ends += 1
        super().end_epoch()


def test_hooks_that_do_call_super_run_ours_once(monkeypatch, without, tmp_path):
    def polite(hook: str) -> Callable[..., Any]:
        def own(self: Any, *args: Any, **kwargs: Any) -> Any:
            return getattr(super(cls[0], self), hook)(*args, **kwargs)

        def again(self: Any, *args: Any, **kwargs: Any) -> Any:
            return getattr(super(cls[1], self), hook)(*args, **kwargs)

        hooks[0][hook], hooks[1][hook] = own, again
        return own

    hooks: list[dict[str, Any]] = [{}, {}]
    for hook in HOOKS:
        polite(hook)
    first = type("First", (Plain,), hooks[0])
    cls = [first, type("Second", (first,), hooks[1])]
    monkeypatch.setattr(Counting, "ends", 0)
    model = made(cls[1], Counting)
    keep = ModelCheckpoint(tmp_path, save_last=True)
    go = trainer(max_epochs=3, log_every_n_steps=1, callbacks=[keep], enable_checkpointing=True)
    go.fit(model)
    assert Counting.ends == 3
    kinds = [type(callback).__name__ for callback in go.callbacks]
    assert kinds.count("Lifecycle") == kinds.count("BalanceMonitor") == 1
    assert torch.equal(torch.cat([p.detach().flatten() for p in model.parameters()]), without[0])


def test_callbacks_of_the_class_stay_and_checkpoints_are_last(tmp_path):
    class Mine(Callback):
        pass

    class Own(Plain):
        def configure_callbacks(self) -> Any:
            return Mine()  # one instead of a list

    keep = ModelCheckpoint(tmp_path)
    go = trainer(callbacks=[keep], enable_checkpointing=True)
    go.fit(made(Own, DTP))
    kinds = [type(callback).__name__ for callback in go.callbacks]
    assert kinds[-1] == "ModelCheckpoint"
    assert {"Mine", "Lifecycle", "ShowMetrics", "BalanceMonitor"} <= set(kinds)


class Rare(BalanceMonitor):
    pass


@pytest.mark.parametrize("place", ["trainer", "class"])
def test_a_monitor_of_ones_own_is_the_only_one(place):
    mine = Rare(every_n_steps=2)
    own = type("Own", (Plain,), {"configure_callbacks": lambda self: [mine]}) if place == "class" else Plain
    go = trainer(callbacks=[mine] if place == "trainer" else None)
    go.fit(made(own))
    assert [callback for callback in go.callbacks if isinstance(callback, BalanceMonitor)] == [mine]


def test_one_module_in_two_fits_and_two_trainers(monkeypatch):
    monkeypatch.setattr(Counting, "ends", 0)
    model = made(balancer=Counting)
    go = trainer(max_epochs=1)
    go.fit(model)
    go.fit_loop.max_epochs = 3
    go.fit(model)
    assert Counting.ends == 3
    assert [type(callback).__name__ for callback in go.callbacks].count("Lifecycle") == 1
    trainer(max_epochs=2).fit(model)
    assert Counting.ends == 5


def test_validation_before_a_fit_and_a_fit_of_a_plain_module_after_it(without):
    model, go = made(), trainer(max_epochs=3, log_every_n_steps=1)
    go.validate(model, verbose=False)
    go.fit(model)
    assert torch.equal(torch.cat([p.detach().flatten() for p in model.parameters()]), without[0])
    # The callbacks stay in this Trainer.
    go.fit_loop.max_epochs = 4
    go.fit(made(balancer=DTP))
    go.fit_loop.max_epochs = 5
    go.fit(Net())
    assert go.global_step == 5 * 4


def test_parameters_that_come_between_two_fits_are_trained():
    model, go = made(balancer="pcgrad"), trainer(max_epochs=1)
    go.fit(model)
    more = nn.Linear(4, 4)
    model.encoder = nn.Sequential(model.encoder, more)
    before = more.weight.detach().clone()
    go.fit_loop.max_epochs = 2
    go.fit(model)
    assert not torch.equal(more.weight, before)


@pytest.mark.parametrize("balancer", ["dwa", "pcgrad"])
def test_tuners_swap_the_callbacks_and_give_them_back(balancer, monkeypatch):
    model, go = made(balancer=balancer), trainer(max_epochs=3, log_every_n_steps=1)
    before = {name: value.clone() for name, value in model.balancer.state_dict().items()}
    Tuner(go).lr_find(model, num_training=6, update_attr=False, early_stop_threshold=None)
    Tuner(go).scale_batch_size(model, steps_per_trial=2, max_trials=1, init_val=2, batch_arg_name="batch_size")
    for name, value in model.balancer.state_dict().items():
        assert torch.equal(value.nan_to_num(-7), before[name].nan_to_num(-7)), name
    model.batch_size = 4
    go.fit(model)
    expected = run(made(balancer=balancer))
    assert torch.equal(torch.cat([p.detach().flatten() for p in model.parameters()]), expected[0])


class DeepSpeedStrategy(SingleDeviceStrategy):
    pass


@pytest.mark.parametrize("hook", ["setup", "configure_callbacks", "on_fit_start"])
def test_the_checks_before_a_fit_are_not_lost(hook):
    own = type("Own", (Plain,), {hook: silent(hook, [])})
    with pytest.raises(ValueError, match="got DeepSpeed"):
        trainer(strategy=DeepSpeedStrategy("cpu")).fit(made(own))
    model = made(own, "uncertainty")
    model.configure_optimizers = lambda: torch.optim.SGD(model.encoder.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="none for 'log_variance' of Uncertainty"):
        trainer().fit(model)


def test_parameters_may_be_added_to_an_optimizer_in_on_fit_start():
    class Late(Plain):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD([*self.encoder.parameters(), *self.a.parameters(), *self.b.parameters()], lr=0.1)

        def on_fit_start(self) -> None:
            self.optimizers().add_param_group({"params": list(self.balancer.parameters())})

    model = made(Late, "uncertainty")
    trainer().fit(model)
    assert model.balancer.log_variance.abs().max() > 0


def test_hooks_of_a_module_without_a_trainer():
    model = made()
    assert {type(callback).__name__ for callback in model.configure_callbacks()} == {"Lifecycle", "BalanceMonitor"}
    checkpoint: dict[str, Any] = {"state_dict": model.state_dict()}
    model.on_save_checkpoint(checkpoint)
    model.on_load_checkpoint(checkpoint)


def test_a_module_of_pytorch_lightning():
    pytorch_lightning = pytest.importorskip("pytorch_lightning")

    class Other(pytorch_lightning.LightningModule):
        losses = Net.losses
        training_step, configure_optimizers = Net.training_step, Net.configure_optimizers

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.encoder, self.a, self.b, self.lr = nn.Linear(5, 4), nn.Linear(4, 1), nn.Linear(4, 1), 0.05

    class Own(Step, Balanced, Other):
        def on_train_epoch_end(self) -> None:
            pass

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    go = pytorch_lightning.Trainer(max_epochs=3, accelerator="cpu", enable_model_summary=False, **quiet)
    model = made(Own)
    go.fit(model, batches())
    expected = made()
    trainer(max_epochs=3).fit(expected, batches())
    assert torch.equal(model.encoder.weight, expected.encoder.weight)


# --- One task per batch, and accumulated gradients -------------------------------------------------------------------


class InTurn(Plain):
    """One task in each batch, as ``turns`` says."""

    turns: tuple[str, ...] = ("a", "b")

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        turn = self.turns[batch_idx % len(self.turns)]
        return self.balance({name: loss if name in turn else None for name, loss in self.losses(batch).items()})


ONE_AT_A_TIME = "labels of one task each"


@pytest.mark.parametrize(
    "accumulate", [{"accumulate_grad_batches": 2}, {"callbacks": "GradientAccumulationScheduler"}], ids=["two", "later"]
)
def test_one_task_per_batch_with_accumulation_is_said_once(accumulate):
    if "callbacks" in accumulate:
        accumulate = {"callbacks": [L.pytorch.callbacks.GradientAccumulationScheduler({0: 1, 1: 2})]}
    with pytest.warns(UserWarning, match=ONE_AT_A_TIME) as caught:
        trainer(max_epochs=4, **accumulate).fit(made(InTurn, "pcgrad"))
    assert len([each for each in caught if ONE_AT_A_TIME in str(each.message)]) == 1


@pytest.mark.parametrize(
    "turns, accumulate, balancer",
    [
        (("a", "b"), 1, "pcgrad"),  # nothing is accumulated
        (("a", "b"), 2, "uncertainty"),  # nothing is compared
        (("ab", "b"), 2, "pcgrad"),  # one batch of the window has both
        (("a", "a", "b", "b"), 2, "pcgrad"),  # one task in the whole step
        (("ab",), 2, "pcgrad"),
    ],
)
@pytest.mark.filterwarnings("error:.*labels of one task each")
def test_nothing_is_said_where_a_method_could_compare_or_need_not(turns, accumulate, balancer):
    model = made(type("Own", (InTurn,), {"turns": turns}), balancer)
    trainer(max_epochs=2, accumulate_grad_batches=accumulate).fit(model)


@pytest.mark.filterwarnings("error:.*labels of one task each")
@pytest.mark.parametrize("mode", [None, "max_size"])
def test_the_cure_for_one_task_per_batch(mode):
    from lightning.pytorch.utilities import CombinedLoader

    class Both(Plain):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            return self.balance({name: None if x is None else self.losses(x)[name] for name, x in batch.items()})

    loaders: Any = {"a": batches(), "b": batches(12)}
    model = made(Both, PCGrad)
    trainer(max_epochs=1).fit(model, loaders if mode is None else CombinedLoader(loaders, mode))
    assert model.last_balance.gram is not None


# --- Nothing is kept of a checkpoint ----------------------------------------------------------------------------------


class AtEveryEpoch(LearningRateFinder):
    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.lr_find(trainer, pl_module)


def find_rate(model: Any, folder: Any) -> None:
    Tuner(trainer()).lr_find(model, num_training=6, update_attr=False, early_stop_threshold=None)


def find_size(model: Any, folder: Any) -> None:
    options = {"steps_per_trial": 2, "max_trials": 1, "init_val": 2}
    Tuner(trainer()).scale_batch_size(model, batch_arg_name="batch_size", **options)


def find_rate_in_a_fit(model: Any, folder: Any) -> None:
    options = {"num_training_steps": 6, "early_stop_threshold": None, "update_attr": False}
    trainer(callbacks=[AtEveryEpoch(**options)]).fit(model)


class Refuses(Callback):
    def on_fit_start(self, *args: Any) -> None:
        raise ZeroDivisionError


def break_off(model: Any, folder: Any) -> None:
    go = trainer()
    go.fit(model)
    go.save_checkpoint(folder / "a.ckpt")
    with pytest.raises(ZeroDivisionError):
        trainer(max_epochs=2, callbacks=[Refuses()]).fit(model, ckpt_path=folder / "a.ckpt", **TENSORS_ONLY)


@pytest.mark.parametrize("go", [find_rate, find_size, find_rate_in_a_fit, break_off])
@pytest.mark.filterwarnings("ignore:The `LightningModule.lr` or")
def test_no_checkpoint_is_kept(go, tmp_path):
    model = made()
    model.wide = nn.Linear(100, 100)
    before = len(pickle.dumps(model))
    go(model, tmp_path)
    assert core_of(model).checkpoint is None
    assert len(pickle.dumps(model)) < before + 10_000
    trainer().fit(model)
    assert core_of(model).checkpoint is None
