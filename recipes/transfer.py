"""A trunk learned on five labels, and a sixth with few examples: from scratch, frozen, fine-tuned, or learned jointly.

Run:      lightning-mtl run transfer
Override: --targets [even,prime,ge5,loop,straight,mult3]     --seeds 10
          --out docs/images/transfer.png                     the figure there too
Expect:   50 seconds on one core. Accuracy with 20 labels, 30 seeds, mean ± sd:
          prime: scratch 81.2 ± 4.7 %  frozen trunk 88.4 ± 4.2 %  fine-tuned 85.4 ± 4.0 %  joint 85.9 ± 4.0 %
          loop:  scratch 76.8 ± 4.9 %  frozen trunk 86.0 ± 6.2 %  fine-tuned 82.5 ± 5.8 %  joint 83.3 ± 5.4 %
Data:     scikit-learn's digits (1797 images of 8x8, part of scikit-learn). 800 source rows, the target's rows and 600
          test rows are disjoint; writers are not recorded, so they share those.

All seeds of an arm are one network (`_lab.seeds`). With the Trainer: docs/transfer.md.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from jsonargparse import auto_cli
from torch import Tensor, nn

from _lab import report
from _lab.attributes import ANSWERS, ATTRIBUTES, digits, label_losses
from _lab.seeds import SeedLinear
from _lab.stats import mean_sd, paired

PIXELS, WIDTH, SOURCE, TEST = 64, 32, 800, 600
SIZES = (20, 60)
ARMS = ("scratch", "frozen, untrained", "frozen trunk", "fine-tuned", "joint")

Target = Literal["even", "prime", "ge5", "loop", "straight", "mult3"]
Rows = tuple[Tensor, Tensor]  # input [S, N, 64], labels [S, N, K]


def draw(seeds: Sequence[int], target: str) -> tuple[Rows, Rows, Rows]:
    """Disjoint rows for each seed: five labels of the source, and the target's label to learn from and to test."""
    images, names = digits()
    orders = [torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    parts = torch.stack(orders)[:, : SOURCE + max(SIZES) + TEST].split([SOURCE, max(SIZES), TEST], dim=1)
    column = list(ATTRIBUTES).index(target)
    others = [place for place in range(len(ATTRIBUTES)) if place != column]
    source, few, test = ((images[part], ANSWERS[names[part]]) for part in parts)
    return (source[0], source[1][..., others]), (few[0], few[1][..., [column]]), (test[0], test[1][..., [column]])


def descend(loss: Callable[[], Tensor], groups: list[dict], steps: int) -> None:
    """Adam for a fixed number of steps: twenty labels leave none to validate on."""
    optimizer = torch.optim.Adam(groups, weight_decay=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


class Net(nn.Module):
    """A trunk and a head for each seed: ``[S, N, 64] -> [S, N, outputs]``."""

    def __init__(self, seeds: int, outputs: int, random: torch.Generator) -> None:
        super().__init__()
        self.trunk = nn.Sequential(SeedLinear(seeds, PIXELS, WIDTH, random), nn.ReLU())
        self.head = SeedLinear(seeds, WIDTH, outputs, random)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x))

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Summed over labels and nets, which have nothing in common: ``[]``."""
        return label_losses(self(x), y).sum()


def batches(rows: int, size: int, random: torch.Generator) -> Callable[[], Tensor]:
    """Where the rows of the next batch stand, the same in all seeds."""
    return lambda: torch.randperm(rows, generator=random)[:size]


def source_net(source: Rows, seeds: int, steps: int) -> Net:
    """Trained on the five labels of the source rows."""
    random = torch.Generator().manual_seed(0)
    net, batch = Net(seeds, len(ATTRIBUTES) - 1, random), batches(SOURCE, 100, random)

    def loss() -> Tensor:
        rows = batch()
        return net.loss(source[0][:, rows], source[1][:, rows])

    descend(loss, [{"params": net.parameters(), "lr": 0.01}], steps)
    return net


def with_trunk(source: Net, few: Rows, steps: int, trunk_lr: float, trunk: bool = True) -> Net:
    """A new head for the target on the source's trunk, which moves at its own rate, or not at all (0)."""
    seeds = len(few[0])
    net = Net(seeds, 1, torch.Generator().manual_seed(1))
    if trunk:
        net.trunk.load_state_dict(source.trunk.state_dict())
    net.trunk.requires_grad_(trunk_lr != 0)
    groups = [{"params": net.head.parameters(), "lr": 0.01}]
    if trunk_lr:
        groups.append({"params": net.trunk.parameters(), "lr": trunk_lr})
    descend(lambda: net.loss(*few), groups, steps)
    return net


