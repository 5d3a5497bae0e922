"""What a process does in a distributed test: alone with whole batches, or as one of two, each with its half.

A :class:`Run` is plain data, so that the test process can hand it to the workers. :func:`execute` does it; whether it
is alone a process reads off the process group. Trainings that start from one seed must then end equal.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy as FabricDDP
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Sampler

import lightning_mtl
from lightning_mtl import Balanced, MultiTaskModule
from lightning_mtl.balancers import resolve
from lightning_mtl.sharing import Encoders, OwnFeatures, ProximalStep
from lightning_mtl.tasks import ClassificationTask, MultiLabelTask, Task
from tests.distributed import steps, uneven
from tests.nets import WIDTH, HandWritten, Samples, mlp, module, network, samples, sgd, three_tasks, trainer
from tests.versions import TENSORS_ONLY

BATCH = 16  # samples of both processes together
HALF = BATCH // 2
OVERFLOW = 2  # the batch in which a loss or a gradient overflows
MARK = 42.0  # what process 1 writes into its buffers
TASKS = ("kind", "size", "shape")
LOSSES: dict[str, Callable[..., Tensor]] = {"kind": F.cross_entropy, "size": F.mse_loss, "shape": F.l1_loss}
DDP: dict[str, dict[str, Any]] = {
    "plain": {},
    "find_unused": {"find_unused_parameters": True},
    "bucket_view": {"gradient_as_bucket_view": True},
    "static_graph": {"static_graph": True},
}
SPECS: dict[str, Any] = {
    "pcgrad_every_2": {"class_path": "pcgrad", "init_args": {"every_n_steps": 2}},
    "gradnorm_every_2": {"class_path": "gradnorm", "init_args": {"every_n_steps": 2}},
    "gradnorm_shared": {"class_path": "gradnorm", "init_args": {"norms_at": "shared"}},
    "uncertainty_adam": {"class_path": "uncertainty", "init_args": {"lr": 0.05}},
    "imtl_l_adam": {"class_path": "imtl_l", "init_args": {"lr": 0.05}},
    "imtl_adam": {"class_path": "imtl", "init_args": {"lr": 0.05}},
}


@dataclass(frozen=True)
class Run:
    """One training and its circumstances. As text it names what is not the default."""

    balancer: str = "pcgrad"
    level: str = "parameters"
    do: str = "fit"
    model: str = "declared"
    labels: str = "all"
    ddp: str = "plain"
    accumulate: int = 1
    clip: float | None = None
    steps: int = 10
    epochs: int = 1

    def __str__(self) -> str:
        given = {f.name: getattr(self, f.name) for f in fields(self)[2:] if getattr(self, f.name) != f.default}
        words = [value if isinstance(value, str) else f"{name}_{value}" for name, value in given.items()]
        return "-".join([self.balancer, self.level, *words])


def execute(run: Run) -> Any:
    """Do it, in this process."""
    return DO[run.do](run)


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


# Data


class Shares(Sampler):
    """The indices of this process's half of each global batch, in order; alone, of both halves.

    Args:
        num: samples in all.
        stops: after how many batches the halves of process 0 and 1 are exhausted.
    """

    def __init__(self, num: int, stops: tuple[int, int] | None = None) -> None:
        self.num, self.stops = num, stops or (num // BATCH, num // BATCH)
        self.halves = (0, 1) if world() == 1 else (rank(),)
        self.sampler = self  # Lightning 2.5.0 looks for one inside a batch sampler

    def __len__(self) -> int:
        return max(self.stops[half] for half in self.halves)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(len(self)):
            begins = [batch * BATCH + half * HALF for half in self.halves if batch < self.stops[half]]
            yield [begin + place for begin in begins for place in range(HALF)]


def labelled(labels: str, num: int) -> dict[str, Tensor]:
    """For each task, which samples have a label. Process 0 gets the first half of each batch, process 1 the second."""
    batch, first = torch.arange(num) // BATCH, torch.arange(num) % BATCH < HALF
    there = {task: torch.ones(num, dtype=torch.bool) for task in TASKS}
    if labels == "one_rank":  # one task on process 1 only, another on process 0 only
        there["size"] &= ~first
        there["kind"] &= first | (batch % 3 != 0)
    elif labels == "single":  # in turn, one of the processes has a single task
        for task in ("size", "shape"):
            there[task] &= torch.where(batch % 2 == 0, first, ~first)
    elif labels == "nowhere":  # batches in which a task, or two, have no label at all
        there["size"] &= (batch != 2) & (batch != 3) & (batch != 7)
        there["shape"] &= batch != 3
    elif labels == "late":  # the first batch has labels of a single task
        there["size"] &= batch > 0
        there["shape"] &= batch > 0
    elif labels == "uneven":
        generator = torch.Generator().manual_seed(1)
        for task in TASKS:
            there[task] = torch.rand(num, generator=generator) < torch.where(first, 0.85, 0.35)
    elif labels == "silent":  # in turn, one of the processes has no label of any task
        silent = ((batch == 1) & first) | ((batch == 4) & ~first)
        there = dict.fromkeys(TASKS, ~silent)
    elif labels == "empty":  # a batch without any label
        there = dict.fromkeys(TASKS, batch != 4)
    return there


def dataset(labels: str, num: int, seed: int = 0) -> Samples:
    x, targets = samples(num, seed)
    there = labelled(labels, num)
    targets["kind"] = targets["kind"].where(there["kind"], torch.tensor(-100))
    targets["size"] = targets["size"].where(there["size"], torch.nan)
    targets["shape"] = targets["shape"].where(there["shape"][:, None], torch.nan)
    if labels == "colours":
        return Samples(x, {"colours": (x[:, :3] > 0).float(), "size": targets["size"]})
    if labels in ("inf", "huge"):  # at one sample of process 1: the loss is infinite, or only its scaled gradient
        targets["size"][OVERFLOW * BATCH + BATCH - 3] = torch.inf if labels == "inf" else 1e6
    return Samples(x, targets)


class Pairs(Samples):
    """``(x, target)`` of one task alone."""

    def __init__(self, task: str, num: int) -> None:
        super().__init__(*samples(num, seed=TASKS.index(task)))
        self.task = task

    def __getitem__(self, index: int) -> Any:
        return self.x[index], self.targets[self.task][index]


def loader(data: Samples, stops: tuple[int, int] | None = None) -> DataLoader:
    return DataLoader(data, batch_sampler=Shares(len(data), stops))


def training_data(run: Run) -> Any:
    if run.model in uneven.DATA:
        return uneven.loader(run.model, rank(), world(), times=2)
    num = run.steps * run.accumulate * BATCH
    if run.model != "loaders":
        return loader(dataset(run.labels, num))
    stops = {"exhausted": (6, 6), "exhausted_apart": (4, 7)}.get(run.labels)
    pairs = {task: Pairs(task, num) for task in TASKS}
    loaders = {task: loader(data, stops if task == "size" else None) for task, data in pairs.items()}
    return CombinedLoader(loaders, "max_size")


# Models


def forgetful(parameters: Any) -> torch.optim.Optimizer:
    """Without momentum, for models in which a head may go without labels.

    Its gradient is then missing alone, so that it stands still, and zero under DDP, so that momentum would move it on.
    """
    return torch.optim.SGD(parameters, lr=0.02)


class Hand(Balanced, L.LightningModule):
    """An existing module made balanced. As in its user's code, a head without labels is not even called."""

    def __init__(self, run: Run) -> None:
        super().__init__(tasks=TASKS, balancer=SPECS.get(run.balancer, run.balancer), level=run.level)
        torch.manual_seed(0)
        self.encoder = mlp()
        self.kind, self.size, self.shape = nn.Linear(WIDTH, 3), nn.Linear(WIDTH, 1), nn.Linear(WIDTH, 2)
        self.pass_features = run.model == "features"
        self.pass_counts = run.labels not in ("all", "one_rank")  # where each process counts the same if at all

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, targets = batch
        z = self.encoder(x)
        losses: dict[str, Tensor | None] = {}
        counts = {}
        for task in TASKS:
            target = targets[task]
            there = target >= 0 if task == "kind" else target.reshape(len(x), -1).isfinite().all(1)
            counts[task] = there.sum()
            losses[task] = None
            if there.any():
                losses[task] = LOSSES[task](getattr(self, task)(z[there]).squeeze(1), target[there])
        if world() == 1 and all(loss is None for loss in losses.values()):
            return z.sum() * 0
        features = z if self.pass_features else None
        return self.balance(losses, features, counts if self.pass_counts else None)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return forgetful(self.parameters())


