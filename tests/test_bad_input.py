"""Bad input: each case an error in the one form, raised as early as it can be known.

``Who: `arg` must <expected>, got <value>. <Cure>.`` Three tables, by how early: a call (or a constructor) of its own,
the start of a fit before any batch is drawn, and the first batch, before any parameter has moved.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import pytest
import torch
import torch._functorch.config as functorch_config
import torch.nn.functional as F
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchmetrics import MeanSquaredError

import lightning_mtl
from lightning_mtl import Balanced, MultiTaskModule, Task, TaskRegistry
from lightning_mtl.balancers import Fixed, GradNorm, PCGrad, Uncertainty, load
from lightning_mtl.callbacks import BalanceMonitor, ConflictHeatmap
from lightning_mtl.metrics import delta_m
from lightning_mtl.sharing import Constraint, Encoders, OwnFeatures, ProximalStep, mean_prox, penalty_of
from lightning_mtl.tasks import ClassificationTask, CorNet, MultiLabelTask, ReconstructionTask, RegressionTask
from tests.nets import WIDTH, mlp, module, samples, sgd, three_tasks, trainer

# Who (a class or function, a task in brackets), the argument in backticks, what was expected, what came, one sentence.
FORM = re.compile(r"[\w.]+: `[^`\n]+` must [a-z][^\n]*, got [^\n]+\. [A-Z][^\n]*[^.\s]\.")

Case = tuple[str, type[Exception], str, Callable[[], Any]]


def params(*cases: Case) -> list[Any]:
    """Each case: its name, the class of the error, a fragment of its message, and what to do."""
    return [pytest.param(*case[1:], id=case[0]) for case in cases]


def check(error: BaseException, kind: type[Exception], fragment: str) -> None:
    assert type(error) is kind
    assert FORM.fullmatch(str(error)), str(error)
    assert fragment in str(error)


def head(out: int = 1) -> nn.Module:
    return nn.Linear(WIDTH, out)


def size_task(**options: Any) -> RegressionTask:
    return RegressionTask(head(), **options)


X, TARGETS = samples(8)
SIZE = TARGETS["size"]


def multi(tasks: Any, balancer: Any = "pcgrad", encoder: nn.Module | None = None, **options: Any) -> MultiTaskModule:
    return MultiTaskModule(encoder or mlp(), tasks, balancer, **({"optimizer": sgd} | options))


class Written(Balanced, L.LightningModule):
    """An existing module that turned to ``Balanced``: ``step(module, x)`` says what it hands to ``balance``."""

    def __init__(self, step: Callable[..., Any] | None = None, balancer: Any = "pcgrad", **options: Any) -> None:
        super().__init__(**({"tasks": ["a", "b"], "balancer": balancer} | options))
        self.encoder, self.a, self.b = mlp(), head(), head()
        self.step = step

    def losses(self, z: Tensor) -> dict[str, Any]:
        return {"a": self.a(z).square().mean(), "b": (self.b(z) - 3).square().mean()}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.step(self, batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return sgd([*self.encoder.parameters(), *self.a.parameters(), *self.b.parameters()])


# --- 1. Known at once ------------------------------------------------------------------------------------------------


class DeepSpeedStrategy(SingleDeviceStrategy):
    """Stands in for Lightning's, which needs the package deepspeed: it is recognised by its name."""


class FSDPStrategy(SingleDeviceStrategy):
    """Stands in for Lightning's, which needs a GPU: it is recognised by its name."""


def set_up(model: L.LightningModule, **options: Any) -> None:
    """What ``fit`` does first, for strategies that would need several processes to go on."""
    model.trainer = run = trainer(devices=1, **options)
    for callback in model.configure_callbacks():
        callback.setup(run, model, "fit")
    model.setup("fit")


def changed(change: Callable[[TaskRegistry], Any]) -> None:
    model = module("pcgrad")
    change(model.tasks)
    set_up(model)


def backward(losses: Any = None, balancer: Any = None, **options: Any) -> None:
    """``lightning_mtl.backward`` on two losses of one encoder, with its features unless told otherwise."""
    encoder, a, b = mlp(), head(), head()
    z = encoder(X)
    made = {"a": a(z).square().mean(), "b": b(z).square().mean()} if losses is None else losses(z, a, b)
    lightning_mtl.backward(made, balancer or PCGrad(2), **({"features": z} | options))


def second_backward() -> None:
    loss = module("pcgrad").training_step((X, TARGETS), 0)
    loss.backward(retain_graph=True)
    loss.backward()


def compiled_too_early() -> None:
    with functorch_config.patch(donated_buffer=True):
        encoder, a, b = torch.compile(nn.Linear(8, WIDTH), backend="aot_eager"), head(), head()
        z = encoder(X)
        lightning_mtl.backward({"a": a(z).sum(), "b": b(z).sum()}, PCGrad(2), features=z)


def twins(make: Callable[[], nn.Module] = head) -> list[nn.Module]:
    """Two encoders of one architecture."""
    return [make(), make()]