def joint_net(source: Rows, few: Rows, steps: int) -> Net:
    """All six labels at once; what a row has no label for is masked."""
    random = torch.Generator().manual_seed(2)
    seeds, count = few[0].shape[:2]
    labels = torch.full((seeds, SOURCE + count, len(ATTRIBUTES)), torch.nan)
    labels[:, :SOURCE, :-1], labels[:, SOURCE:, -1:] = source[1], few[1]
    inputs = torch.cat([source[0], few[0]], 1)
    net, batch = Net(seeds, len(ATTRIBUTES), random), batches(SOURCE, 100, random)
    own = torch.arange(SOURCE, SOURCE + count)

    def loss() -> Tensor:
        rows = torch.cat([batch(), own])
        return net.loss(inputs[:, rows], labels[:, rows])

    descend(loss, [{"params": net.parameters(), "lr": 0.01}], steps)
    return net


def accuracy(net: Net, test: Rows) -> Tensor:
    """Share of right answers to the target's question, the net's last output: ``[S]``."""
    with torch.no_grad():
        return ((net(test[0])[..., -1:] > 0) == test[1].bool()).float().mean((1, 2))


def study(target: str, seeds: int, steps: int) -> dict[int, dict[str, Tensor]]:
    """Number of labels -> arm -> test accuracy ``[S]``."""
    source, every, test = draw(range(seeds), target)
    learned, raw = source_net(source, seeds, steps), source_net(source, seeds, 0)
    found: dict[int, dict[str, Tensor]] = {}
    for size in SIZES:
        few = every[0][:, :size], every[1][:, :size]
        nets = {
            "scratch": with_trunk(learned, few, steps, trunk_lr=0.01, trunk=False),
            # The control: if it helped to have fewer weights to learn, it would help here too.
            "frozen, untrained": with_trunk(raw, few, steps, trunk_lr=0),
            "frozen trunk": with_trunk(learned, few, steps, trunk_lr=0),
            "fine-tuned": with_trunk(learned, few, steps, trunk_lr=0.001),
            "joint": joint_net(source, few, steps),
        }
        found[size] = {arm: accuracy(net, test) for arm, net in nets.items()}
    return found


def transfer(
    targets: Sequence[Target] = ("prime", "loop"), seeds: int = 30, steps: int = 300, out: Path | None = None
) -> dict[str, dict[int, dict[str, Tensor]]]:
    """Learn five labels, then the one that was held out, from 20 and from 60 rows; compare the arms.

    Args:
        targets: which labels are held out, one at a time.
        seeds: how many; each has its own rows and its own initial weights.
        steps: of Adam, on the source and on the target.
        out: a further place for the figure.
    """
    started = time.perf_counter()
    torch.set_num_threads(1)
    found: dict[str, dict[int, dict[str, Tensor]]] = {target: study(target, seeds, steps) for target in targets}
    rows, means = [], {}
    for target, sizes in found.items():
        for size, arms in sizes.items():
            cells = [f"{target}, {size} labels"]
            for arm, values in arms.items():
                test = paired(values, arms["scratch"], best="high")
                cells.append(mean_sd(values) + (f", {test.p:.0e} ({test.wins})" if arm != "scratch" else ""))
                means[f"{target}/{size}/{arm}"] = float(values.mean())
            rows.append(cells)
    console = report.console()
    console.width = max(console.width, 150)
    title = f"Test accuracy, {seeds} seeds; p against scratch (in how many seeds better)"
    console.print(report.table(title, ["held out", *ARMS], rows))
    folder = report.log("transfer", means)
    figure, panels = report.panels(len(found), f"A label that was held out, {SIZES[0]} examples of it, {seeds} seeds")
    for axes, (target, sizes) in zip(panels, found.items(), strict=True):
        report.dots(axes, {arm.replace(" ", "\n"): values for arm, values in sizes[SIZES[0]].items()}, "test accuracy")
        axes.set_title(target, loc="left", fontsize=10)
        for size, arms in sizes.items():
            report.write(folder / f"{target}_{size}.csv", arms)
    report.save(figure, folder / "transfer.png", out)
    console.print(
        f"figure   {folder / 'transfer.png'}\nnumbers  {folder}\n{time.perf_counter() - started:.0f} s in all"
    )
    return found


def main(args: Sequence[str] | None = None) -> dict[str, dict[int, dict[str, Tensor]]]:
    """The command line of this recipe; returns the accuracies."""
    return auto_cli(transfer, args=None if args is None else list(args))


if __name__ == "__main__":
    main()
