"""What a balanced step costs, as ratios measured in one run.

Run:   python benchmarks/step_cost.py                       (CPU, one thread, about three minutes)
       python benchmarks/step_cost.py --device cuda --precision bf16 --nets resnet50
Shows: "x sum"    time of a step under the Lightning Trainer, over the same step of a hand-written module that
                  sums the losses (in each round the arms take turns; the median of the rounds' ratios, so that a
                  machine that slows down for a while slows both sides).
                  "missing": by MultiLabelTask, which also takes missing labels and checks every target's values.
       "x limit"  time of forward and backward without a Trainer, over one encoder forward and T encoder backwards,
                  below which no method that needs every task's gradient at the parameters can go.
On the CPU it is the process's CPU time that counts, on CUDA the wall time between synchronisations.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_mtl import MultiTaskModule
from lightning_mtl.tasks import MultiLabelTask, Task

ARMS: dict[str, dict[str, Any]] = {
    "fixed": {"balancer": "fixed"},
    "fixed, missing": {"balancer": "fixed", "missing": True},
    "uncertainty": {"balancer": "uncertainty"},
    "gradnorm": {"balancer": "gradnorm"},
    "pcgrad, features": {"balancer": "pcgrad", "level": "features"},
    "pcgrad, parameters": {"balancer": "pcgrad"},
}


class Block(nn.Module):
    """A basic residual block."""

    def __init__(self, inside: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, out, 3, stride, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(out), nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or inside != out:
            self.skip = nn.Sequential(nn.Conv2d(inside, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(h)) + self.skip(x))


class Bottleneck(nn.Module):
    """A bottleneck block with expansion 4."""

    def __init__(self, inside: int, out: int, stride: int) -> None:
        super().__init__()
        mid = out // 4
        self.body = nn.Sequential(
            nn.Conv2d(inside, mid, 1, bias=False),
            nn.BatchNorm2d(mid),
            nn.ReLU(),
            nn.Conv2d(mid, mid, 3, stride, 1, bias=False),
            nn.BatchNorm2d(mid),
            nn.ReLU(),
            nn.Conv2d(mid, out, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or inside != out:
            self.skip = nn.Sequential(nn.Conv2d(inside, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.skip(x))


def resnet(width: int, depths: tuple[int, ...], block: type[nn.Module], expansion: int = 1) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    inside = width
    for stage, depth in enumerate(depths):
        out = width * 2**stage * expansion
        for index in range(depth):
            layers.append(block(inside, out, 2 if stage > 0 and index == 0 else 1))
            inside = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU())


# name -> encoder, width of its features, shape of a batch of inputs
NETS: dict[str, tuple[Callable[[], nn.Module], int, tuple[int, ...]]] = {
    "mlp": (mlp, 1024, (64, 784)),
    "resnet18": (lambda: resnet(32, (2, 2, 2, 2), Block), 256, (16, 3, 32, 32)),
    "resnet50": (lambda: resnet(64, (3, 4, 6, 3), Bottleneck, 4), 2048, (128, 3, 64, 64)),
}


class HandWritten(L.LightningModule):
    """The step to compare with: the sum of the losses."""

    def __init__(self, encoder: nn.Module, heads: nn.ModuleDict) -> None:
        super().__init__()
        self.encoder, self.heads = encoder, heads

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, targets = batch
        z = self.encoder(x)
        losses = [
            F.binary_cross_entropy_with_logits(head(z).squeeze(1), targets[name]) for name, head in self.heads.items()
        ]
        return torch.stack(losses).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class OneBatch(Dataset):
    """The same batch, again and again: the loader costs nothing."""

    def __init__(self, batch: Any, length: int) -> None:
        self.batch, self.length = batch, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        if index >= self.length:
            raise IndexError
        return self.batch


class Clock(L.Callback):
    """Time from the start of a batch to the start of the next."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now, self.marks = now, []

    def on_train_batch_start(self, *args: Any) -> None:
        self.marks.append(self.now())

    def times(self, skip: int) -> list[float]:
        return [after - before for before, after in zip(self.marks[skip:-1], self.marks[skip + 1 :], strict=True)]


def clock(device: str) -> Callable[[], float]:
    if device == "cpu":
        return time.process_time

    def now() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return now


def build(net: str, num_tasks: int, device: str) -> tuple[nn.Module, dict[str, nn.Module], Any]:
    make, width, size = NETS[net]
    torch.manual_seed(0)
    heads = {f"t{task}": nn.Linear(width, 1) for task in range(num_tasks)}
    targets = {name: torch.rand(size[0], device=device).round() for name in heads}
    return make(), heads, (torch.randn(size, device=device), targets)