AT_ONCE = params(
    # Names and registries.
    ("no task", ValueError, "`tasks` must hold at least one task", lambda: multi({})),
    ("tasks as a list", TypeError, "`tasks` must be a mapping", lambda: multi([size_task()])),
    ("head instead of a task", TypeError, "`tasks['a']` must be a Task, got Linear", lambda: multi({"a": head()})),
    ("empty name", ValueError, "got ''", lambda: multi({"": size_task()})),
    ("name that the logs have", ValueError, "got 'loss'", lambda: multi({"loss": size_task()})),
    ("name below it", ValueError, "got 'loss/a'", lambda: multi({"loss/a": size_task()})),
    ("name with Lightning's suffix", ValueError, "without 'dataloader_idx_', got 'dataloader_idx_0'",
     lambda: multi({"dataloader_idx_0": size_task()})),
    ("metrics with one key", ValueError, "got 'a/b', of which 'a/b/c' is also a metric of 'a'", lambda: multi(
        {"a": size_task(metrics={"b/c": MeanSquaredError()}), "a/b": size_task(metrics={"c": MeanSquaredError()})})),
    ("name that is no string", ValueError, "got 3", lambda: multi({3: size_task()})),
    ("name twice", ValueError, "(known: 'a')", lambda: TaskRegistry({"a": size_task()}).add("a", size_task())),
    ("one head twice", ValueError, "have a head of its own", lambda: (h := head()) and multi(
        {"a": RegressionTask(h), "b": RegressionTask(h)})),
    ("one task twice", ValueError, "have a head of its own", lambda: (t := size_task()) and multi({"a": t, "b": t})),
    ("one task without parameters twice", ValueError, "have a head of its own",
     lambda: (t := Task(nn.Identity(), F.mse_loss)) and multi({"a": t, "b": t})),
    ("parameter in two heads", ValueError, "have a head of its own", lambda: (h := head()) and multi(
        {"a": RegressionTask(h), "b": RegressionTask(nn.Sequential(nn.Tanh(), h))})),
    ("unknown task", ValueError, "`name` must be one of 'kind', 'size', 'shape', got 'depth'",
     lambda: TaskRegistry(three_tasks())["depth"]),
    ("removal of an unknown task", ValueError, "got 'depth'", lambda: TaskRegistry(three_tasks()).remove("depth")),
    ("freezing of an unknown task", ValueError, "got 'depth'", lambda: TaskRegistry(three_tasks()).freeze("depth")),
    ("task added later", ValueError, "for which the balancer was built",
     lambda: changed(lambda tasks: tasks.add("more", size_task()))),
    ("task removed later", ValueError, "for which the balancer was built",
     lambda: changed(lambda tasks: tasks.remove("size"))),
    ("names of Balanced", ValueError, "`tasks` must be distinct", lambda: Written(tasks=["a", "a"])),
    ("empty name of Balanced", ValueError, "got ['', 'c']", lambda: Written(tasks=["", "c"])),
    ("string as the names of Balanced", ValueError, "got 'ab'", lambda: Written(tasks="ab")),
    ("no name of Balanced", ValueError, "got []", lambda: Written(tasks=[])),
    ("no names of Balanced", ValueError, "got None", lambda: Written(tasks=None)),
    # Tasks.
    ("head that is a function", TypeError, "`head` must be an nn.Module", lambda: Task(torch.relu, F.mse_loss)),
    ("loss that is a name", TypeError, "`loss` must be callable", lambda: Task(head(), "mse")),
    ("unknown loss", ValueError, "`loss` must be one of 'mse', 'l1', 'smooth_l1', got 'mae'",
     lambda: size_task(loss="mae")),
    ("unknown missing", ValueError, '`missing` must be None, "nan" or an integer, got \'none\'',
     lambda: Task(head(), F.mse_loss, missing="none")),
    ("metric that is none", TypeError, "`metrics['mae']` must be a torchmetrics metric, got function",
     lambda: size_task(metrics={"mae": F.l1_loss})),
    ("metrics as a list", TypeError, "`metrics` must be a mapping", lambda: size_task(metrics=["mae"])),
    ("metric without a name", ValueError, "`metrics` must have non-empty strings as names", lambda: size_task(
        metrics={"": MeanSquaredError()})),
    ("one class", ValueError, "`num_classes` must be an integer >= 2, got 1", lambda: ClassificationTask(head(), 1)),
    ("no label", ValueError, "`num_labels` must be", lambda: MultiLabelTask(head(), 0)),
    ("labels as one string", ValueError, "got 'abc'", lambda: MultiLabelTask(head(3), "abc")),
    ("labels of another number than the head's", ValueError, "`head` must have as many labels as the task, 3, got 4",
     lambda: MultiLabelTask(CorNet(head(4), 4), 3)),
    ("label twice", ValueError, "got ['a', 'a']", lambda: MultiLabelTask(head(2), ["a", "a"])),
    ("unknown reduction", ValueError, "`reduction` must be one of 'sum', 'mean'",
     lambda: ReconstructionTask(head(8), reduction="max")),
    # Balancers.
    ("unknown balancer", ValueError, "perhaps 'pcgrad' was meant", lambda: module("pcgrads")),
    ("unknown class path", ValueError, "got 'no.such.Balancer'", lambda: module("no.such.Balancer")),
    ("class path of another class", ValueError, "got 'torch.nn.Linear'", lambda: module("torch.nn.Linear")),
    ("unknown key beside class_path", ValueError, "`balancer` must have the keys class_path and init_args",
     lambda: module({"class_path": "pcgrad", "options": {}})),
    ("number as balancer", TypeError, "`balancer` must be a name", lambda: module(3)),
    ("module as balancer", TypeError, "got Linear", lambda: module(nn.Linear(2, 2))),
    ("optimizer class as balancer", TypeError, "`balancer` must be a name", lambda: module(torch.optim.Adam)),
    ("callable that makes no balancer", TypeError, "got NoneType", lambda: module(lambda num_tasks: None)),
    ("name that is a number", ValueError, "got 5", lambda: load(5, num_tasks=2)),
    ("unknown option", ValueError, "`alpha` must be one of its options ('seed', 'every_n_steps')",
     lambda: load("pcgrad", num_tasks=2, alpha=1.0)),
    ("init_args as a list", TypeError, "`init_args` must be a mapping",
     lambda: module({"class_path": "pcgrad", "init_args": ["seed"]})),
    ("num_tasks in init_args", ValueError, "leave out num_tasks",
     lambda: module({"class_path": "pcgrad", "init_args": {"num_tasks": 2}})),
    ("no task to balance", ValueError, "`num_tasks` must be an integer >= 1, got 0", lambda: PCGrad(0)),
    ("wrong number of tasks", ValueError, "Build it with num_tasks=3", lambda: module(PCGrad(2))),
    ("weights of an unknown task", ValueError, "`weights` must name tasks among 'kind', 'size', 'shape', got 'sizes'",
     lambda: module(Fixed(3, weights={"sizes": 2.0}))),
    ("wrong number of weights", ValueError, "one entry per task (3), got 2 entries", lambda: Fixed(3, weights=[1, 2])),
    ("weight that is NaN", ValueError, "`weights` must be finite", lambda: Fixed(2, weights=[1.0, float("nan")])),
    ("weight that is a word", ValueError, "`weights` must hold one number per task, got 'much'",
     lambda: Fixed(2, weights=["much", 1.0])),
    ("weights by name without names", ValueError, "Call bind(names) first",
     lambda: Fixed(2, weights={"a": 1.0})(torch.ones(2))),
    ("unknown form of uncertainty", ValueError, "got 'poisson'", lambda: module(Uncertainty(3, forms="poisson"))),
    ("start of uncertainty that is NaN", ValueError, "`initial_log_variance` must be a finite number, got nan",
     lambda: Uncertainty(2, initial_log_variance=float("nan"))),
    ("negative alpha", ValueError, "`alpha` must be a finite number >= 0, got -1", lambda: GradNorm(2, alpha=-1)),
    ("learning rate of 0", ValueError, "`lr` must be a finite number > 0, got 0", lambda: GradNorm(2, lr=0)),
    ("unknown norms_at", ValueError, "`norms_at` must be one of 'last_layer', 'shared'",
     lambda: GradNorm(2, norms_at="features")),
    ("initial loss below the offset", ValueError, "`initial_losses` must lie above the offset",
     lambda: GradNorm(2, initial_losses=[0.0, 1.0])),
    ("every 0 steps", ValueError, "`every_n_steps` must be an integer >= 1, got 0", lambda: PCGrad(2, every_n_steps=0)),
    ("every 1.5 steps", ValueError, "`every_n_steps` must be an integer >= 1, got 1.5",
     lambda: GradNorm(2, every_n_steps=1.5)),
    ("seed that is a word", ValueError, "`seed` must be an integer >= 0", lambda: PCGrad(2, seed="x")),
    ("gram of the rows", ValueError, "`gram` must have shape [T, T] = [2, 2], got [2, 5]",
     lambda: PCGrad(2)(torch.ones(2, 5), torch.ones(2))),
    ("losses of three tasks for two", ValueError, "`losses` must have shape [T] = [2], got [3]",
     lambda: PCGrad(2)(torch.eye(2), torch.ones(3))),
    ("rows that are flat", ValueError, "`rows` must have shape [T, N] with T = 2, got [2]",
     lambda: PCGrad(2).combine(torch.ones(2), torch.ones(2))),
    ("presence as numbers", ValueError, "`present` must be a bool tensor",
     lambda: PCGrad(2)(torch.eye(2), torch.ones(2), torch.ones(2))),
    ("negative loss of GradNorm", ValueError, "`losses` must be >= 0 after the offset",
     lambda: GradNorm(2)(torch.eye(2), torch.tensor([1.0, -1.0]))),
    # The module.
    ("encoder that is a function", TypeError, "`encoder` must be an nn.Module",
     lambda: MultiTaskModule(torch.relu, three_tasks())),
    ("unknown level", ValueError, "`level` must be one of 'parameters', 'features', got 'logits'",
     lambda: module(level="logits")),
    ("optimizer that is built", TypeError, "`optimizer` must be callable, got SGD",
     lambda: module(optimizer=sgd(mlp().parameters()))),
    ("unknown lr_interval", ValueError, "`lr_interval` must be one of", lambda: module(lr_interval="batch")),
    ("last layer of an unknown name", ValueError, "`last_layer` must be a module inside the encoder, got '7'",
     lambda: module("gradnorm", last_layer="7")),
    ("last layer outside the encoder", ValueError, "`last_layer` must be a module inside the encoder",
     lambda: module("gradnorm", last_layer=nn.Linear(2, 2))),
    ("last layer that is a number", TypeError, "`last_layer` must be a module, got 3",
     lambda: Written(last_layer=3)),
    # Trainer and strategy.
    ("FSDP with a gradient balancer", ValueError, "be a loss balancer where parameters are sharded",
     lambda: set_up(module("pcgrad"), strategy=FSDPStrategy("cpu"))),
    ("model parallel with a gradient balancer", ValueError, "under ModelParallelStrategy",
     lambda: set_up(module("pcgrad"), strategy=ModelParallelStrategy(1, 1, process_group_backend="gloo"))),
    ("static graph with accumulation", ValueError, "DDPStrategy(static_graph=True)",
     lambda: set_up(module(), strategy=DDPStrategy(static_graph=True), accumulate_grad_batches=2)),
    ("static graph with accumulation from a callback", ValueError, "DDPStrategy(static_graph=True)",
     lambda: set_up(module(), strategy=DDPStrategy(static_graph=True),
                    callbacks=[GradientAccumulationScheduler({4: 2})])),
    # Callbacks and metrics.
    ("monitor every 0 steps", ValueError, "`every_n_steps` must be an integer >= 1", lambda: BalanceMonitor(0)),
    ("heatmap every 0 epochs", ValueError, "`every_n_epochs` must be an integer >= 1", lambda: ConflictHeatmap(0)),
    ("delta m of other metrics", ValueError, "`base` must", lambda: delta_m({"a": 1.0}, {"b": 1.0}, {"a": True})),
    ("delta m with a number as auxiliary", TypeError, "`auxiliary` must be a collection of some, and not all, of 'a'",
     lambda: delta_m({"a": 1.0}, {"a": 1.0}, {"a": True}, auxiliary=3)),
    ("delta m without auxiliary", TypeError, "got None",
     lambda: delta_m({"a": 1.0}, {"a": 1.0}, {"a": True}, auxiliary=None)),
    # Soft sharing.
    ("encoders in a list", TypeError, "`encoders` must be a mapping of task names to encoders, got list",
     lambda: Encoders(twins())),
    ("encoder that is a number", TypeError, "`encoders['a']` must be an nn.Module, got int",
     lambda: Encoders({"a": 3})),
    ("encoder's name with a dot", ValueError, "`encoders` must have names without a dot that are no attribute",
     lambda: Encoders({"a.b": head()})),
    ("encoder's name that a module has", ValueError, "got 'items'", lambda: Encoders({"items": head()})),
    ("encoders in a list, one a number", TypeError, "`encoders` must hold modules, got int",
     lambda: penalty_of([head(), 3])),
    ("head behind encoders that is a number", TypeError, "`head` must be an nn.Module, got int",
     lambda: OwnFeatures("a", 3)),
    ("head behind encoders without a name", TypeError, "`name` must be a string, got None",
     lambda: OwnFeatures(None, head())),
    ("penalty of a single encoder", ValueError, "`encoders` must be two or more", lambda: penalty_of([head()])),
    ("penalty of no parameter by name", ValueError, "`names` must hold the name of one parameter at least, got []",
     lambda: penalty_of(twins(), names=[])),
    ("penalty of encoders without parameters", ValueError, "`encoders` must have a parameter",
     lambda: penalty_of(twins(nn.Identity))),
    ("penalty of inputs where there are none", ValueError, "`encoders` must have a weight of two dimensions or more",
     lambda: penalty_of(twins(lambda: nn.LayerNorm(2)), "joint_features")),
    ("constrained parameters as one string", TypeError, "`names` must be None or a list of names, got 'weight'",
     lambda: ProximalStep(names="weight")),
    ("proximal step on no parameter", ValueError, "`names` must hold the name of one parameter at least, got []",
     lambda: ProximalStep(names=[])),
    ("encoders themselves instead of their name", TypeError, "`encoders` must be the name of a part of the module",
     lambda: ProximalStep(encoders=nn.ModuleList(twins()))),
    ("constraint in a list", ValueError, "`constraint` must be one of 'mean'", lambda: ProximalStep(["mean"])),
    ("constraint of numbers", TypeError, "`penalty` must be callable, got 1", lambda: Constraint(1, 2)),
    ("constraint without a step", TypeError, "`prox` must be callable, got None",
     lambda: Constraint(torch.linalg.norm, None)),
    ("negative step in a tensor", ValueError, "`step` must be a finite number >= 0, got -0.5",
     lambda: mean_prox(torch.ones(2, 2), torch.tensor(-0.5))),
    # The engine called by hand.
    ("backward with a balancer's name", TypeError, "`balancer` must be a Balancer, got 'pcgrad'",
     lambda: backward(balancer="pcgrad")),
    ("backward with one loss too many", ValueError, "`losses` must hold 2 tasks in this order",
     lambda: backward(lambda z, a, b: {name: a(z).sum() for name in "abc"})),
    ("backward of a loss per sample", ValueError, "`losses['a']` must be a scalar (shape []), got [8, 1]",
     lambda: backward(lambda z, a, b: {"a": a(z), "b": b(z).sum()})),
    ("backward with detached features", ValueError, "`features` must require grad", lambda: backward(features=X)),
    ("backward at level features without them", ValueError, "Pass features=",
     lambda: backward(features=None, level="features")),
    ("backward with shared beside the features", ValueError, "`shared` must be parameters that are trained here",
     lambda: backward(shared=[nn.Parameter(torch.ones(1))])),
    ("backward at an unknown level", ValueError, "`level` must be one of", lambda: backward(level="rows")),
    ("backward through what was compiled before", ValueError, "allow_several_backwards()", compiled_too_early),
    ("backward of outputs of one node", ValueError, "or shared=, the shared parameters",
     lambda: backward(lambda z, a, b: dict(zip("ab", torch.stack([a(z).sum(), b(z).sum()]).unbind(), strict=True)),
                      features=None)),
    *((f"backward with {what} for a count", ValueError, "`labelled['a']` must be a number of labels",
       lambda count=count: backward(labelled={"a": count, "b": 8}))
      for what, count in {"the mean of a mask": torch.tensor(0.75), "NaN": float("nan"), "-1": -1, "True": True,
                          "a name": "8", "several counts": torch.tensor([3, 4]),
                          "a negative weight": torch.tensor([1.0, -1.0])}.items()),
    ("second backward", RuntimeError, "`loss` must go backward once", second_backward),
)  # fmt: skip


