"""Two overlapping digits: two classifiers and an unsupervised reconstruction on one small encoder.

Run:      lightning-mtl run multidigits
          lightning-mtl run multidigits --config multidigits_gradnorm
          lightning-mtl run multidigits test --ckpt_path logs/multidigits/version_0/checkpoints/<file>.ckpt
          lightning-mtl compare multidigits            (the arms at the end of this file, side by side)
Override: --model.balancer pcgrad       --model.tasks [left,right]       --trainer.max_epochs 5
          --model.level features        --seed_everything 1              --trainer.devices 2
          --data.shuffle [rec]          (reconstruct another sample's picture: the control arm)
          W&B: --trainer.logger WandbLogger --trainer.logger.project multidigits --trainer.logger.offline true
Expect:   10 to 20 seconds on one core. Test, five seeds, mean ± sd: accuracy of the two classifiers, error of rec:
          single task 91.6 ± 0.8 %, 0.033     equal 57.6 ± 5.0 %, 0.033        pcgrad 67.6 ± 5.5 %, 0.032
          equal without rec 89.1 ± 1.1 %      uncertainty 79.1 ± 6.0 %, 0.044  gradnorm 85.9 ± 2.4 %, 0.043
Data:     scikit-learn's digits (1797 images of 8x8, part of scikit-learn). Images are split before pairs are
          composed, so no test pair holds a training image. Writers are not recorded, so the splits share them.
"""

import math
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.cli import LightningCLI
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_mtl import MultiTaskModule
from lightning_mtl.balancers import Balancer
from lightning_mtl.cli.comparison import Change, Comparison, Curves, Results
from lightning_mtl.cli.recipe_cli import RecipeCLI
from lightning_mtl.tasks import ClassificationTask, ReconstructionTask

DIGIT, CANVAS, FEATURES = 8, 12, 32


# The data


