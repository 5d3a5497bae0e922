"""Six yes-or-no labels of one digit: what one shared net learns, what six nets do, and what a missing label is.

Run:      lightning-mtl run digit_attributes
          lightning-mtl run digit_attributes --as multiclass     the digit itself: labels of which exactly one holds
          lightning-mtl run digit_attributes fit                 one such net, by the library, under the Trainer
          lightning-mtl run digit_attributes --config digit_attributes_missing
Override: --seeds 10     --steps 100     --out docs/images/digit_attributes.png       (the comparison)
          fit --model.balancer pcgrad    fit --data.observed 0.5     fit --trainer.devices 2      (the Trainer)
Expect:   a minute on one core. Rows with all six answers right, 30 seeds, mean ± sd, with all labels of 300 rows:
          one net of 32 units 79.6 ± 3.1 %     six nets of 5 units 71.4 ± 3.1 %     six nets of 32 units 77.9 ± 3.2 %;
          with a tenth of the labels of 600: 50.6 ± 6.8 %, 45.2 ± 6.5 %, 49.4 ± 6.6 %; missing taken for no: 0.2 ± 0.3 %
          Labels that correct each other (CorNet): 78.6 ± 4.3 % and 51.0 ± 6.6 %, no gain over a net of as many weights
Data:     scikit-learn's digits (1797 images of 8x8, part of scikit-learn). Writers are not recorded, so the rows of
          training and test share them.

The comparison trains all seeds of an arm as one network (`_lab.seeds`), without the Trainer. `fit` is how to do it with
the library: a `MultiLabelTask` split into one task per label, so that a balancer sees each label's gradient.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from _lab import report
from _lab.attributes import ANSWERS, ATTRIBUTES, digits, label_losses
from _lab.seeds import SeedMLP, fit
from _lab.stats import mean_sd, paired
from lightning_mtl import MultiTaskModule
from lightning_mtl.balancers import Balancer
from lightning_mtl.cli.recipe_cli import RecipeCLI
from lightning_mtl.tasks import MultiLabelTask

PIXELS, WIDTH, VAL, TEST = 64, 32, 200, 600
BLOCK, WIDER = 16, 35  # units of a CorNet block; 35 hidden units instead make as many weights, but for one
SETTINGS = {"300 rows, every label": (300, 1.0), "600 rows, one label in ten": (600, 0.1)}

Scores = dict[str, dict[str, Tensor]]  # arm -> score -> a value per seed [S]


# The data


@dataclass
class Split:
    """Rows of ``S`` seeds: input ``[S, N, 64]``, digit ``[S, N]``, labels ``[S, N, K]``, NaN where one is missing."""

    input: Tensor
    digit: Tensor
    labels: Tensor


def draw(
    seeds: Sequence[int], rows: int, observed: float, answers: Tensor = ANSWERS, whole: bool = False
) -> dict[str, Split]:
    """Disjoint rows for training, validation and test, drawn anew for each seed.

    Args:
        seeds: ``S`` of them.
        rows: of training.
        observed: the probability of a label in training; validation, which only says when to stop, is complete.
        answers: the labels of each digit, ``[10, K]``.
        whole: whether a row has all its labels or none.
    """
    images, names = digits()
    parts: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {"train": [], "val": [], "test": []}
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(images), generator=generator)[: rows + VAL + TEST]
        for part, index in zip(parts, order.split([rows, VAL, TEST]), strict=True):
            labels = answers[names[index]]
            chance = torch.rand(len(index), 1 if whole else labels.shape[1], generator=generator)
            missing = chance >= (observed if part == "train" else 1.0)
            parts[part].append((images[index], names[index], labels.masked_fill(missing, torch.nan)))
    return {part: Split(*map(torch.stack, zip(*drawn, strict=True))) for part, drawn in parts.items()}


def zero_filled(data: Mapping[str, Split]) -> dict[str, Split]:
    """The mistake: what is not known is taken for a no.

    Without validation rows, so that the last step counts: true labels would keep the untrained net.
    """
    train = data["train"]
    return {"train": Split(train.input, train.digit, train.labels.nan_to_num(0.0)), "test": data["test"]}


# The comparison


def digit_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """One softmax over all labels of a row: ``[S, N, K]`` twice, one of them 1 or all missing -> ``[S, 1]``."""
    there = ~labels.isnan().any(-1)
    losses = -(logits.log_softmax(-1) * labels.nan_to_num(0.0)).sum(-1) * there
    return (losses.sum(1) / there.sum(1).clamp(min=1)).unsqueeze(1)


class SeedCorNet(nn.Module):
    """S networks with a block of ``lightning_mtl.tasks.CorNet`` on their logits: ``[S, N, 64] -> [S, N, K]``."""

    def __init__(self, net: SeedMLP, seeds: int, labels: int, random: torch.Generator) -> None:
        super().__init__()
        self.net = net
        self.block = SeedMLP(seeds, labels, BLOCK, labels, random=random, activation=nn.ELU)
        for parameter in self.block[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.net(x)
        return logits + self.block(logits.sigmoid())


def learn(
    data: Mapping[str, Split],
    width: int,
    separate: bool,
    steps: int,
    losses: Callable[[Tensor, Tensor], Tensor] = label_losses,
    correlated: bool = False,
) -> Tensor:
    """Train one net per seed, or one per seed and label; each is read at its best step on validation, if there is any.

    If ``correlated``, the labels of a net correct each other.

    Returns: the test rows' logits, ``[S, N, K]``.
    """
    seeds, _, labels = data["train"].labels.shape

    def seen(part: Split) -> tuple[Tensor, Tensor]:
        if not separate:
            return part.input, part.labels
        return part.input.repeat_interleave(labels, 0), part.labels.movedim(2, 1).flatten(0, 1).unsqueeze(2)

    x, y = labelled_first(*seen(data["train"]))
    x_val, y_val = seen(data.get("val", data["test"]))
    x_test, _ = seen(data["test"])
    random = torch.Generator().manual_seed(0)
    net: nn.Module = SeedMLP(len(x), PIXELS, width, y.shape[2], random=random, activation=nn.ReLU)
    if correlated:
        net = SeedCorNet(net, len(x), y.shape[2], random)

    def loss() -> Tensor:
        return losses(net(x), y).sum(1)

    def validate() -> Tensor:
        return losses(net(x_val), y_val).sum(1)

    fit(net, loss, steps, lr=0.01, validate=validate if "val" in data else None, every=20)
    with torch.no_grad():
        logits = net(x_test)
    return logits if not separate else logits.view(seeds, labels, -1).transpose(1, 2)


def labelled_first(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Rows without any label moved to the end and, as far as every seed has them, cut off: the same losses sooner."""
    idle = y.isnan().all(2)
    rows = idle.int().argsort(dim=1, stable=True)[:, : int((~idle).sum(1).max())].unsqueeze(2)
    return x.gather(1, rows.expand(-1, -1, x.shape[2])), y.gather(1, rows.expand(-1, -1, y.shape[2]))


