"""Ten regressions that differ in scale alone: what GradNorm's toy shows, and what the right weights would.

Run:      lightning-mtl run gradnorm_toy
          lightning-mtl compare gradnorm_toy --seeds 0,1,2       (the arms at the end of this file, side by side)
Override: --model.balancer gradnorm     --model.balancer.alpha 0.12     --trainer.max_steps 3000
          --data.batch_size 200         --seed_everything 1             --model.lr 3e-4
Expect:   20 seconds a run on one core. Share of the first losses that is left after 600 steps, mean over the tasks,
          three seeds, mean ± sd: equal 0.974 ± 0.001        uncertainty 0.967 ± 0.002
                                  gradnorm 0.941 ± 0.003     static 1/scale² 0.880 ± 0.005
Source:   Chen et al., GradNorm, section 4 (arXiv:1711.02257). Not given there: the law of the inputs, the scales of ten
          tasks, steps and batch size; what stands here is our reading.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from statistics import fmean, stdev
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_mtl import MultiTaskModule
from lightning_mtl.balancers import Balancer
from lightning_mtl.cli.comparison import Comparison, Curves, Results
from lightning_mtl.cli.recipe_cli import RecipeCLI
from lightning_mtl.tasks import RegressionTask

TASKS, INPUTS, OUTPUTS, WIDTH = 10, 250, 100, 100
SCALES = [10 ** (2 * task / (TASKS - 1)) for task in range(TASKS)]  # 1 to 100
NAMES = [f"scale_{scale:.3g}".replace(".", "_") for scale in SCALES]  # a task's name may hold no dot


# The data


class Functions:
    """Task ``t`` is ``scale_t * tanh((B + E_t) x)``: a common matrix, and a smaller one of its own.

    Shapes: ``draw(n)`` -> input ``[n, 250]`` of length about 1, and one target ``[n, 100]`` per task.
    """

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        common = 10**0.5 * torch.randn(INPUTS, OUTPUTS, generator=generator)
        own = 3.5**0.5 * torch.randn(TASKS, INPUTS, OUTPUTS, generator=generator)
        self.matrices = (common + own).permute(1, 0, 2).flatten(1)  # [250, 10 * 100]: one product for all tasks

    def draw(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Fresh samples."""
        inputs = torch.randn(count, INPUTS, generator=generator) / INPUTS**0.5
        targets = torch.tanh(inputs @ self.matrices).unflatten(1, (TASKS, OUTPUTS)).unbind(1)
        scaled = (scale * target for scale, target in zip(SCALES, targets, strict=True))
        return {"input": inputs, **dict(zip(NAMES, scaled, strict=True))}


class Stream(IterableDataset[dict[str, Tensor]]):
    """Batches that are never seen twice."""

    def __init__(self, functions: Functions, batch_size: int, batches: int, seed: int) -> None:
        self.functions, self.batch_size, self.batches, self.seed = functions, batch_size, batches, seed

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        return (self.functions.draw(self.batch_size, generator) for _ in range(self.batches))


class ToyData(L.LightningDataModule):
    """Ten functions of one random input.

    Args:
        batch_size: samples per step.
        batches: training batches in an epoch, all different.
        test_samples: how many samples the losses are measured on at the start and in the end.
        seed: of the functions and the samples; follows ``seed_everything``.
    """

    def __init__(self, batch_size: int = 100, batches: int = 600, test_samples: int = 2000, seed: int = 0) -> None:
        super().__init__()
        self.functions = Functions(seed)
        self.train = Stream(self.functions, batch_size, batches, 2 * seed + 1)
        self.test = Stream(self.functions, test_samples, 1, 2 * seed + 2)

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return DataLoader(self.train, batch_size=None)

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return DataLoader(self.test, batch_size=None)

    def test_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return self.val_dataloader()


# The model


