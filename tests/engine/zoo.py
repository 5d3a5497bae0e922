"""Networks whose gradients are compared with brute force, each with its losses written once more by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_mtl import Balanced, MultiTaskModule
from lightning_mtl.tasks import ClassificationTask, MultiLabelTask, RegressionTask
from tests.nets import WIDTH, Pyramid, PyramidHead, Transformer, conv, mlp, samples, three_tasks

NAMES = ("kind", "size", "shape")
ByHand = tuple[list[Tensor], list[Tensor]]


def a_batch() -> tuple[Tensor, dict[str, Tensor]]:
    return samples(12)


@dataclass(frozen=True)
class Net:
    """One network.

    Args:
        build: (balancer, level, **options) -> module.
        by_hand: (module, batch) -> the ``T`` losses, and the features (empty if there are none in common).
        shared: the names of the shared parameters start with one of these.
        last: those of the last shared layer with one of these.
        batch: makes a batch.
        levels: at which levels it can be balanced.
        shared_heads: names of parameters that belong to the rows at level "parameters" only start with these.
        seed: of the parameters; one with which tasks conflict at every level.
    """

    build: Callable[..., Balanced]
    by_hand: Callable[[Any, Any], ByHand]
    shared: tuple[str, ...]
    last: tuple[str, ...]
    batch: Callable[[], Any] = a_batch
    levels: tuple[str, ...] = ("parameters", "features")
    shared_heads: tuple[str, ...] = ()
    seed: int = 1

    def make(self, balancer: Any, level: str, **options: Any) -> Balanced:
        """The seeded module."""
        torch.manual_seed(self.seed)
        return self.build(balancer, level, **options)


def three_losses(outputs: tuple[Tensor, Tensor, Tensor], targets: dict[str, Tensor]) -> list[Tensor]:
    kind, size, shape = outputs
    return [
        F.cross_entropy(kind, targets["kind"]),
        F.mse_loss(size.squeeze(1), targets["size"]),
        F.l1_loss(shape, targets["shape"]),
    ]


# Everything declared.


def declared(encoder: Callable[[], nn.Module], tasks: Callable[[], Any], balancer: Any, level: str, **options: Any):
    return MultiTaskModule(encoder(), tasks(), balancer, level, **options)


def declared_by_hand(module: MultiTaskModule, batch: Any) -> ByHand:
    x, targets = batch
    z = module.encoder(x)
    outputs = tuple(module.tasks[name].head(z) for name in NAMES)
    return three_losses(outputs, targets), [z["fine"], z["coarse"][0]] if isinstance(z, dict) else [z]


def pyramid_tasks() -> dict[str, Any]:
    return {
        "kind": ClassificationTask(PyramidHead(3), 3),
        "size": RegressionTask(PyramidHead(1)),
        "shape": RegressionTask(PyramidHead(2), loss="l1"),
    }


def wide() -> nn.Module:
    """With more parameters than one block of the gram holds."""
    return nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, WIDTH))


class Checkpointed(nn.Module):
    """The small MLP, its first half recomputed in the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[2](checkpoint(lambda x: torch.tanh(self.layers[0](x)), x, use_reentrant=False))


def frozen_first_layer() -> nn.Module:
    encoder = mlp()
    encoder[0].requires_grad_(False)
    return encoder


class Skip(nn.Module):
    """One of the two features is computed from the other."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Linear(8, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> dict[str, Any]:
        fine = torch.tanh(self.fine(x))
        return {"fine": fine, "coarse": (torch.sin(self.coarse(fine)),)}


class Twice(nn.Module):
    """The two features are one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, WIDTH)

    def forward(self, x: Tensor) -> dict[str, Any]:
        z = torch.tanh(self.linear(x))
        return {"fine": z, "coarse": (z,)}


class Query(nn.Module):
    """One of the features is a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.linear = nn.Parameter(torch.randn(12, WIDTH)), nn.Linear(8, WIDTH)

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"fine": torch.tanh(self.linear(x)), "coarse": (self.query,)}


class TiedHead(nn.Module):
    """Reads the features backwards through the encoder's own last layer."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer, self.linear = layer, nn.Linear(layer.in_features, 1)

    def forward(self, z: Tensor) -> Tensor:
        return self.linear(torch.tanh(z @ self.layer.weight))


def tied(balancer: Any, level: str, **options: Any) -> MultiTaskModule:
    """A parameter of the encoder is in a head too."""
    encoder, tasks = mlp(), three_tasks()
    tasks["size"] = RegressionTask(TiedHead(encoder[2]))
    return MultiTaskModule(encoder, tasks, balancer, level, **options)