@pytest.mark.parametrize("kind, fragment, do", AT_ONCE)
def test_raised_at_once(kind, fragment, do):
    with pytest.raises(kind) as caught:
        do()
    check(caught.value, kind, fragment)


# --- 2. Known when the fit starts ------------------------------------------------------------------------------------


def behind_encoders(*names: str, task: str = "a") -> tuple[MultiTaskModule, Any]:
    """One task, whose head reads the encoder of the name ``task``."""
    encoders = Encoders({name: mlp() for name in names})
    return multi({"a": RegressionTask(OwnFeatures(task, head()))}, encoder=encoders), (X, {"a": SIZE})


class Forgetful(MultiTaskModule):
    """Overrides ``configure_optimizers`` and leaves the balancer out, as a user might."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([*self.encoder.parameters(), *self.tasks.parameters()])


AT_FIT_START = params(
    ("DeepSpeed", ValueError, "got DeepSpeed", lambda: (module(), {"strategy": DeepSpeedStrategy("cpu")})),
    ("DeepSpeed for Balanced", ValueError, "got DeepSpeed", lambda: (
        Written(), {"strategy": DeepSpeedStrategy("cpu")})),
    ("FSDP with a gradient balancer", ValueError, "under FSDPStrategy", lambda: (
        module("gradnorm", level="features"), {"strategy": FSDPStrategy("cpu")})),
    ("balancer in no parameter group", ValueError, 'Add {"params": self.balancer.parameters()', lambda: (
        Forgetful(mlp(), three_tasks(), "uncertainty"), {})),
    ("balancer of Balanced in no parameter group", ValueError, "none for 'log_variance' of Uncertainty", lambda: (
        Written(balancer="uncertainty"), {})),
    ("proximal step where there are no encoders", ValueError, "`encoders` must be an Encoders, a ModuleDict or a list",
     lambda: (multi({"a": size_task()}, encoder=nn.Linear(8, WIDTH)), {"callbacks": [ProximalStep()]})),
    ("proximal step on a single encoder", ValueError, "ProximalStep: `encoders` must be two or more",
     lambda: (behind_encoders("a")[0], {"callbacks": [ProximalStep()]})),
)  # fmt: skip


def no_batches() -> Iterator[Any]:
    raise AssertionError("a batch was drawn")
    yield


class Loader:
    """Made of an iterator maker; Lightning would take a list for several loaders."""

    def __init__(self, batches: Callable[[], Iterator[Any]]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return 2

    def __iter__(self) -> Iterator[Any]:
        return self.batches()


@pytest.mark.parametrize("kind, fragment, make", AT_FIT_START)
def test_raised_before_a_batch_is_drawn(kind, fragment, make):
    model, options = make()
    validation = Loader(no_batches) if isinstance(model, MultiTaskModule) else None
    with pytest.raises(kind) as caught:
        trainer(**options).fit(model, Loader(no_batches), validation)
    check(caught.value, kind, fragment)


def test_a_loader_is_asked_if_nothing_is_wrong():
    with pytest.raises(AssertionError, match="a batch was drawn"):
        trainer().fit(module(), Loader(no_batches))


# --- 3. Known at the first batch -------------------------------------------------------------------------------------


class Apart(nn.Module):
    """Applies ``change`` to the output of a linear layer."""

    def __init__(self, change: Callable[[Tensor], Any], inputs: int = WIDTH, out: int = 1) -> None:
        super().__init__()
        self.linear, self.change = nn.Linear(inputs, out), change

    def forward(self, x: Tensor) -> Any:
        return self.change(self.linear(x))


class Checkpointed(nn.Module):
    """The reentrant checkpoint hides the parameters behind it from whoever walks the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.second, self.first(x), use_reentrant=True)