class Toy(MultiTaskModule):
    """Four hidden layers for all tasks, one linear head for each.

    Args:
        balancer: how the task gradients are combined: a name ("gradnorm"), or a class with its options.
        lr: Adam's.
        balancer_lr: of the parameters that belong to the balancer (uncertainty's).
    """

    initial_losses: Tensor

    def __init__(
        self, balancer: Callable[[int], Balancer] | str = "fixed", lr: float = 1e-3, balancer_lr: float = 0.025
    ) -> None:
        widths = [INPUTS, WIDTH, WIDTH, WIDTH, WIDTH]
        layers = [[nn.Linear(a, b), nn.ReLU()] for a, b in pairwise(widths)]
        encoder = nn.Sequential(*(part for layer in layers for part in layer))
        tasks = {name: RegressionTask(nn.Linear(WIDTH, OUTPUTS), metrics={}) for name in NAMES}
        super().__init__(encoder, tasks, balancer)
        self.save_hyperparameters()
        self.lr, self.balancer_lr = lr, balancer_lr
        self.register_buffer("initial_losses", torch.full((TASKS,), torch.nan))

    def progress(self, losses: Tensor) -> Tensor:
        """How much of its first loss a task still has, on average: losses ``[T] -> []``."""
        return (losses / self.initial_losses).mean()

    def losses_on(self, batch: dict[str, Tensor]) -> Tensor:
        """Mean squared error of every task, ``[T]``."""
        outputs = self(batch["input"])
        return torch.stack([nn.functional.mse_loss(outputs[name], batch[name]) for name in NAMES])

    @torch.no_grad()
    def on_fit_start(self) -> None:
        if self.initial_losses.isnan().any():  # else they came with a checkpoint
            (batch,) = self.trainer.datamodule.test_dataloader()
            self.initial_losses.copy_(self.losses_on({name: column.to(self.device) for name, column in batch.items()}))

    def on_train_batch_end(self, outputs: Any, batch: dict[str, Tensor], batch_idx: int) -> None:
        # Samples are never seen twice: the loss in training is the loss on new ones.
        self.log("train/progress", self.progress(self.last_balance.losses.to(self.device)), batch_size=1)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        super().test_step(batch, batch_idx, dataloader_idx)
        self.log("test/progress", self.progress(self.losses_on(batch)), batch_size=len(batch["input"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups = self.parameter_groups()
        for group in groups[1:]:  # the first is the model's
            group["lr"] = self.balancer_lr
        return torch.optim.Adam(groups, lr=self.lr)


def main(args: Sequence[str] | None = None) -> LightningCLI:
    """The command line of this recipe; returns it, with its trainer and model, when it is done."""
    return RecipeCLI(__file__, Toy, ToyData, trainer_defaults={"max_epochs": 1}, args=args)


# The comparison: lightning-mtl compare gradnorm_toy --seeds 0,1,2


def reading(results: Results) -> list[str]:
    """What the table says: progress is the share of the first loss that is left, so lower is better."""
    left = {arm: results.of(arm, "progress") for arm in results.arms}
    sentences = []
    for arm, other in (("gradnorm", "equal"), ("static 1/scale²", "gradnorm"), ("uncertainty", "gradnorm")):
        change = [mine - theirs for mine, theirs in zip(left[arm], left[other], strict=True)]
        spread = f" ± {stdev(change):.3f}" if len(change) > 1 else ""
        lower = sum(value < 0 for value in change)
        sentences.append(
            f"{arm} against {other}: {fmean(change):+.3f}{spread}, lower in {lower} of {len(change)} seeds."
        )
    order = sorted(left, key=lambda arm: fmean(left[arm]))
    return [*sentences, f"From best to worst: {', '.join(order)}."]


COMPARE = Comparison(
    arms={
        "equal": [""],
        "uncertainty": ["--model.balancer=uncertainty"],
        "gradnorm": ["--model.balancer=gradnorm --model.balancer.alpha=0.12"],
        "static 1/scale²": [
            f"--model.balancer=fixed --model.balancer.weights={[scale**-2 for scale in SCALES]}".replace(", ", ",")
        ],
    },
    scores={"progress": False},
    base="equal",
    reading=reading,
    curves=[
        Curves(
            title="What is left of the first losses, mean over the tasks, first seed",
            label="mean of loss / first loss",
            arm=None,
            keys={"train/progress": "progress"},
        ),
        Curves(
            title="The weights that GradNorm learns",
            label="weight",
            arm="gradnorm",
            keys={f"balance/weight/{name}": name.replace("scale_", "").replace("_", ".") for name in NAMES},
        ),
    ],
)


if __name__ == "__main__":
    main()