def scores(said: Tensor, digit: Tensor) -> dict[str, Tensor]:
    """Answers ``[S, N, 6]`` and the digits ``[S, N]`` -> a value per seed, ``[S]`` each.

    ``hamming``: share of wrong answers. ``subset``: share of rows with all six right. ``macro F1``: mean over labels.
    """
    true = ANSWERS[digit].bool()
    both, either = (said & true).sum(1), said.sum(1) + true.sum(1)
    return {
        "hamming": (said != true).float().mean((1, 2)),
        "subset": (said == true).all(2).float().mean(1),
        "macro F1": (2 * both / either.clamp(min=1)).mean(1),
    }


def multilabel(seeds: Sequence[int], rows: int, observed: float, steps: int) -> Scores:
    """Six labels: one shared net, six nets, and six nets with no more units in all than the shared one."""
    data = draw(seeds, rows, observed)
    arms = {
        "six nets of 32": (data, WIDTH, True),
        "six nets of 5": (data, WIDTH // len(ATTRIBUTES), True),
        "one net of 32": (data, WIDTH, False),
        "one net of 35": (data, WIDER, False),
        "one net of 32, CorNet": (data, WIDTH, False),
    }
    if observed < 1:
        arms["one net of 32, missing = no"] = (zero_filled(data), WIDTH, False)
    digit = data["test"].digit
    return {
        arm: scores(learn(*settings, steps, correlated="CorNet" in arm) > 0, digit) for arm, settings in arms.items()
    }


def multiclass(seeds: Sequence[int], rows: int, observed: float, steps: int) -> Scores:
    """Ten labels of which exactly one holds; the six answers are those of the digit with the highest output."""
    data = draw(seeds, rows, observed, torch.eye(10), whole=True)
    found = {
        "ten nets of 3, yes or no": learn(data, WIDTH // 10, True, steps),
        "one net of 32, yes or no": learn(data, WIDTH, False, steps),
        "one net of 32, softmax": learn(data, WIDTH, False, steps, digit_losses),
    }
    return {arm: scores(ANSWERS[logits.argmax(2)].bool(), data["test"].digit) for arm, logits in found.items()}


PAIRS = {  # which arms the reading sets against each other
    "multilabel": [
        ("one net of 32", "six nets of 5"),
        ("one net of 32", "six nets of 32"),
        ("one net of 32, CorNet", "one net of 32"),
        ("one net of 32, CorNet", "one net of 35"),
        ("one net of 32", "one net of 32, missing = no"),
    ],
    "multiclass": [
        ("one net of 32, softmax", "one net of 32, yes or no"),
        ("one net of 32, softmax", "ten nets of 3, yes or no"),
    ],
}


TESTS = ("first against second", "subset", "better in", "p", "hamming", "better in", "p")


def tests(arms: Scores, pairs: Sequence[tuple[str, str]]) -> list[list[str]]:
    """One row per pair of arms that are both there, with the columns ``TESTS``."""
    rows = []
    for first, second in pairs:
        if second in arms:
            row = [f"{first} against {second}"]
            for score in ("subset", "hamming"):
                test = paired(arms[first][score], arms[second][score], "high" if score == "subset" else "low")
                row += [f"{100 * test.gain:+.1f}", f"{test.wins}/{test.seeds}", f"{test.p:.0e}"]
            rows.append(row)
    return rows


def digit_attributes(
    kind: Literal["multilabel", "multiclass"] = "multilabel", seeds: int = 30, steps: int = 200, out: Path | None = None
) -> dict[str, Scores]:
    """Compare the arms on all labels and on one in ten; print tables and tests, draw the subset accuracy.

    Args:
        kind: the six labels, or the digit that they follow from.
        seeds: how many; each has its own rows and its own initial weights.
        steps: of Adam, on all rows at once.
        out: a further place for the figure.
    """
    started = time.perf_counter()
    torch.set_num_threads(1)
    study = multilabel if kind == "multilabel" else multiclass
    found = {title: study(range(seeds), *setting, steps) for title, setting in SETTINGS.items()}
    console = report.console()
    figure, panels = report.panels(len(found), f"Rows with all six answers right, {seeds} seeds (bar: mean)")
    for axes, (title, arms) in zip(panels, found.items(), strict=True):
        rows = [[arm, *(mean_sd(values) for values in score.values())] for arm, score in arms.items()]
        console.print(report.table(title, ["arm", "hamming", "subset", "macro F1"], rows))
        compared = "Wilcoxon signed-rank over seeds; in points, plus is better"
        console.print(report.table(compared, TESTS, tests(arms, PAIRS[kind])))
        names = {arm.replace(", ", ",\n").replace(" of ", "\nof "): score["subset"] for arm, score in arms.items()}
        report.dots(axes, names, "subset accuracy")
        axes.set_title(title, loc="left", fontsize=10)
    means = {
        f"{title}/{arm}/{name}": float(values.mean())
        for title, arms in found.items()
        for arm, score in arms.items()
        for name, values in score.items()
    }
    folder = report.log("digit_attributes", means)
    for title, arms in found.items():
        file = folder / f"{title.partition(' ')[0]}_rows_subset.csv"
        report.write(file, {arm: score["subset"] for arm, score in arms.items()})
    report.save(figure, folder / "subset.png", out)
    console.print(f"figure   {folder / 'subset.png'}\nnumbers  {folder}\n{time.perf_counter() - started:.0f} s in all")
    return found


# The same by the library


def as_batch(rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
    """Rows -> input ``[B, 64]`` and the targets of all labels ``[B, 6]``."""
    images, labels = zip(*rows, strict=True)
    return torch.stack(images), {"attributes": torch.stack(labels)}


class DigitRows(L.LightningDataModule):
    """Digits with their six answers, of which some are missing (NaN).

    Args:
        batch_size: rows per step, on each device.
        rows: of training; there are 200 of validation and 600 of test.
        observed: the probability of a label in training.
        seed: of the rows and of what is missing; follows ``seed_everything``.
    """

    def __init__(self, batch_size: int = 60, rows: int = 600, observed: float = 0.1, seed: int = 0) -> None:
        super().__init__()
        self.batch_size, self.rows, self.observed, self.seed = batch_size, rows, observed, seed
        self.datasets: dict[str, TensorDataset] = {}

    def setup(self, stage: str) -> None:
        for name, part in draw([self.seed], self.rows, self.observed).items():
            self.datasets[name] = TensorDataset(part.input[0], part.labels[0])

    def train_dataloader(self) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(self.seed)
        return self._loader("train", shuffle=True, generator=generator)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        return self._loader("test")

    def _loader(self, name: str, **options: Any) -> DataLoader[Any]:
        return DataLoader(self.datasets[name], batch_size=self.batch_size, collate_fn=as_batch, **options)


class DigitAttributes(MultiTaskModule):
    """One hidden layer for six labels, each of them a task.

    Args:
        balancer: how the labels' gradients are combined: a name ("pcgrad"), or a class with its options.
        level: where they are taken: at the "parameters", or at the encoder's "features".
        lr: of Adam.
    """

    def __init__(
        self,
        balancer: Callable[[int], Balancer] | str = "fixed",
        level: Literal["parameters", "features"] = "parameters",
        lr: float = 5e-3,
    ) -> None:
        encoder = nn.Sequential(nn.Linear(PIXELS, WIDTH), nn.ReLU())
        labels = MultiLabelTask(nn.Linear(WIDTH, len(ATTRIBUTES)), list(ATTRIBUTES))
        super().__init__(encoder, labels.per_label("attributes"), balancer, level)
        self.save_hyperparameters()
        self.lr = lr

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameter_groups(lr=self.lr), lr=self.lr)


# The command line


def main(args: Sequence[str] | None = None) -> LightningCLI | dict[str, Scores]:
    """The comparison, or LightningCLI if a subcommand or a config is given."""
    words = list(sys.argv[1:] if args is None else args)
    if words and (words[0] in ("fit", "validate", "test", "predict") or words[0].startswith("--config")):
        return RecipeCLI(__file__, DigitAttributes, DigitRows, trainer_defaults={"max_epochs": 20}, args=words)
    parser = ArgumentParser(prog="digit_attributes.py", description=digit_attributes.__doc__)
    parser.add_argument(
        "--as",
        type=Literal["multilabel", "multiclass"],
        default="multilabel",
        help="The six labels, or the digit that they follow from.",
    )
    parser.add_function_arguments(digit_attributes, skip={"kind"}, as_group=False)
    options = parser.parse_args(words).as_dict()
    return digit_attributes(kind=options.pop("as"), **options)


if __name__ == "__main__":
    main()