class SumOverRanks(torch.autograd.Function):
    """A sum over the processes whose backward is such a sum too, as in synchronised batch norm."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        if world() > 1:
            dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone()
        if world() > 1:
            dist.all_reduce(grad)
        return grad


class SyncCentre(nn.Module):
    """Subtract the mean over the global batch: synchronised batch norm as far as the CPU has it."""

    def forward(self, x: Tensor) -> Tensor:
        return x - SumOverRanks.apply(x.sum(0)) / (len(x) * world())


def declared(run: Run, **options: Any) -> MultiTaskModule:
    return module(SPECS.get(run.balancer, run.balancer), level=run.level, **options)


def own_loaders(run: Run) -> MultiTaskModule:
    """Its labels cannot be missing, so that only an exhausted loader leaves a task out."""
    torch.manual_seed(0)
    tasks = {task: Task(nn.Linear(WIDTH, out), LOSSES[task]) for task, out in zip(TASKS, (3, 1, 2), strict=True)}
    return MultiTaskModule(mlp(), tasks, run.balancer, optimizer=forgetful)


def frozen(run: Run) -> MultiTaskModule:
    model = declared(run)
    model.encoder.requires_grad_(False)
    return model


def per_label(run: Run) -> MultiTaskModule:
    """One head for three labels, each a task: its parameters are shared, but not by the last task."""
    torch.manual_seed(0)
    colours = MultiLabelTask(nn.Linear(WIDTH, 3), ["red", "green", "blue"]).per_label("colours")
    return MultiTaskModule(mlp(), {**colours, "size": three_tasks()["size"]}, run.balancer, run.level, optimizer=sgd)


def weighted(run: Run) -> MultiTaskModule:
    """With class weights the mean is over their sum, which differs between the processes, and may be below 1."""
    torch.manual_seed(0)
    kind = ClassificationTask(nn.Linear(WIDTH, 3), 3, class_weights=[0.01, 0.5, 0.03])
    return MultiTaskModule(mlp(), three_tasks() | {"kind": kind}, run.balancer, run.level, optimizer=forgetful)


class Instances(MultiTaskModule):
    """A task on what was found in the batch, of which a process may have nothing; its labels are complete."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, targets = batch
        found = targets["size"].isfinite()
        targets = targets | {"size": targets["size"][found, None]}
        return super().training_step(({"images": x, "instances": x[found]}, targets), batch_idx)