def one(task: Task, target: Any = SIZE, **options: Any) -> tuple[MultiTaskModule, Any]:
    """A module with this task beside a sound one, and a batch for both."""
    tasks = {"a": task, "size": size_task()}
    return multi(tasks, **options), (X, {"a": target, "size": SIZE})


def masked(mask: Any, **options: Any) -> tuple[MultiTaskModule, Any]:
    return multi({"a": size_task(mask="m", **options)}), (X, {"a": SIZE, "m": mask})


def whole(batch: Any, **options: Any) -> tuple[MultiTaskModule, Any]:
    return multi(three_tasks(), **options), batch


def written(step: Callable[..., Any], **options: Any) -> tuple[Written, Any]:
    return Written(step, **options), (X, TARGETS)


def compiled(step: Callable[..., Any], **options: Any) -> tuple[Any, Any]:
    model, batch = written(step, **options)
    return torch.compile(model, backend="aot_eager"), batch


def with_losses(change: Callable[[dict[str, Any]], Any]) -> Callable[[Written, Tensor], Any]:
    return lambda self, x: self.balance(change(self.losses(self.encoder(x))))


def early(self: Written, x: Tensor) -> Tensor:
    hidden = self.encoder[1](self.encoder[0](x))
    z = self.encoder[2](hidden)
    return self.balance({"a": self.a(z + hidden[:, :WIDTH]).mean(), "b": self.b(z).mean()}, features=z)


