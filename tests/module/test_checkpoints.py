"""Checkpoints travel: from the plain class to a balanced one, between balancers, and back to a project's own tools."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lightning_mtl import Balanced, to_plain_checkpoint
from tests.module.written import Net, Step, batches
from tests.nets import trainer
from tests.versions import TENSORS_ONLY, needs

Optimizer = Callable[[Any], torch.optim.Optimizer]


def averaging() -> Callback:
    needs("lightning", "2.6", "weight averaging")
    from lightning.pytorch.callbacks import EMAWeightAveraging

    return EMAWeightAveraging(decay=0.9)


def balancers_own(model: Any) -> list[Tensor]:
    return list(model.balancer.parameters()) if isinstance(model, Balanced) else []


def models_own(model: Any) -> list[Tensor]:
    mine = {id(parameter) for parameter in balancers_own(model)}
    return [parameter for parameter in model.parameters() if id(parameter) not in mine]


def all_in_one(model: Any) -> Any:
    return torch.optim.Adam(model.parameters(), lr=0.05)


def balancer_apart(model: Any) -> Any:
    groups = [{"params": models_own(model)}]
    own = balancers_own(model)
    return torch.optim.Adam([*groups, *([{"params": own, "lr": 0.2}] if own else [])], lr=0.05)


def balancer_first(model: Any) -> Any:
    own = balancers_own(model)
    groups = [{"params": own, "lr": 0.2}] if own else []
    return torch.optim.Adam([*groups, {"params": models_own(model)}], lr=0.05)


def two_groups(model: Any) -> Any:
    """The balancer's stand between the heads'."""
    rest = [*model.a.parameters(), *balancers_own(model), *model.b.parameters()]
    return torch.optim.Adam([{"params": model.encoder.parameters(), "lr": 0.01}, {"params": rest}], lr=0.05)


def scheduled(kind: str) -> Any:
    def build(model: Any) -> Any:
        optimizer = balancer_apart(model)
        schedulers = {
            "lambda": lambda: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step),
            "one cycle": lambda: torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=16),
            "in turn": lambda: torch.optim.lr_scheduler.SequentialLR(
                optimizer,
                [torch.optim.lr_scheduler.ConstantLR(optimizer), torch.optim.lr_scheduler.StepLR(optimizer, 3)],
                milestones=[2],
            ),
            "plateau": lambda: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer),
        }
        config = {"scheduler": schedulers[kind](), "interval": "step", "monitor": "loss"}
        return {"optimizer": optimizer, "lr_scheduler": config}

    return build


class Saved(Net):
    """The plain class: its optimizer is made by ``build``, and what it has when training starts is kept."""

    build: Any = staticmethod(all_in_one)

    def configure_optimizers(self) -> Any:
        return type(self).build(self)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.total(batch)
        self.log("loss", loss.detach())
        return loss

    def total(self, batch: Tensor) -> Tensor:
        return sum(self.losses(batch).values())

    def on_train_start(self) -> None:
        self.at_start = moments(self)


class Turned(Balanced, Saved):
    def total(self, batch: Tensor) -> Tensor:
        return self.balance(self.losses(batch))


def moments(model: Any) -> dict[str, Tensor]:
    """Adam's first moments by the parameters' names."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = model.trainer.optimizers[0]
    return {names[id(p)]: state["exp_avg"].clone() for p, state in optimizer.state.items()}


def new(balancer: Any, build: Any = all_in_one) -> Any:
    """A module with this balancer; ``None``: the plain one."""
    if balancer is None:
        return type("Saved", (Saved,), {"build": staticmethod(build)})()
    return type("Turned", (Turned,), {"build": staticmethod(build)})(tasks=["a", "b"], balancer=balancer)


def fit(model: Any, epochs: int, resume: Path | None = None) -> L.Trainer:
    go = trainer(max_epochs=epochs, limit_val_batches=0)
    go.fit(model, batches(), ckpt_path=resume, **({} if resume is None else TENSORS_ONLY))
    return go