class Of(nn.Module):
    """Applies a module to each entry of a mapping, or to one of them."""

    def __init__(self, part: nn.Module, key: str = "") -> None:
        super().__init__()
        self.part, self.key = part, key

    def forward(self, given: dict[str, Tensor]) -> Any:
        return self.part(given[self.key]) if self.key else {key: self.part(value) for key, value in given.items()}


def instances(run: Run) -> MultiTaskModule:
    torch.manual_seed(0)
    tasks = three_tasks() | {"size": Task(nn.Linear(WIDTH, 1), nn.MSELoss())}
    for name, task in tasks.items():
        task.head = Of(task.head, "instances" if name == "size" else "images")
    return Instances(Of(mlp()), tasks, run.balancer, run.level, optimizer=forgetful)


def off_without_labels(output: Tensor, target: Tensor) -> Tensor | float:
    there = target.isfinite()
    return F.mse_loss(output[there, 0], target[there]) if there.any() else 0.0


def switched_off(run: Run) -> MultiTaskModule:
    torch.manual_seed(0)
    tasks = three_tasks() | {"size": Task(nn.Linear(WIDTH, 1), off_without_labels)}
    return MultiTaskModule(mlp(), tasks, run.balancer, run.level, optimizer=forgetful)


class Soft(MultiTaskModule):
    """One encoder per task, and a proximal step over their first layers."""

    def configure_callbacks(self) -> list[L.Callback]:
        names = ["0.weight"]
        return [ProximalStep("trace_norm", 0.5, names=names), ProximalStep("joint_features", 0.2, names=names)]


def soft(run: Run) -> MultiTaskModule:
    torch.manual_seed(0)
    encoders, tasks = Encoders({task: mlp() for task in TASKS}), three_tasks()
    for name, task in tasks.items():
        task.head = OwnFeatures(name, task.head)
    return Soft(encoders, tasks, run.balancer, run.level, optimizer=sgd)


class Sharded(MultiTaskModule):
    """Under FSDP2 the encoder and each head lie in shards on both processes."""

    def configure_model(self) -> None:
        if world() > 1:
            for part in (self.encoder, *(task.head for _, task in self.tasks.items())):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])