AT_FIRST_BATCH = params(
    # The batch.
    ("batch that is a tensor", TypeError, "`batch` must be (input, {task: target})", lambda: whole(X)),
    ("batch of three", TypeError, "got tuple of Tensor, Tensor, Tensor", lambda: whole((X, SIZE, SIZE))),
    ("targets in a tuple", TypeError, "got tuple of Tensor, tuple", lambda: whole((X, (SIZE, SIZE, SIZE)))),
    ("unknown task in the targets", ValueError, "`batch targets` must belong to the tasks 'kind', 'size', 'shape', "
     "got 'depth'", lambda: whole((X, TARGETS | {"depth": SIZE}))),
    ("missing target", ValueError, "must stand in the batch under the key 'shape', got 'kind', 'size'",
     lambda: whole((X, {name: TARGETS[name] for name in ("kind", "size")}))),
    ("missing target in a flat batch", ValueError, "must stand in the batch under the key 'shape'",
     lambda: whole({"input": X, "kind": TARGETS["kind"], "size": SIZE})),
    ("missing input in a flat batch", ValueError, "`batch` must hold the input under 'image'",
     lambda: whole({"input": X} | TARGETS, input_key="image")),
    ("missing mask", ValueError, "`mask of 'a'` must stand in the batch under the key 'm'",
     lambda: (multi({"a": size_task(mask="m")}), (X, {"a": SIZE}))),
    ("unknown task in own loaders", ValueError, "got 'kind', 'depth'",
     lambda: whole({"kind": (X, TARGETS["kind"]), "depth": (X, SIZE)})),
    ("level features with a loader per task", ValueError, "one loader per task",
     lambda: whole({name: (X, target) for name, target in TARGETS.items()}, level="features")),
    # Shapes and dtypes.
    ("target of another shape", ValueError, "`target of 'a'` must have the shape of the output, [8, 1], got [8, 2]",
     lambda: one(size_task(), TARGETS["shape"])),
    ("output [B, 2] against [B]", ValueError, "never broadcast", lambda: one(RegressionTask(head(2)))),
    ("output [B] against [B, 1]", ValueError, "never broadcast",
     lambda: one(RegressionTask(Apart(lambda z: z.squeeze(1))), SIZE[:, None])),
    ("target of one sample", ValueError, "got [1]", lambda: one(size_task(), SIZE[:1])),
    ("a plain loss that would broadcast", ValueError, "never broadcast",
     lambda: one(Task(head(2), F.mse_loss), SIZE[:, None])),
    ("a loss module that would broadcast", ValueError, "never broadcast",
     lambda: one(Task(head(2), nn.L1Loss()), SIZE[:, None])),
    ("a loss of one's own that broadcasts", ValueError, "at most one entry per entry of the target, [8], got [8, 8]",
     lambda: one(Task(head(), lambda output, target: (output - target).abs(), missing="nan"))),
    ("integer target of a regression", TypeError, "`target of 'a'` must be a floating-point tensor, got torch.int64",
     lambda: one(size_task(), TARGETS["kind"])),
    ("float target of a classification", TypeError, "`target of 'a'` must hold integer class numbers, got torch.float",
     lambda: one(ClassificationTask(head(3), 3))),
    ("wrong number of classes", ValueError, "`output of 'a'` must have shape [B, C, ...] with C = 4, got [8, 3]",
     lambda: one(ClassificationTask(head(3), 4), TARGETS["kind"])),
    ("classes numbered from 1", ValueError, "hold class numbers from 0 to 2, or -100 where there is no label, got [3]",
     lambda: one(ClassificationTask(head(3), 3), TARGETS["kind"] + 1)),
    ("classes numbered from 1, smoothed", ValueError, "got [3]",
     lambda: one(ClassificationTask(head(3), 3, label_smoothing=0.1), TARGETS["kind"] + 1)),
    ("classes numbered from 1, in pixels", ValueError, "got [3]",
     lambda: one(ClassificationTask(Apart(lambda z: z[:, :, None].expand(8, 3, 4), out=3), 3),
                 TARGETS["kind"][:, None].expand(8, 4) + 1)),
    ("another mark of a gap", ValueError, "got [-1]",
     lambda: one(ClassificationTask(head(3), 3), TARGETS["kind"].where(SIZE > 0, -1))),
    ("yes and no as 1 and -1", ValueError, "`target of 'a'` must lie in [0, 1]",
     lambda: one(MultiLabelTask(head(2), 2), TARGETS["shape"].sign())),
    ("one-hot classes", ValueError, "`target of 'a'` must have shape [8], got [8, 3]",
     lambda: one(ClassificationTask(head(3), 3), F.one_hot(TARGETS["kind"], 3))),
    ("wrong number of labels", ValueError, "`output of 'a'` must have shape [B, K] with K = 3, got [8, 2]",
     lambda: one(MultiLabelTask(head(2), 3), torch.ones(8, 3))),
    ("target of one label for three", ValueError, "`target of 'a'` must have the shape of the output, [8, 3]",
     lambda: one(MultiLabelTask(head(3), 3), torch.ones(8, 2))),
    ("targets of five labels for tasks of three", ValueError, "with K = 3, got [8, 5]",
     lambda: (multi(MultiLabelTask(head(3), 3).per_label("y")), (X, {"y": torch.ones(8, 5)}))),
    ("reconstruction of another size", ValueError, "[8, 7], got [8, 8]", lambda: one(ReconstructionTask(head(7)))),
    ("target that is a list", TypeError, "`target of 'a'` must be a tensor, got list",
     lambda: one(MultiLabelTask(head(), 1), [1.0] * 8)),
    ("output that is a tuple", TypeError, "`output of 'a'` must be a tensor, got tuple",
     lambda: one(RegressionTask(Apart(lambda z: (z, z))))),
    # Masks and missing labels.
    ("mask of one sample", ValueError, "`mask of 'a'` must have the leading dimensions", lambda: masked(
        torch.ones(1, dtype=torch.bool))),
    ("mask with a dimension too many", ValueError, "got [8, 1]", lambda: masked(torch.ones(8, 1, dtype=torch.bool))),
    ("mask of a shorter batch", ValueError, "got [4]", lambda: masked(torch.ones(4, dtype=torch.bool))),
    ("mask of numbers", TypeError, "`mask of 'a'` must be a bool tensor, got torch.float32",
     lambda: masked(torch.ones(8))),
    ("mask that is a list", TypeError, "`mask of 'a'` must be a tensor, got list", lambda: masked([True] * 8)),
    ("missing labels with a mean as loss", ValueError, 'Use reduction="none"',
     lambda: one(Task(head(), F.mse_loss, missing="nan"))),
    # Losses.
    ("loss that is nothing", TypeError, "`loss of 'a'` must be a number or a floating-point tensor, got NoneType",
     lambda: one(Task(head(), lambda output, target: None))),
    ("loss that counts", TypeError, "`loss of 'a'` must be a number or a floating-point tensor, got torch.int64",
     lambda: one(Task(head(), lambda output, target: (output > 0).sum()))),
    ("negative loss for ratios", ValueError, "Pass loss_offset=", lambda: one(
        Task(head(), lambda output, target: output.mean() - 99), balancer="gradnorm")),
    # Features.
    ("encoder that detaches", ValueError, "`encoder` must return features that require grad",
     lambda: whole((X, TARGETS), encoder=Apart(lambda z: z.detach(), 8, WIDTH))),
    ("encoder that detaches, fixed weights", ValueError, "`encoder` must return features that require grad",
     lambda: whole((X, TARGETS), encoder=Apart(lambda z: z.detach(), 8, WIDTH), balancer="fixed")),
    ("reentrant checkpoint", ValueError, "use_reentrant=False",
     lambda: whole((X, TARGETS), encoder=Checkpointed())),
    ("reentrant checkpoint before the last layer", ValueError, "use_reentrant=False",
     lambda: whole((X, TARGETS), encoder=Checkpointed(), balancer="gradnorm")),
    ("head behind an ordinary encoder", TypeError, "`features` must be a mapping of task names to features, got Tensor",
     lambda: one(RegressionTask(OwnFeatures("a", head())))),
    ("head behind an encoder that is not there", ValueError, "`name` must be one of 'a', 'b', got 'z'",
     lambda: behind_encoders("a", "b", task="z")),
    ("head with another number of labels inside", ValueError, "with K = 3, got [8, 4]",
     lambda: one(MultiLabelTask(nn.Sequential(CorNet(head(4), 4)), 3), torch.ones(8, 3))),
    # Balanced.
    ("loss of an unknown task", ValueError, "`losses` must hold exactly the tasks 'a', 'b', got 'a', 'c'",
     lambda: written(with_losses(lambda losses: {"a": losses["a"], "c": losses["b"]}))),
    ("task left out", ValueError, "Pass None for a task without labels",
     lambda: written(with_losses(lambda losses: {"a": losses["a"]}))),
    ("losses as a list", ValueError, "got list", lambda: written(with_losses(lambda losses: list(losses.values())))),
    ("no loss at all", ValueError, "hold a loss of at least one task",
     lambda: written(with_losses(lambda losses: dict.fromkeys(losses)))),
    ("loss per sample", ValueError, "`losses['a']` must be a scalar (shape []), got [2]",
     lambda: written(with_losses(lambda losses: losses | {"a": losses["a"].expand(2)}))),
    ("count of an unknown task", ValueError, "`labelled` must hold tasks among 'a', 'b', got 'c'",
     lambda: written(lambda self, x: self.balance(self.losses(self.encoder(x)), labelled={"c": 3}))),
    ("features that are detached, heads too", ValueError, "`features` must require grad",
     lambda: written(lambda self, x: (z := self.encoder(x).detach()) is not None and self.balance(
         self.losses(z), features=z))),
    ("features that are detached, heads not", ValueError, "`features` must require grad",
     lambda: written(lambda self, x: (z := self.encoder(x)) is not None and self.balance(
         self.losses(z), features=z.detach()))),
    ("features that the heads pass by", ValueError, "`features` must hold everything that the heads read",
     lambda: written(early)),
    ("level features without features", ValueError, "Pass features=",
     lambda: written(with_losses(lambda losses: losses), level="features")),
    ("last layer that is not shared", ValueError, "`last_layer` must be a part of what the tasks share",
     lambda: written(with_losses(lambda losses: losses), balancer="gradnorm", last_layer=nn.Linear(2, 2))),
    ("reentrant checkpoint in a module of one's own", ValueError, "use_reentrant=False",
     lambda: written(lambda self, x: self.balance(
         self.losses(checkpoint(self.encoder[2], self.encoder[0](x), use_reentrant=True))))),
    ("compiled as a whole without a boundary", ValueError, "lightning_mtl.boundary(encoder(x))",
     lambda: compiled(lambda self, x: self.balance(self.losses(self.encoder(x))))),
)  # fmt: skip