def saved(balancer: Any, folder: Path, build: Any = all_in_one, epochs: int = 2) -> tuple[Any, Path]:
    model, path = new(balancer, build), folder / "saved.ckpt"
    fit(model, epochs).save_checkpoint(path)
    return model, path


def network(model: Any) -> Tensor:
    return torch.cat([p.detach().flatten() for p in models_own(model)])


@pytest.fixture(name="said")
def what_is_logged(caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    caplog.set_level(logging.INFO)
    return lambda: "\n".join(record.getMessage() for record in caplog.records)


CHANGES = [
    (None, "fixed"),
    (None, "uncertainty"),
    (None, "pcgrad"),
    ("uncertainty", "pcgrad"),
    ("pcgrad", "uncertainty"),
    ("uncertainty", "imtl_l"),
    ("gradnorm", "pcgrad"),
    ("pcgrad", "mgda"),  # the same names and shapes of state
    ("fixed", "dwa"),
    ("uncertainty", "fixed"),
    ("uncertainty", {"class_path": "uncertainty", "init_args": {"lr": 0.01}}),
]
LOSES = {"uncertainty", "gradnorm", "pcgrad"}


@pytest.mark.parametrize("before, after", CHANGES, ids=str)
def test_a_run_goes_on_with_another_balancer(before, after, tmp_path, said):
    old, path = saved(before, tmp_path)
    model = new(after)
    fresh = {name: value.clone() for name, value in model.balancer.state_dict().items()}
    adam = {name: value for name, value in moments(old).items() if not name.startswith("balancer")}
    start: list[Any] = []

    class Look(Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            start.append((network(pl_module), {n: v.clone() for n, v in pl_module.balancer.state_dict().items()}))

    go = trainer(max_epochs=3, limit_val_batches=0, callbacks=[Look()])
    if before in LOSES:
        with pytest.warns(UserWarning, match="is left out; .* starts afresh"):
            go.fit(model, batches(), ckpt_path=path)
    else:
        go.fit(model, batches(), ckpt_path=path)
        assert ("starts afresh" in said()) == bool(fresh)
    assert go.global_step == 12
    assert torch.equal(start[0][0], network(old))
    for name, value in fresh.items():
        assert torch.equal(start[0][1][name].nan_to_num(-7), value.nan_to_num(-7)), name
    assert model.at_start.keys() == adam.keys()
    assert all(torch.equal(model.at_start[name], value) for name, value in adam.items())


@pytest.mark.parametrize("build", [all_in_one, balancer_apart, balancer_first, two_groups], ids=lambda f: f.__name__)
@pytest.mark.parametrize("before, after", [(None, "uncertainty"), ("uncertainty", "pcgrad"), ("uncertainty", "imtl_l")])
@pytest.mark.filterwarnings("ignore:.*starts afresh")
def test_adams_moments_stay_with_the_models_parameters(before, after, build, tmp_path):
    old, path = saved(before, tmp_path, build)
    adam = {name: value for name, value in moments(old).items() if not name.startswith("balancer")}
    model = new(after, build)
    fit(model, 3, path)
    assert model.at_start.keys() == adam.keys()
    assert all(torch.equal(model.at_start[name], value) for name, value in adam.items())
    rates = [group["lr"] for group in model.trainer.optimizers[0].param_groups]
    assert rates == [group["lr"] for group in build(model).param_groups]


@pytest.mark.parametrize("build", [balancer_apart, two_groups], ids=lambda f: f.__name__)
def test_the_same_balancer_keeps_all(build, tmp_path, recwarn):
    old, path = saved("uncertainty", tmp_path, build)
    model = new("uncertainty", build)
    fit(model, 3, path)
    assert model.at_start.keys() == moments(old).keys()
    assert all(torch.equal(model.at_start[name], value) for name, value in moments(old).items())
    whole = new("uncertainty", build)
    fit(whole, 3)
    assert torch.equal(torch.cat([p.flatten() for p in model.parameters()]),
                       torch.cat([p.flatten() for p in whole.parameters()]))  # fmt: skip
    assert not [each for each in recwarn if "afresh" in str(each.message)]


def test_the_same_balancer_in_another_place_of_the_optimizer_keeps_its_moments(tmp_path):
    old, path = saved("uncertainty", tmp_path, balancer_apart)
    model = new("uncertainty", all_in_one)
    fit(model, 3, path)
    assert all(torch.equal(model.at_start[name], value) for name, value in moments(old).items())


@pytest.mark.parametrize("kind", ["lambda", "one cycle", "in turn", "plateau"])
@pytest.mark.parametrize("before, after", [(None, "uncertainty"), ("uncertainty", "pcgrad")])
@pytest.mark.filterwarnings("ignore:.*starts afresh")
# Schedulers call each other's step() without an epoch.
@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")
def test_schedulers_go_on(kind, before, after, tmp_path):
    build = scheduled(kind)
    _, path = saved(before, tmp_path, build)
    model = new(after, build)
    fit(model, 3, path)
    whole = new(None, build)
    fit(whole, 3)
    rate, expected = (m.trainer.optimizers[0].param_groups[0]["lr"] for m in (model, whole))
    assert rate == pytest.approx(expected)


def test_fixed_goes_on_as_the_plain_class_does(tmp_path):
    _, path = saved(None, tmp_path)
    model, plain = new("fixed"), new(None)
    fit(model, 4, path)
    fit(plain, 4, path)
    assert torch.equal(network(model), network(plain))


def test_another_number_of_the_models_parameters_is_refused_as_ever(tmp_path):
    _, path = saved(None, tmp_path)
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        fit(
            new("uncertainty", lambda m: torch.optim.Adam([*m.encoder.parameters(), *m.balancer.parameters()])), 3, path
        )


class Wider(Saved):
    """A plain class whose arguments are among its hyper-parameters."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.encoder, self.a, self.b = nn.Linear(5, width), nn.Linear(width, 1), nn.Linear(width, 1)


class TurnedWider(Balanced, Wider):
    def total(self, batch: Tensor) -> Tensor:
        return self.balance(self.losses(batch))


def test_loading_without_a_trainer(tmp_path, said):
    plain = Wider(width=3)
    fit(plain, 1).save_checkpoint(tmp_path / "plain.ckpt")
    model = TurnedWider.load_from_checkpoint(tmp_path / "plain.ckpt", tasks=["a", "b"], balancer="pcgrad")
    assert torch.equal(network(model), network(plain))
    assert "PCGrad starts afresh" in said()
    fit(model, 1).save_checkpoint(tmp_path / "balanced.ckpt")
    again = TurnedWider.load_from_checkpoint(tmp_path / "balanced.ckpt")
    assert again.hparams == model.hparams
    assert torch.equal(network(again), network(model))
    assert int(again.balancer.step) == int(model.balancer.step) == 4
    with pytest.warns(UserWarning, match="of PCGrad, which is left out; Uncertainty starts afresh"):
        other = TurnedWider.load_from_checkpoint(tmp_path / "balanced.ckpt", balancer="uncertainty")
    assert torch.equal(network(other), network(model))


def test_loading_a_bare_state_dict(said):
    plain = new(None)
    model = new("gradnorm")
    model.balancer.task_weights.copy_(torch.tensor([1.5, 0.5]))
    model.load_state_dict(plain.state_dict())
    assert "GradNorm starts afresh" in said()
    assert torch.equal(network(model), network(plain))
    with pytest.warns(UserWarning, match="of another balancer, which is left out; Uncertainty starts afresh"):
        new("uncertainty").load_state_dict(model.state_dict())
    again = new("gradnorm")
    again.load_state_dict(model.state_dict())
    assert again.balancer.task_weights.tolist() == [1.5, 0.5]
    # Within another module too, and only the balancer is made up.
    nn.ModuleDict({"net": new("pcgrad")}).load_state_dict(nn.ModuleDict({"net": plain}).state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"encoder.weight\""):
        model.load_state_dict({k: v for k, v in plain.state_dict().items() if k != "encoder.weight"})


@pytest.mark.parametrize("fault", ["missing", "unknown", "shape"])
def test_a_corrupt_state_of_the_same_balancer_is_an_error(fault, tmp_path):
    _, path = saved("gradnorm", tmp_path)
    checkpoint = torch.load(path, weights_only=True)
    states = checkpoint["state_dict"]
    if fault == "missing":
        del states["balancer.task_weights"]
    elif fault == "unknown":
        states["balancer.more"] = torch.ones(2)
    else:
        states["balancer.task_weights"] = torch.ones(3)
    torch.save(checkpoint, path)
    with pytest.raises(RuntimeError, match=r"balancer\.(task_weights|more)"):
        fit(new("gradnorm"), 3, path)


@pytest.mark.parametrize(
    "balancer", ["moco", {"class_path": "gradvac", "init_args": {"granularity": "tensor"}}], ids=str
)
def test_state_that_grows_is_no_other_balancers(balancer, tmp_path, recwarn):
    old, path = saved(balancer, tmp_path)
    fresh = new(balancer)
    fresh.load_state_dict(old.state_dict())
    for model in (fresh, new(balancer)):
        fit(model, 3, path)
        assert int(model.balancer.step) == 12
    assert not [each for each in recwarn if "afresh" in str(each.message)]


class Swapped(Balanced, Saved):
    def __init__(self) -> None:
        super().__init__(tasks=["b", "a"], balancer="pcgrad")


@pytest.mark.parametrize("key", ["lightning_mtl", "lightning_mtl_tasks"])
def test_a_checkpoint_of_the_tasks_in_another_order_is_refused(key, tmp_path):
    _, path = saved("pcgrad", tmp_path)
    checkpoint = torch.load(path, weights_only=True)
    if key not in checkpoint:  # as before
        checkpoint[key] = checkpoint.pop("lightning_mtl")["tasks"]
        torch.save(checkpoint, path)
    for go in (lambda: fit(Swapped(), 3, path), lambda: Swapped.load_from_checkpoint(path)):
        with pytest.raises(
            ValueError, match=r"Swapped: `tasks` must be those of the checkpoint, \['a', 'b'\], in this order"
        ):
            go()
    model = new("pcgrad")
    fit(model, 3, path)
    assert int(model.balancer.step) == 12


@pytest.mark.parametrize("balancer", ["uncertainty", "pcgrad"])
@pytest.mark.filterwarnings("ignore:.*starts afresh")
def test_a_checkpoint_from_before_goes_on(balancer, tmp_path):
    """It has nothing but the names; its optimizer is laid out as the module's own."""
    old, path = saved(balancer, tmp_path)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["lightning_mtl_tasks"] = checkpoint.pop("lightning_mtl")["tasks"]
    torch.save(checkpoint, path)
    model = new(balancer)
    fit(model, 3, path)
    assert all(torch.equal(model.at_start[name], value) for name, value in moments(old).items())
    plain = to_plain_checkpoint(path)
    assert plain["state_dict"].keys() == new(None).state_dict().keys()
    assert "lightning_mtl_tasks" not in plain


# --- Back to the plain class -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [all_in_one, balancer_apart, balancer_first, two_groups, scheduled("lambda")])
@pytest.mark.parametrize("balancer", ["uncertainty", "pcgrad", "fixed"])
def test_the_plain_class_goes_on_from_a_balanced_one(balancer, build, tmp_path):
    old, path = saved(balancer, tmp_path, build)
    given = torch.load(path, weights_only=True)
    checkpoint = to_plain_checkpoint(path, tmp_path / "plain.ckpt")
    plain = new(None, build)
    fit(plain, 3, tmp_path / "plain.ckpt")
    adam = {name: value for name, value in moments(old).items() if not name.startswith("balancer")}
    assert plain.at_start.keys() == adam.keys()
    assert all(torch.equal(plain.at_start[name], value) for name, value in adam.items())
    # All that a checkpoint of the plain class has, and nothing else.
    twin = new(None, build)
    fit(twin, 2).save_checkpoint(tmp_path / "twin.ckpt")
    expected = torch.load(tmp_path / "twin.ckpt", weights_only=True)
    assert checkpoint.keys() == expected.keys()
    assert checkpoint["callbacks"] == expected["callbacks"]
    assert checkpoint["state_dict"].keys() == expected["state_dict"].keys()
    for part in ("optimizer_states", "lr_schedulers"):
        assert shape_of(checkpoint[part]) == shape_of(expected[part])
    assert shape_of(to_plain_checkpoint(given)) == shape_of(checkpoint)
    assert shape_of(torch.load(path, weights_only=True)) == shape_of(given), "what was given is changed"
    assert shape_of(to_plain_checkpoint(checkpoint)) == shape_of(checkpoint)


def shape_of(value: Any) -> Any:
    """A nested value with its tensors' shapes in place of numbers."""
    if isinstance(value, dict):
        return {key: shape_of(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [shape_of(each) for each in value]
    return list(value.shape) if isinstance(value, Tensor) else type(value).__name__


def test_what_is_no_checkpoint_is_refused():
    with pytest.raises(
        TypeError, match=r"to_plain_checkpoint: `checkpoint` must be a checkpoint .* got int\. Pass the path"
    ):
        to_plain_checkpoint(3)


# --- Averaged weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("balancer", ["pcgrad", "gradnorm", "uncertainty", "moco"])
def test_a_checkpoint_of_averaged_weights_has_the_live_balancer(balancer, tmp_path):
    model = new(balancer)
    go = trainer(max_epochs=2, limit_val_batches=0, callbacks=[averaging()])
    live: list[dict[str, Tensor]] = []
    inner = model.balancer.state_dict

    class Keep(Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            live.append({f"balancer.{name}": value.clone() for name, value in inner().items()})
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    go.callbacks.append(Keep())
    go.fit(model, batches())
    checkpoint = torch.load(tmp_path / "1.ckpt", weights_only=True)
    for name, value in live[1].items():
        assert torch.equal(checkpoint["state_dict"][name].nan_to_num(-7), value.nan_to_num(-7)), name
    assert not torch.equal(
        checkpoint["state_dict"]["encoder.weight"], checkpoint["current_model_state"]["encoder.weight"]
    )
    again = new(balancer)
    go = trainer(max_epochs=3, limit_val_batches=0, callbacks=[averaging()])
    go.fit(again, batches(), ckpt_path=tmp_path / "1.ckpt")
    if "balancer.step" in live[1]:
        assert int(again.balancer.step) == 12
    other = new("fixed")
    with pytest.warns(UserWarning, match="starts afresh"):
        trainer(max_epochs=3, limit_val_batches=0, callbacks=[averaging()]).fit(
            other, batches(), ckpt_path=tmp_path / "1.ckpt"
        )


class OnlyTheEncoder(Step, Balanced, Saved):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k.startswith("encoder")}


def test_what_a_hook_leaves_out_of_a_checkpoint_stays_out(tmp_path):
    model = OnlyTheEncoder(tasks=["a", "b"], balancer="pcgrad")
    fit(model, 1).save_checkpoint(tmp_path / "part.ckpt")
    assert torch.load(tmp_path / "part.ckpt", weights_only=True)["state_dict"].keys() == {
        "encoder.weight",
        "encoder.bias",
    }