def sharded(run: Run) -> MultiTaskModule:
    torch.manual_seed(0)
    return Sharded(mlp(), three_tasks(), run.balancer, optimizer=sgd)


def of_uneven_parts(run: Run) -> MultiTaskModule:
    return uneven.build(run.model, SPECS.get(run.balancer, run.balancer), run.level, forgetful, world())


MODELS: dict[str, Callable[[Run], Any]] = dict.fromkeys(uneven.DATA, of_uneven_parts) | {
    "declared": declared,
    "loaders": own_loaders,
    "handwritten": lambda run: HandWritten(),
    "features": Hand,
    "graph": Hand,
    "synchronised": lambda run: declared(run, encoder=lambda: nn.Sequential(mlp(), SyncCentre(), nn.Tanh())),
    "weight_heads": lambda run: declared(run, weight_heads=True),
    "frozen": frozen,
    "per_label": per_label,
    "weighted": weighted,
    "instances": instances,
    "switched_off": switched_off,
    "soft": soft,
    "sharded": sharded,
}


# What is done


def trainer_of(run: Run, **options: Any) -> L.Trainer:
    if world() > 1:
        strategy: Any = DDPStrategy(process_group_backend="gloo", **DDP[run.ddp])
        if run.model == "sharded":
            strategy = ModelParallelStrategy(world(), 1, process_group_backend="gloo")
        options |= {"strategy": strategy, "devices": world(), "use_distributed_sampler": False}
    clip = {"gradient_clip_val": run.clip} if run.clip is not None else {}
    return trainer(max_epochs=run.epochs, accumulate_grad_batches=run.accumulate, **clip, **options)