def own_samples() -> dict[str, Any]:
    """One loader per task: every task has inputs of its own, of its own number."""
    return {name: (x, t[name]) for seed, name in enumerate(NAMES) for x, t in [samples(8 + 2 * seed, seed)]}


def own_samples_by_hand(module: MultiTaskModule, batch: Any) -> ByHand:
    outputs = tuple(module.tasks[name].head(module.encoder(batch[name][0])) for name in NAMES)
    return three_losses(outputs, {name: batch[name][1] for name in NAMES}), []


def labels() -> tuple[Tensor, dict[str, Tensor]]:
    x, _ = samples(12)
    return x, {"tags": (torch.stack([x[:, 0] > 0, x[:, 1] < x[:, 2], x[:, 3] > 1], dim=1)).float()}


def one_task_per_label() -> dict[str, Any]:
    head = nn.Sequential(nn.Linear(WIDTH, 5), nn.Tanh(), nn.Linear(5, 3))
    return MultiLabelTask(head, ["old", "young", "tall"]).per_label("tags")


def one_task_per_label_by_hand(module: MultiTaskModule, batch: Any) -> ByHand:
    z = module.encoder(batch[0])
    logits = module.tasks["old"].head(z)
    columns = range(3)
    return [F.binary_cross_entropy_with_logits(logits[:, c], batch[1]["tags"][:, c]) for c in columns], [z]


# An existing LightningModule that returns self.balance(losses), with or without features.


class Existing(Balanced, L.LightningModule):
    """Subclasses fill in ``losses_of``."""

    def __init__(self, balancer: Any, level: str = "parameters", *, tell: bool = False, **options: Any) -> None:
        super().__init__(tasks=NAMES, balancer=balancer, level=level, **options)
        self.tell = tell

    def losses_of(self, batch: Any) -> ByHand:
        raise NotImplementedError

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses, features = self.losses_of(batch)
        return self.balance(dict(zip(NAMES, losses, strict=True)), features=features if self.tell else None)


def existing_by_hand(module: Existing, batch: Any) -> ByHand:
    return module.losses_of(batch)


class Trunk(Existing):
    """One trunk, three heads."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.trunk = mlp()
        self.kind, self.size, self.shape = nn.Linear(WIDTH, 3), nn.Linear(WIDTH, 1), nn.Linear(WIDTH, 2)

    def losses_of(self, batch: Any) -> ByHand:
        z = torch.relu(self.trunk(batch[0]))
        return three_losses((self.kind(z), self.size(z), self.shape(z)), batch[1]), [z]


class DeepSupervision(Existing):
    """No features in common: the first head leaves half-way, so one cut would lie behind another."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.low, self.high = nn.Linear(8, 7), nn.Linear(7, WIDTH)
        self.kind, self.size, self.shape = nn.Linear(7, 3), nn.Linear(WIDTH, 1), nn.Linear(WIDTH, 2)

    def losses_of(self, batch: Any) -> ByHand:
        low = torch.tanh(self.low(batch[0]))
        high = torch.sin(self.high(low))
        return three_losses((self.kind(low), self.size(high), self.shape(high)), batch[1]), []


class Cascade(Existing):
    """The first head's output feeds the second head."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.trunk = mlp()
        self.kind, self.size, self.shape = nn.Linear(WIDTH, 3), nn.Linear(WIDTH + 3, 1), nn.Linear(WIDTH, 2)

    def losses_of(self, batch: Any) -> ByHand:
        z = self.trunk(batch[0])
        kind = self.kind(z)
        return three_losses((kind, self.size(torch.cat([z, kind], dim=1)), self.shape(z)), batch[1]), [z]


class Experts(Existing):
    """Mixture of experts (MMoE): the experts are shared, every task mixes them with a gate of its own."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.gates = nn.ModuleList(nn.Linear(8, 2) for _ in NAMES)
        self.experts = nn.ModuleList(mlp() for _ in range(2))
        self.heads = nn.ModuleList(nn.Linear(WIDTH, out) for out in (3, 1, 2))

    def losses_of(self, batch: Any) -> ByHand:
        x, targets = batch
        z = torch.stack([expert(x) for expert in self.experts], dim=1)
        mixed = [(gate(x).softmax(1)[:, :, None] * z).sum(1) for gate in self.gates]
        outputs = tuple(head(part) for head, part in zip(self.heads, mixed, strict=True))
        return three_losses(outputs, targets), [z]