def compose(digits: Tensor, labels: Tensor, pairs: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw pairs with replacement and lay them on a canvas, the brighter pixel on top where they overlap.

    Shapes: digits ``[n, 8, 8]``, labels ``[n]`` -> input and rec ``[pairs, 1, 12, 12]``, left and right ``[pairs]``.
    """
    left, right = torch.randint(len(digits), (2, pairs), generator=generator)
    shift = torch.randint(2, (4, pairs), generator=generator)
    far = CANVAS - DIGIT
    canvas = torch.maximum(
        place(digits[left], shift[0], shift[1]), place(digits[right], far - shift[2], far - shift[3])
    )
    picture = canvas.unsqueeze(1)
    return {"input": picture, "left": labels[left], "right": labels[right], "rec": picture}


def place(digits: Tensor, top: Tensor, start: Tensor) -> Tensor:
    """Each digit with its upper left corner at (top, start) of an empty canvas: ``[n, 8, 8] -> [n, 12, 12]``."""
    canvas = torch.zeros(len(digits), CANVAS, CANVAS)
    sample = torch.arange(len(digits))[:, None, None]
    row = (top[:, None] + torch.arange(DIGIT))[:, :, None]
    column = (start[:, None] + torch.arange(DIGIT))[:, None, :]
    canvas[sample, row, column] = digits
    return canvas


class Pairs(Dataset[dict[str, Tensor]]):
    """Samples held as one tensor per column, so that a whole batch is one indexing operation per column."""

    def __init__(self, columns: dict[str, Tensor]) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns["input"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self.columns.items()}

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """What the loader calls for a batch: ``B`` indices -> columns of ``B`` rows."""
        return {name: column[indices] for name, column in self.columns.items()}


def as_it_is(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Collate nothing: :class:`Pairs` hands out whole batches."""
    return batch


class DigitPairs(L.LightningDataModule):
    """Pairs of digits; training, validation and test pairs are composed from disjoint sets of images.

    Args:
        batch_size: samples per step, on each device.
        train_pairs: how many composites to draw from the training images.
        val_pairs: the same for validation.
        test_pairs: the same for the test.
        shuffle: tasks whose training targets are given to other samples: what they could teach is gone, their loss
            and their gradients are still there. Validation and test keep theirs.
        seed: of the split, the composition and the order of the training batches; follows ``seed_everything``.
    """

    def __init__(
        self,
        batch_size: int = 128,
        train_pairs: int = 6000,
        val_pairs: int = 1000,
        test_pairs: int = 2000,
        shuffle: Sequence[Literal["left", "right", "rec"]] = (),
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.batch_size, self.shuffle, self.seed = batch_size, shuffle, seed
        self.pairs = {"train": train_pairs, "val": val_pairs, "test": test_pairs}
        self.datasets: dict[str, Pairs] = {}

    def setup(self, stage: str) -> None:
        if self.datasets:
            return
        bunch = load_digits()
        digits = torch.as_tensor(bunch.images / 16, dtype=torch.float32)
        labels = torch.as_tensor(bunch.target, dtype=torch.long)
        generator = torch.Generator().manual_seed(self.seed)
        for name, images in split(labels, self.seed).items():
            self.datasets[name] = Pairs(compose(digits[images], labels[images], self.pairs[name], generator))
        # An own generator: the other targets, and the other splits, are the same with and without.
        order = torch.randperm(self.pairs["train"], generator=torch.Generator().manual_seed(self.seed))
        columns = self.datasets["train"].columns
        self.datasets["train"] = Pairs(columns | {name: columns[name][order] for name in self.shuffle})

    def state_dict(self) -> dict[str, int]:
        return {"seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        if state_dict["seed"] != self.seed:
            raise ValueError(
                f"DigitPairs: `seed` must be {state_dict['seed']}, by which the checkpoint's images were split, got "
                f"{self.seed}. Pass --seed_everything {state_dict['seed']}: another split tests on training images."
            )

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        # An own generator: the order of the batches does not depend on how many numbers the model's init drew.
        generator = torch.Generator().manual_seed(self.seed)
        return self._loader("train", shuffle=True, drop_last=True, generator=generator)

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return self._loader("test")

    def _loader(self, name: str, **options: object) -> DataLoader[dict[str, Tensor]]:
        return DataLoader(self.datasets[name], batch_size=self.batch_size, collate_fn=as_it_is, **options)


def split(labels: Tensor, seed: int) -> dict[str, Tensor]:
    """Indices of the images of each split, 60/20/20 in every class: ``[1797] -> [1078], [359], [360]``."""
    train, rest = train_test_split(torch.arange(len(labels)), test_size=0.4, stratify=labels, random_state=seed)
    val, test = train_test_split(rest, test_size=0.5, stratify=labels[rest], random_state=seed)
    return {"train": train, "val": val, "test": test}


# The model


class MultiDigits(MultiTaskModule):
    """A small convolutional encoder with up to three linear heads.

    Args:
        balancer: how the task gradients are combined: a name ("pcgrad"), or a class with its options.
        tasks: which heads to train. With one name this is a single-task model with the same encoder.
        level: where task gradients are taken: at the encoder's "parameters", or at its "features".
        lr: peak of the one-cycle schedule.
        balancer_lr: constant rate of the parameters that belong to the balancer (uncertainty's).
    """

    def __init__(
        self,
        balancer: Callable[[int], Balancer] | str = "fixed",
        tasks: Sequence[Literal["left", "right", "rec"]] = ("left", "right", "rec"),
        level: Literal["parameters", "features"] = "parameters",
        lr: float = 2e-3,
        balancer_lr: float = 0.025,
    ) -> None:
        encoder = nn.Sequential(  # [B, 1, 12, 12] -> [B, 32]
            nn.Conv2d(1, 12, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(12, 24, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(24 * 3 * 3, FEATURES),
            nn.ReLU(),
        )
        every_task = {
            "left": ClassificationTask(nn.Linear(FEATURES, 10), num_classes=10),
            "right": ClassificationTask(nn.Linear(FEATURES, 10), num_classes=10),
            # A sum over pixels, as in most autoencoders: its scale is what the balancers have to cope with.
            "rec": ReconstructionTask(nn.Linear(FEATURES, CANVAS**2), "sum", target="rec", role="auxiliary"),
        }
        super().__init__(encoder, {name: every_task[name] for name in tasks}, balancer, level)
        self.encoder.to(memory_format=torch.channels_last)  # same numbers, 40 % less time on a CPU
        self.save_hyperparameters()
        self.lr, self.balancer_lr = lr, balancer_lr

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.Adam(self.parameter_groups(), lr=self.lr)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=self.lr, total_steps=int(self.trainer.estimated_stepping_batches)
        )
        # The first group is the model's. Weights that a balancer learns keep one rate: with the slow start of the
        # cycle they would stay near 1 while the encoder is formed.
        for group in optimizer.param_groups[1:]:
            group.update(dict.fromkeys(("lr", "initial_lr", "max_lr", "min_lr"), self.balancer_lr))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main(args: Sequence[str] | None = None) -> LightningCLI:
    """The command line of this recipe; returns it, with its trainer and model, when it is done."""
    return RecipeCLI(__file__, MultiDigits, DigitPairs, trainer_defaults={"max_epochs": 20}, args=args)


# The comparison: lightning-mtl compare multidigits

CLASSIFIERS = ("left/accuracy", "right/accuracy")
BALANCERS = ("uncertainty", "pcgrad", "gradnorm")
BY_HAND = """--model.balancer=fixed --model.balancer.weights='{"rec": 0.03}'"""
COSINES = {
    "balance/cosine/left/right": "left and right",
    "balance/cosine/left/rec": "left and rec",
    "balance/cosine/right/rec": "right and rec",
}


def reading(results: Results) -> list[str]:
    """What the table says: points are percentage points of the two classifiers' mean accuracy."""

    def change(arm: str, other: str) -> Change:
        return results.change(arm, other, CLASSIFIERS)

    two = change("equal without rec", "single task")
    best = max(BALANCERS, key=lambda arm: change(arm, "equal").mean)
    hand = change("rec x 0.03", best)
    top = max((arm for arm in results.arms if arm != "single task"), key=lambda arm: change(arm, "single task").mean)
    shared = change(top, "single task")
    taught = change("equal", "equal, rec shuffled"), change("rec x 0.03", "rec x 0.03, shuffled")
    regularised = change("rec x 0.03", "equal without rec")
    repaired = "; ".join(f"{arm} {change(arm, 'equal')}" for arm in BALANCERS)
    error = {arm: fmean(results.of(arm, "rec/mse")) for arm in ("single task", "equal", best)}
    opposed = {label: results.curve("pcgrad", key)[1] for key, label in COSINES.items()}
    return [
        f"Two classifiers of equal weight on one encoder, against a net each: {two}. "
        + ("They interfere here." if two.mean < 0 else "No interference here."),
        f"PCGrad in place of their sum: {change('pcgrad without rec', 'equal without rec')}.",
        f"A third loss, summed over 144 pixels, equal weights: {change('equal', 'equal without rec')}.",
        f"The same, against rec with other samples' pictures: {taught[0]}; at weight 0.03: {taught[1]}.",
        f"Rec as a regulariser, at weight 0.03, against none: {regularised}. "
        + ("It helps here." if regularised.mean > 1 else "It is not shown to help."),
        f"Balancers against equal weights, three tasks: {repaired}.",
        f"A weight set by hand (rec x 0.03), against the best of them, {best}: {hand}. "
        + ("Balancing is not shown to beat tuning." if hand.mean >= 0 else "This weight is not the best one."),
        f"The best shared encoder, {top}, against single tasks: {shared}. "
        + ("None is better here." if shared.mean <= 0 else "Sharing helps here."),
        "Reconstruction error: " + ", ".join(f"{arm} {value:.4f}" for arm, value in error.items()) + ".",
        "Logged steps in which two gradients oppose each other, pcgrad: "
        + ", ".join(f"{label} {percent_below_zero(cosines):.0f} %" for label, cosines in opposed.items())
        + ".",
    ]


def percent_below_zero(values: Sequence[float]) -> float:
    """NaN for an empty sequence."""
    return 100 * fmean(value < 0 for value in values) if values else math.nan


COMPARE = Comparison(
    arms={
        "single task": ["--model.tasks=[left]", "--model.tasks=[right]", "--model.tasks=[rec]"],
        "equal without rec": ["--model.tasks=[left,right]"],
        "pcgrad without rec": ["--model.tasks=[left,right] --model.balancer=pcgrad"],
        "equal": [""],
        "equal, rec shuffled": ["--data.shuffle=[rec]"],
        "rec x 0.03": [BY_HAND],
        "rec x 0.03, shuffled": [f"{BY_HAND} --data.shuffle=[rec]"],
        "uncertainty": ["--config=multidigits_uncertainty"],
        "pcgrad": ["--config=multidigits_pcgrad"],
        "gradnorm": ["--config=multidigits_gradnorm"],
    },
    scores={"left/accuracy": True, "right/accuracy": True, "rec/mse": False},
    base="single task",
    reading=reading,
    curves=[
        Curves(
            title="Do the tasks pull the encoder apart? Run: pcgrad, three tasks",
            label="cosine of task gradients\n(below 0: conflict)",
            arm="pcgrad",
            keys=COSINES,
        )
    ],
)


if __name__ == "__main__":
    main()