def state_of(balancer: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers as they are now."""
    return {key: value.detach().clone() for key, value in balancer.state_dict().items()}


def network_of(model: nn.Module) -> Tensor:
    """As ``network``, put together where it lies in shards."""
    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return network(model)
    found = [p.full_tensor() for n, p in model.named_parameters() if not n.startswith("balancer")]  # type: ignore[attr-defined]
    return torch.cat([parameter.detach().flatten() for parameter in found])


def fit(run: Run, ckpt_path: str | None = None) -> dict[str, Any]:
    model = MODELS[run.model](run)
    fitted = trainer_of(run)
    options = {"ckpt_path": ckpt_path, **TENSORS_ONLY} if ckpt_path else {}
    fitted.fit(model, training_data(run), **options)
    return {"network": network_of(model), "balancer": state_of(getattr(model, "balancer", nn.Module()))}


def recipe(run: Run) -> dict[str, Any]:
    """A recipe's own model on its own data."""
    from lightning_mtl.cli.compare import load
    from lightning_mtl.cli.folder import find

    space, rows = load(find(run.model).path), run.steps * BATCH
    if run.model == "multidigits":
        data, collate, make = space.DigitPairs(train_pairs=rows), space.as_it_is, space.MultiDigits
    else:
        data, collate, make = space.DigitRows(rows=rows, observed=0.3), space.as_batch, space.DigitAttributes
    data.setup("fit")
    torch.manual_seed(0)
    model = make(run.balancer, level=run.level)
    train = data.datasets["train"]
    trainer_of(run).fit(model, DataLoader(train, batch_sampler=Shares(len(train)), collate_fn=collate))
    return {"network": network(model), "balancer": state_of(model.balancer)}


def logs(run: Run) -> dict[str, float]:
    """What was logged in training (the last step's) and in validation."""
    model = MODELS[run.model](run)
    data, parts = training_data(run), run.model in uneven.DATA
    fitted = trainer_of(run, log_every_n_steps=50 if run.do == "last_logs" else len(data))
    fitted.fit(model, data, training_data(run) if parts else loader(dataset(run.labels, 4 * BATCH, seed=1)))
    return {key: value.item() for key, value in fitted.callback_metrics.items()}


def checkpoint(run: Run) -> str:
    model = MODELS[run.model](run)
    fitted = trainer_of(run)
    fitted.fit(model, training_data(run))
    path = Path(os.environ["OUT"], f"{run}.ckpt")
    fitted.save_checkpoint(path)
    return str(path)


class Snapshots(L.Callback):
    """Parameters, balancer state and loss scale before the first batch and after each."""

    def __init__(self) -> None:
        self.network: list[Tensor] = []
        self.balancer: list[dict[str, Tensor]] = []
        self.scale: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.network.append(network(pl_module))
        self.balancer.append(state_of(pl_module.balancer))
        self.scale.append(trainer.precision_plugin.scaler.get_scale())  # type: ignore[attr-defined]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.on_train_batch_end(trainer, pl_module)


def half(run: Run) -> dict[str, Any]:
    """Train in float16 with a gradient scaler."""
    model, seen = MODELS[run.model](run), Snapshots()
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
    trainer_of(run, plugins=precision, callbacks=seen).fit(model, training_data(run))
    return {"network": seen.network, "balancer": seen.balancer, "scale": seen.scale}


class Marker(L.Callback):
    """On process 1, write a mark into buffers before the forward; after it, see whether it is still there."""

    def __init__(self) -> None:
        self.left: dict[str, bool] = {}

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if rank() == 1:
            for buffer in self.buffers(pl_module).values():
                buffer.fill_(MARK)

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        self.left = {name: bool((buffer == MARK).all()) for name, buffer in self.buffers(pl_module).items()}

    def buffers(self, model: Any) -> dict[str, Tensor]:
        return {"encoder.centre": model.encoder.centre, **model.balancer.state_dict(prefix="balancer.")}


def buffers(run: Run) -> dict[str, bool]:
    """After one forward: which buffers of this process hold what only process 1 wrote into its own."""
    model, marker = MODELS[run.model](run), Marker()
    model.encoder.register_buffer("centre", torch.zeros(3))
    trainer_of(run, callbacks=marker, limit_train_batches=1).fit(model, training_data(run))
    return marker.left


def refused(run: Run) -> str:
    """The text of the error with which the fit ends."""
    try:
        fit(run)
    except ValueError as error:
        return str(error)
    return "no error"


class Net(nn.Module):
    """Encoder and heads of a plain loop."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = mlp()
        self.heads = nn.ModuleDict(
            {"kind": nn.Linear(WIDTH, 3), "size": nn.Linear(WIDTH, 1), "shape": nn.Linear(WIDTH, 2)}
        )

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        z = self.encoder(x)
        return z, {name: head(z).squeeze(1) for name, head in self.heads.items()}


def loop(run: Run) -> dict[str, Any]:
    """A loop without any Trainer: plain DDP, or Fabric."""
    net, balancer = Net(), resolve(run.balancer, TASKS)
    optimizer = sgd([*net.parameters(), *balancer.parameters()])
    wrapped: Any = net
    backward_fn = None
    if run.model == "fabric":
        strategy = FabricDDP(process_group_backend="gloo", **DDP[run.ddp]) if world() > 1 else "auto"
        fabric = Fabric(accelerator="cpu", devices=world(), strategy=strategy)
        fabric.launch()
        wrapped, optimizer = fabric.setup(net, optimizer)
        backward_fn = fabric.backward
    elif world() > 1:
        wrapped = DistributedDataParallel(net, **DDP[run.ddp])
    last_layer = None if run.level == "features" else list(net.encoder[-1].parameters())
    for index, (x, targets) in enumerate(training_data(run)):
        due = (index + 1) % run.accumulate == 0
        waiting = contextlib.nullcontext() if due or world() == 1 else wrapped.no_sync()
        with waiting:
            z, outputs = wrapped(x)
            losses = {task: LOSSES[task](outputs[task], targets[task]) / run.accumulate for task in TASKS}
            features = None if run.model == "discovered" else z
            lightning_mtl.backward(
                losses, balancer, features, level=run.level, last_layer=last_layer, backward_fn=backward_fn
            )
        if due:
            optimizer.step()
            optimizer.zero_grad()
    return {"network": network(net), "balancer": state_of(balancer)}


def one_step(run: Run) -> dict[str, Any]:
    at_last = run.balancer == "gradnorm_at_last"
    options = {"norms_at": "last_layer"} if at_last else {}
    return steps.step(run.model, "gradnorm" if at_last else run.balancer, run.labels, run.level, **options)


DO: dict[str, Callable[[Run], Any]] = {
    "fit": fit,
    "recipe": recipe,
    "logs": logs,
    "last_logs": logs,
    "checkpoint": checkpoint,
    "half": half,
    "buffers": buffers,
    "refused": refused,
    "loop": loop,
    "step": one_step,
}