@pytest.mark.parametrize("kind, fragment, make", AT_FIRST_BATCH)
def test_raised_at_the_first_batch_before_anything_moves(kind, fragment, make):
    model, batch = make()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    runner = trainer(max_steps=2)
    with pytest.raises(kind) as caught:
        runner.fit(model, Loader(lambda: iter([batch, batch])))
    check(caught.value, kind, fragment)
    assert runner.global_step == 0
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


# --- What looks alike and is sound -----------------------------------------------------------------------------------

# GradNorm's weights are 1 in its first step: its gradients must be those of the plain sum.
EVEN = {"class_path": "gradnorm", "init_args": {"norms_at": "shared"}}


def frozen(model: Written) -> Written:
    model.encoder.requires_grad_(False)
    return model


def given(features: Callable[[Tensor], Any], **options: Any) -> Callable[..., Any]:
    """Balanced, with the features put like this."""

    def step(self: Written, x: Tensor) -> Tensor:
        z = self.encoder(x)
        return self.balance(self.losses(z), features=features(z))

    return lambda balancer: written(step, balancer=balancer, **options)


def skipping(self: Written, x: Tensor) -> Tensor:
    """A skip connection past the features: without them the way is found."""
    hidden = self.encoder[1](self.encoder[0](x))
    z = self.encoder[2](hidden)
    return self.balance({"a": self.a(z + hidden[:, :WIDTH]).square().mean(), "b": self.b(z).square().mean()})