class OneHead(Existing):
    """One last layer for all tasks, read at other columns."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.trunk, self.head = mlp(), nn.Linear(WIDTH, 6)

    def losses_of(self, batch: Any) -> ByHand:
        z = torch.tanh(self.trunk(batch[0]))
        out = self.head(z)
        return three_losses((out[:, :3], out[:, 3:4], out[:, 4:]), batch[1]), [z]


class WithQuery(Existing):
    """One of the features given is a parameter."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.trunk = Query()
        self.heads = nn.ModuleList(PyramidHead(out) for out in (3, 1, 2))

    def losses_of(self, batch: Any) -> ByHand:
        z = self.trunk(batch[0])
        outputs = tuple(head(z) for head in self.heads)
        return three_losses(outputs, batch[1]), [z["fine"], z["coarse"][0]]


class CheckpointedTrunk(Trunk):
    """The trunk is recomputed in the backward."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.trunk = Checkpointed()


def with_encoder(
    encoder: Callable[[], nn.Module], last: str, seed: int, tasks: Callable[[], Any] = three_tasks, **more: Any
) -> Net:
    build = partial(declared, encoder, tasks)
    return Net(build, declared_by_hand, ("encoder.",), (f"encoder.{last}.",), seed=seed, **more)


def found(cls: type[Existing], shared: tuple[str, ...], last: str, seed: int) -> Net:
    """Who is shared is left to be found."""
    return Net(partial(cls, tell=False), existing_by_hand, shared, (last,), levels=("parameters",), seed=seed)


def told(cls: type[Existing], shared: tuple[str, ...], last: str, seed: int) -> Net:
    """The features are given: what lies behind them is shared."""
    return Net(partial(cls, tell=True), existing_by_hand, shared, (last,), seed=seed)


NETS = {
    "mlp": with_encoder(mlp, "2", seed=7),
    "wide": with_encoder(wide, "4", seed=1),
    "conv": with_encoder(conv, "6", seed=3),
    "transformer": with_encoder(Transformer, "layers.layers.1.linear2", seed=9),
    "pyramid": with_encoder(Pyramid, "coarse", seed=4, tasks=pyramid_tasks),
    # Rows at these features would be partial derivatives, which autograd does not give an outsider.
    "skip": with_encoder(Skip, "coarse", seed=2, tasks=pyramid_tasks, levels=("parameters",)),
    "twice": with_encoder(Twice, "linear", seed=2, tasks=pyramid_tasks, levels=("parameters",)),
    "query": with_encoder(Query, "linear", seed=8, tasks=pyramid_tasks),
    "checkpointed": with_encoder(Checkpointed, "layers.2", seed=7),
    "half_frozen": with_encoder(frozen_first_layer, "2", seed=7),
    "tied": Net(tied, declared_by_hand, ("encoder.",), ("encoder.2.",), levels=("parameters",), seed=1),
    "one_loader_per_task": Net(
        partial(declared, mlp, three_tasks),
        own_samples_by_hand,
        shared=("encoder.",),
        last=("encoder.2.",),
        batch=own_samples,
        levels=("parameters",),
        seed=4,
    ),
    "one_task_per_label": Net(
        partial(declared, mlp, one_task_per_label),
        one_task_per_label_by_hand,
        shared=("encoder.",),
        last=("encoder.2.",),
        batch=labels,
        shared_heads=("tasks.",),
        seed=10,
    ),
    "found": found(Trunk, ("trunk.",), "trunk.2.", seed=1),
    "told": told(Trunk, ("trunk.",), "trunk.2.", seed=3),
    "deep_supervision": found(DeepSupervision, ("low.", "high."), "low.", seed=1),
    "cascade_found": found(Cascade, ("trunk.", "kind."), "trunk.2.", seed=2),
    "cascade_told": told(Cascade, ("trunk.",), "trunk.2.", seed=2),
    "experts_found": found(Experts, ("experts.",), "experts.1.2.", seed=1),
    "experts_told": told(Experts, ("experts.",), "experts.1.2.", seed=1),
    "one_head_found": found(OneHead, ("trunk.", "head."), "head.", seed=3),
    "one_head_told": told(OneHead, ("trunk.",), "trunk.2.", seed=3),
    "query_found": found(WithQuery, ("trunk.",), "trunk.linear.", seed=1),
    "query_told": told(WithQuery, ("trunk.",), "trunk.linear.", seed=8),
    "checkpointed_found": found(CheckpointedTrunk, ("trunk.",), "trunk.layers.2.", seed=1),
}