def module(net: str, num_tasks: int, device: str, missing: bool = False, **options: Any) -> MultiTaskModule:
    """The same step by the library; with ``missing``, by tasks whose labels may be missing and are checked."""
    encoder, heads, _ = build(net, num_tasks, device)
    tasks = {
        name: MultiLabelTask(head, 1, metrics={}) if missing else Task(head, F.binary_cross_entropy_with_logits)
        for name, head in heads.items()
    }
    return MultiTaskModule(encoder, tasks, optimizer=lambda groups: torch.optim.SGD(groups, lr=1e-3), **options)


def under_lightning(net: str, num_tasks: int, args: argparse.Namespace) -> dict[str, list[float]]:
    """Median seconds of a step per arm in each round, in which the arms take turns."""
    encoder, heads, batch = build(net, num_tasks, args.device)
    models: dict[str, L.LightningModule] = {"sum": HandWritten(encoder, nn.ModuleDict(heads))}
    models |= {arm: module(net, num_tasks, args.device, **options) for arm, options in ARMS.items()}
    times: dict[str, list[float]] = {arm: [] for arm in models}
    for _ in range(args.rounds):
        for arm, model in models.items():
            watch = Clock(clock(args.device))
            trainer = L.Trainer(
                accelerator="cpu" if args.device == "cpu" else "gpu",
                devices=1,
                precision={"32": "32-true", "bf16": "bf16-mixed"}[args.precision],
                max_epochs=1,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                callbacks=[watch],
            )
            trainer.fit(model, DataLoader(OneBatch(batch, args.steps + 4), batch_size=None))
            times[arm].append(statistics.median(watch.times(skip=3)))
    return times


def over(times: dict[str, list[float]], arm: str, base: str) -> float:
    """The median over the rounds of the ratio within a round: a machine that slows down slows down both."""
    return statistics.median(mine / its for mine, its in zip(times[arm], times[base], strict=True))


def against_limit(net: str, num_tasks: int, args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of forward and backward of "pcgrad, parameters" and of the limit, taking turns."""
    model = module(net, num_tasks, args.device, balancer="pcgrad").to(args.device)
    _, _, batch = build(net, num_tasks, args.device)
    encoder, parameters = model.encoder, list(model.encoder.parameters())
    now = clock(args.device)

    def balanced() -> None:
        model.training_step(batch, 0).backward()
        model.zero_grad()

    def limit() -> None:
        z = encoder(batch[0])
        for task in range(num_tasks):
            torch.autograd.grad(z, parameters, torch.ones_like(z), retain_graph=task < num_tasks - 1)

    times: dict[str, list[float]] = {"balanced": [], "limit": []}
    for turn in range(args.rounds * args.steps + 3):
        for name, run in {"limit": limit, "balanced": balanced}.items():
            with torch.autocast(args.device, torch.bfloat16, enabled=args.precision == "bf16"):
                before = now()
                run()
                if turn >= 3:
                    times[name].append(now() - before)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="32", choices=["32", "bf16"])
    parser.add_argument("--nets", nargs="+", default=["mlp:3", "resnet18:3", "resnet18:8"], help="NET:TASKS")
    parser.add_argument("--steps", type=int, default=12, help="steps of an arm per round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the numbers there as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    machine = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()} CPU, 1 thread"
    table = Table(title=f"one step, {machine}, torch {torch.__version__}, precision {args.precision}")
    for column in ("net", "T", "sum, ms", *ARMS, "limit, ms", "pcgrad, parameters, x limit"):
        table.add_column(column, justify="right")
    results = []
    for case in args.nets:
        net, _, tasks = case.partition(":")
        num_tasks = int(tasks or 3)
        steps, limits = under_lightning(net, num_tasks, args), against_limit(net, num_tasks, args)
        ratios = {arm: over(steps, arm, "sum") for arm in ARMS}
        over_limit = over(limits, "balanced", "limit")
        table.add_row(
            net,
            str(num_tasks),
            f"{1e3 * statistics.median(steps['sum']):.1f}",
            *(f"{ratio:.3f} x sum" for ratio in ratios.values()),
            f"{1e3 * statistics.median(limits['limit']):.1f}",
            f"{over_limit:.3f}",
        )
        seconds = {arm: statistics.median(times) for arm, times in steps.items()}
        results.append({"net": net, "tasks": num_tasks, "seconds": seconds, "x_sum": ratios, "x_limit": over_limit})
    Console(width=170).print(table)
    if args.out:
        # Networks that were measured in another run stay, so that a large one can have a run of its own.
        stored = json.loads(args.out.read_text())["results"] if args.out.exists() else []
        again = {(result["net"], result["tasks"]): result for result in results}
        kept = [again.pop((result["net"], result["tasks"]), result) for result in stored]
        about = {"machine": machine, "torch": torch.__version__, "precision": args.precision}
        about["results"] = [*kept, *again.values()]
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