def some_labels(self: Written, x: Tensor) -> Tensor:
    return self.balance(self.losses(self.encoder(x)) | {"b": None})


class Tied(nn.Module):
    """Gives the input back through the weights that made the features."""

    def __init__(self, encoder: nn.Linear) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, z: Tensor) -> Tensor:
        return z @ self.encoder.weight


def tied(balancer: Any, **options: Any) -> tuple[MultiTaskModule, Any]:
    encoder = nn.Linear(8, WIDTH)
    tasks = {"size": size_task(), "back": ReconstructionTask(Tied(encoder))}
    return multi(tasks, balancer, encoder, **options), (X, {"size": SIZE})


SOUND = {
    "features twice": given(lambda z: (z, z)),
    "features twice at level features": given(lambda z: {"a": z, "b": [z]}, level="features"),
    "features with others that carry no gradient": given(lambda z: (z, X)),
    "a checkpoint that is not reentrant": lambda balancer: written(
        lambda self, x: self.balance(self.losses(checkpoint(self.encoder, x, use_reentrant=False))), balancer=balancer
    ),
    "a reentrant checkpoint at level features": lambda balancer: whole(
        (X, TARGETS), balancer=balancer, encoder=Checkpointed(), level="features"
    ),
    "a frozen encoder": lambda balancer: (frozen(given(lambda z: z)(balancer)[0]), (X, TARGETS)),
    "a skip connection": lambda balancer: written(skipping, balancer=balancer),
    "a task without labels": lambda balancer: written(some_labels, balancer=balancer),
    "tied weights": tied,
    "tied weights at level features": lambda balancer: tied(balancer, level="features"),
}


