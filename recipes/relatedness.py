"""Which tasks are related: three definitions and a control, each with the shuffle test, the cosine and the gain.

Run:      lightning-mtl run relatedness
Override: --seeds 48                                             more networks
          --flipped 0.2                                          noisier copies of an answer: no gain from them
          --seed 1                                               other data and other networks
          --out docs/images/relatedness.png                      the figure there too
Expect:   about a minute on one core. Gain of the main task's test error, 24 seeds, on made data and on digits:
          the same function +23 %, +17 %    other aspects of one input +16 %, +25 %    helpful +69 %, +9 %
          unrelated -4 % (p 0.2), +5 % (p 0.02). The cosine of the gradients is not shown to foretell it.
Source:   R. Caruana, Multitask learning, Machine Learning 28, 1997, on what related tasks are and on the shuffle test.
Data:     made by the recipe, and scikit-learn's digits (1797 images of 8x8, part of scikit-learn). Writers are not
          recorded, so the rows of training and test share them.

All seeds of an arm are one network with a further dimension (`_lab.seeds`), so many cost little more than one.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jsonargparse import auto_cli
from rich.table import Table
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize

from _lab import report
from _lab.attributes import ANSWERS, ATTRIBUTES, digits, label_losses
from _lab.seeds import SeedMLP, fit, shuffled
from _lab.stats import Paired, mean_sd, paired

EVERY = 10  # steps between two looks at the cosine
COLUMNS = ("alone", "joint", "shuffled", "early cosine", "cosine")
SAME, ASPECTS, HELPFUL, CONTROL = "same function", "other aspects", "helpful", "control"


# The cases


@dataclass(frozen=True)
class World:
    """A main task, and the nets that learn it.

    Args:
        x: split -> ``[S, N, d]``. With a split "val" a net is read at its best step there, else at the last.
        main: split -> the main task's targets ``[S, N]``, NaN where one is missing; the test's are without noise.
        numbers: whether targets are numbers, or answers 0 and 1.
        head: the hidden layers of each head.
    """

    x: dict[str, Tensor]
    main: dict[str, Tensor]
    numbers: bool
    hidden: int
    head: tuple[int, ...]
    steps: int
    lr: float


Cases = dict[str, tuple[World, Tensor]]  # name -> the main task's world, and the helpers' targets in training [S, N, K]


def regressions(seeds: int, random: torch.Generator) -> Cases:
    """Mixtures of two hidden features of the first five inputs of ten, plus noise as large.

    Seven helpers: the main task's own mixture with other noise; other mixtures; mixtures of features of other inputs.
    """
    sizes = {"train": 60, "val": 100, "test": 1000}
    x = {part: torch.randn(seeds, rows, 10, generator=random) for part, rows in sizes.items()}
    features, foreign = (1.5 * normalize(torch.randn(seeds, 5, 2, generator=random), dim=1) for _ in range(2))
    mix = 1.5 * normalize(torch.randn(seeds, 2, 8, generator=random), dim=1)

    def noisy(clean: Tensor) -> Tensor:
        return clean + torch.randn(clean.shape, generator=random)

    own = {part: torch.tanh(rows[..., :5] @ features) @ mix for part, rows in x.items()}
    main = {part: clean[..., 0] if part == "test" else noisy(clean[..., 0]) for part, clean in own.items()}
    world = World(x, main, numbers=True, hidden=16, head=(), steps=500, lr=0.01)
    return {
        f"{SAME}, made": (world, noisy(own["train"][..., :1].expand(-1, -1, 7))),
        f"{ASPECTS}, made": (world, noisy(own["train"][..., 1:])),
        f"{CONTROL}, made": (world, noisy(torch.tanh(x["train"][..., 5:] @ foreign) @ mix[..., 1:])),
    }


def parities(seeds: int, random: torch.Generator) -> Cases:
    """The main task is the sign of x0 x1 x2, its helper's that of x0 x1.

    They agree on one half of all rows, so knowing one says nothing about the other; but one is a step to the other.
    """
    sizes = {"train": 150, "val": 150, "test": 1000}
    x = {part: torch.randint(2, (seeds, rows, 12), generator=random) * 2.0 - 1 for part, rows in sizes.items()}
    main = {part: (rows[..., :3].prod(-1) > 0).float() for part, rows in x.items()}
    helper = (x["train"][..., :2].prod(-1, keepdim=True) > 0).float()
    return {f"{HELPFUL}, made": (World(x, main, numbers=False, hidden=32, head=(16,), steps=800, lr=0.005), helper)}


def pictures(seeds: int, flipped: float, random: torch.Generator) -> Cases:
    """Two digits side by side. Has the left one a loop? Forty rows of 300 say so; the helpers have all 300.

    Five helpers: the same answer, but some of them wrong; other questions about the left digit; or about the right.
    The helpful case has another main task: is the sum of the two odd? Its helper asks whether the left one is even.
    """
    images, names = digits()
    places = torch.stack([torch.randperm(len(images), generator=random)[:1796] for _ in range(seeds)])
    pairs = dict(zip(("train", "test"), places.view(seeds, -1, 2).split([300, 598], 1), strict=True))
    x = {part: images[pair].flatten(2) for part, pair in pairs.items()}
    answers = {part: ANSWERS[names[pair]] for part, pair in pairs.items()}  # [S, N, 2, 6]
    loop, even = (list(ATTRIBUTES).index(name) for name in ("loop", "even"))
    rest = [place for place in range(len(ATTRIBUTES)) if place != loop]
    main = {part: answer[:, :, 0, loop].clone() for part, answer in answers.items()}
    main["train"][:, 40:] = torch.nan
    odd = {part: (answer[..., 0, even] != answer[..., 1, even]).float() for part, answer in answers.items()}
    same = answers["train"][:, :, 0, loop, None].expand(-1, -1, len(rest))
    wrong = torch.rand(same.shape, generator=random) < flipped
    questions = World(x, main, numbers=False, hidden=32, head=(), steps=300, lr=0.005)
    sums = World(x, odd, numbers=False, hidden=32, head=(16,), steps=300, lr=0.005)
    return {
        f"{SAME}, digits": (questions, torch.where(wrong, 1 - same, same)),
        f"{ASPECTS}, digits": (questions, answers["train"][:, :, 0, rest]),
        f"{HELPFUL}, digits": (sums, answers["train"][:, :, 0, even, None]),
        f"{CONTROL}, digits": (questions, answers["train"][:, :, 1, rest]),
    }


# Training


class Shared(nn.Module):
    """A shared layer, and a head per task: ``[S, N, d] -> [S, N, K]``."""

    def __init__(self, world: World, tasks: int, random: torch.Generator) -> None:
        super().__init__()
        seeds, _, inputs = world.x["train"].shape
        self.trunk = SeedMLP(seeds, inputs, world.hidden, random=random)
        self.heads = nn.ModuleList(
            SeedMLP(seeds, world.hidden, *world.head, 1, random=random, activation=nn.ReLU) for _ in range(tasks)
        )

    def forward(self, x: Tensor) -> Tensor:
        features = torch.relu(self.trunk(x))
        return torch.cat([head(features) for head in self.heads], -1)


def train(world: World, helpers: Tensor | None, seed: int) -> tuple[Tensor, Tensor]:
    """One net per seed, of the same first weights with and without helpers; each task's mean loss counts once.

    Returns: the main task's test error ``[S]``, squared or the share of wrong answers; and during training the cosine
    of the main task's gradient at the shared layer with the sum of the helpers', ``[looks, S]``.
    """
    x, y = world.x["train"], world.main["train"].unsqueeze(-1)
    y = y if helpers is None else torch.cat([y, helpers], -1)
    net = Shared(world, y.shape[-1], torch.Generator().manual_seed(seed))
    cosines: list[Tensor] = []
    step = 0

    def each(output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().mean(1) if world.numbers else label_losses(output, target)

    def losses() -> Tensor:
        nonlocal step
        found = each(net(x), y)
        if helpers is not None and step % EVERY == 0:
            cosines.append(cosine(found, list(net.trunk.parameters())))
        step += 1
        return found.sum(1)

    def validate() -> Tensor:
        return each(net(world.x["val"])[..., :1], world.main["val"].unsqueeze(-1)).squeeze(1)

    fit(net, losses, world.steps, world.lr, validate=validate if "val" in world.x else None)
    with torch.no_grad():
        said, truth = net(world.x["test"])[..., 0], world.main["test"]
    wrong = (said - truth).square() if world.numbers else ((said > 0) != (truth > 0)).float()
    return wrong.mean(1), torch.stack(cosines) if cosines else torch.empty(0, len(x))


def cosine(losses: Tensor, shared: Sequence[Tensor]) -> Tensor:
    """Of the first task's gradient with the sum of the others', per seed: losses ``[S, K]`` -> ``[S]``."""
    parts = (torch.autograd.grad(part.sum(), shared, retain_graph=True) for part in (losses[:, 0], losses[:, 1:]))
    main, others = (torch.cat([grad.flatten(1) for grad in part], 1) for part in parts)
    return cosine_similarity(main, others, dim=1)


# What came out


@dataclass(frozen=True)
class Found:
    """A case: test errors of its three arms ``[S]``, and the cosines ``[looks, S]`` of the joint one."""

    alone: Tensor
    joint: Tensor
    shuffled: Tensor
    cosine: Tensor

    @property
    def gain(self) -> Paired:
        """Against the main task alone."""
        return paired(self.joint, self.alone)

    @property
    def shuffle_test(self) -> Paired:
        """Against helpers whose targets belong to other rows."""
        return paired(self.joint, self.shuffled)

    @property
    def gains(self) -> Tensor:
        """In percent of the mean error alone, ``[S]``."""
        return 100 * (self.alone - self.joint) / self.alone.mean()

    @property
    def early(self) -> Tensor:
        """The cosine over the first tenth of training, ``[S]``."""
        return self.cosine[: max(1, len(self.cosine) // 10)].mean(0)


def measure(seeds: int, seed: int = 0, flipped: float = 0.1, only: Sequence[str] = ()) -> dict[str, Found]:
    """All cases, or those named, in the order of the definitions."""
    random = torch.Generator().manual_seed(seed)
    cases = regressions(seeds, random) | parities(seeds, random) | pictures(seeds, flipped, random)
    alone: dict[int, Tensor] = {}
    found = {}
    for kind in (SAME, ASPECTS, HELPFUL, CONTROL):
        for name in (f"{kind}, made", f"{kind}, digits"):
            if only and name not in only:
                continue
            world, helpers = cases[name]
            if id(world) not in alone:  # cases of one world have one main task
                alone[id(world)] = train(world, None, seed)[0]
            joint, cosines = train(world, helpers, seed)
            control, _ = train(world, shuffled(helpers, random), seed)
            found[name] = Found(alone[id(world)], joint, control, cosines)
    return found


def table(found: dict[str, Found], seeds: int) -> Table:
    """One row per case."""
    columns = ["case", "alone", "joint", "shuffled", "gain", "p", "shuffle\ntest p", "cosine,\nearly", "cosine,\nall"]
    rows = []
    for name, case in found.items():
        errors = [mean_sd(arm) for arm in (case.alone, case.joint, case.shuffled)]
        tests = [f"{case.gains.mean():+.0f}%", f"{case.gain.p:.0e}", f"{case.shuffle_test.p:.0e}"]
        rows.append([name, *errors, *tests, f"{case.early.mean():+.2f}", f"{case.cosine.mean():+.2f}"])
    return report.table(f"relatedness: test error of the main task, mean ±deviation over {seeds} seeds", columns, rows)


def reading(found: dict[str, Found]) -> list[str]:
    """The table in words, with its own numbers."""
    lines = []
    for name, case in found.items():
        gain = case.gain.verdict("gains", "loses", "no gain shown")
        shuffle = case.shuffle_test.verdict("related", "no relation shown", "no relation shown")
        lines.append(f"{name}: {gain} ({case.gain.wins} of {case.gain.seeds} seeds); by the shuffle test: {shuffle}")
    gains = torch.stack([case.gains for case in found.values()])
    for label, cosines in {
        "over the first tenth of training": torch.stack([case.early for case in found.values()]),
        "over all of training": torch.stack([case.cosine.mean(0) for case in found.values()]),
    }.items():
        across = spearmanr(cosines.mean(1), gains.mean(1))
        within = [spearmanr(c, g).statistic for c, g in zip(cosines, gains, strict=True)]
        lines.append(
            f"cosine {label} and gain, rank correlation: {across.statistic:+.2f} over the {len(found)} cases "
            f"(p {across.pvalue:.1g}), {min(within):+.2f} to {max(within):+.2f} over the seeds of a case"
        )
    return lines


def draw(found: dict[str, Found], file: Path, also: Path | None) -> None:
    """The gains of all seeds, and the mean gain of each case against its mean cosine."""
    figure, panels = report.panels(3, "Gain over the main task alone, percent of its mean error; below: mean by cosine")
    for axes, world in zip(panels, ("made", "digits"), strict=False):
        mine = {name.partition(",")[0].replace(" ", "\n"): case for name, case in found.items() if world in name}
        report.dots(axes, {name: case.gains for name, case in mine.items()}, "gain, percent")
        axes.axhline(0, color=report.GREY, linewidth=1, zorder=0)
        axes.set_title(world, loc="left", fontsize=10)
    axes = panels[2]
    for name, case in found.items():
        kind, _, world = name.partition(", ")
        marker, colour = "o" if world == "made" else "s", f"C{(SAME, ASPECTS, HELPFUL, CONTROL).index(kind)}"
        axes.plot(float(case.early.mean()), float(case.gains.mean()), marker, color=colour, label=name)
    legend = axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.1, 1.0), frameon=False)
    legend.set_in_layout(False)  # it stands where a fourth panel would
    axes.set_ylabel("mean gain, percent", fontsize=9)
    axes.set_xlabel("cosine, first tenth of training", fontsize=9)
    axes.locator_params(axis="x", nbins=5)
    axes.spines[["top", "right"]].set_visible(False)
    report.save(figure, file, also)


# The command line


def relatedness(seeds: int = 24, seed: int = 0, flipped: float = 0.1, out: Path | None = None) -> dict[str, Found]:
    """Measure all cases; print the table and what it says, draw it, write it down.

    Args:
        seeds: how many networks per arm.
        seed: of the data and the networks.
        flipped: the share of wrong answers among the noisy copies of an answer about digits.
        out: a further place for the figure.
    """
    started = time.perf_counter()
    torch.set_num_threads(1)
    found = measure(seeds, seed, flipped)
    columns = {}
    for name, case in found.items():
        values = case.alone, case.joint, case.shuffled, case.early, case.cosine.mean(0)
        columns |= zip((f"{name}/{what}" for what in COLUMNS), values, strict=True)
    folder = report.log("relatedness", {name: float(values.mean()) for name, values in columns.items()})
    report.write(folder / "seeds.csv", columns)
    draw(found, folder / "gains.png", out)
    console = report.console()
    console.print(table(found, seeds))
    console.print("\n".join(reading(found)))
    console.print(f"figure   {folder / 'gains.png'}\nnumbers  {folder / 'seeds.csv'}")
    console.print(f"{time.perf_counter() - started:.0f} s in all")
    return found


def main(args: Sequence[str] | None = None) -> dict[str, Found]:
    """The command line of this recipe; returns what was found."""
    return auto_cli(relatedness, args=None if args is None else list(args))


if __name__ == "__main__":
    main()