def gradients(make: Callable[[Any], tuple[Any, Any]], balancer: Any) -> dict[str, Tensor | None]:
    torch.manual_seed(0)
    model, batch = make(balancer)
    model.training_step(batch, 0).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def test_backward_counts_a_feature_once():
    grads = []
    for features in (lambda z: z, lambda z: (z, z)):
        torch.manual_seed(0)
        encoder, a, b = mlp(), head(), head()
        z = encoder(X)
        losses = {"a": a(z).square().mean(), "b": b(z).mean()}
        lightning_mtl.backward(losses, PCGrad(2), features=features(z))
        grads.append(encoder[0].weight.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("name", SOUND)
def test_what_is_sound_is_not_refused(name):
    even, plain = gradients(SOUND[name], EVEN), gradients(SOUND[name], "fixed")
    assert even.keys() == plain.keys()
    assert any(grad is not None for grad in plain.values())
    for parameter, grad in plain.items():
        if grad is None:
            assert even[parameter] is None
        else:
            torch.testing.assert_close(even[parameter], grad, msg=parameter)


def test_there_are_enough_cases():
    assert len(AT_ONCE) + len(AT_FIT_START) + len(AT_FIRST_BATCH) >= 100


@pytest.mark.parametrize(
    "text",
    [
        "PCGrad: `gram` must be square, got [2, 3].",
        "PCGrad: `gram` must be square, got [2, 3]. pass rows.",
        "PCGrad: `gram` must be square. Pass rows.",
        "PCGrad: gram must be square, got [2, 3]. Pass rows.",
        "PCGrad: `gram` must be square, got [2, 3]. Pass rows..",
        "gram must be square",
    ],
)
def test_another_form_is_seen(text):
    assert not FORM.fullmatch(text)
