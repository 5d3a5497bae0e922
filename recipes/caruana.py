"""Why tasks help each other: the mechanisms of Caruana (1997), each against its control, over many seeds.

Run:      lightning-mtl run caruana
          (all six, one after the other; for one of them its name: overfit, amplify, attributes, eavesdrop, bias1,
          bias2, as in lightning-mtl run caruana amplify)
Override: --seeds 60                                             more networks
          --seed 1                                               other data and other networks
          --out docs/images/caruana_amplify.png                  the figure there too (for `all`: a folder)
Expect:   each about half a minute on a free core. Tables with mean and spread over seeds, tests between arms, a
          figure, and in a few words what was not shown.
Source:   R. Caruana, Multitask learning, Machine Learning 28, 1997. The tasks here are made anew, and small.

All seeds of an arm are one network with a further dimension (`_lab.seeds`), so thirty cost little more than one.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from jsonargparse import auto_cli
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, normalize, relu

from _lab import report
from _lab.seeds import Fitted, SeedMLP, fit, shuffled
from _lab.stats import Paired, auroc, binomial, mean_sd, paired, shares


@dataclass
class Study:
    """What a mechanism measured: scores ``[S]`` per arm, the tests between them, and what they do not show."""

    name: str
    title: str
    label: str
    best: Literal["low", "high"]
    scores: dict[str, Tensor] = field(default_factory=dict)
    tests: dict[str, Paired] = field(default_factory=dict)
    not_shown: str = ""
    sides: dict[str, tuple[str, str]] = field(default_factory=dict)  # bias: arm -> names of high and low scores

    def compare(self, first: str, second: str, best: Literal["low", "high"] | None = None) -> None:
        """Test one arm against another, seed by seed."""
        self.tests[f"{first} against {second}"] = paired(self.scores[first], self.scores[second], best or self.best)

    def side_p(self, arm: str) -> float:
        """Whether the networks of this arm prefer one cue: binomial, among those that decided."""
        high, low, _ = shares(self.scores[arm])
        return binomial(high, low)


# Regression: what overfit, amplify and attributes share


@dataclass(frozen=True)
class Rows:
    """Training rows ``x`` [S, N, d] with noisy targets ``y`` [S, N, K], the main task's for validation and test."""

    x: Tensor
    y: Tensor
    x_valid: Tensor
    y_valid: Tensor
    x_test: Tensor
    clean_test: Tensor


def regression(seeds: int, inputs: int, rows: int, tasks: int, random: torch.Generator, relevant: int = 5) -> Rows:
    """Tasks that weigh the same two hidden features, tanh of the first ``relevant`` inputs, each in its own way."""
    features = torch.randn(seeds, relevant, 2, generator=random)
    # All mixes are equally long, so that no task is next to constant.
    mixes = 2**0.5 * normalize(torch.randn(seeds, 2, tasks, generator=random), dim=1)

    def draw(count: int, noise: float) -> tuple[Tensor, Tensor]:
        x = torch.randn(seeds, count, inputs, generator=random)
        clean = torch.tanh(x[..., :relevant] @ features) @ mixes
        return x, clean + noise * torch.randn(clean.shape, generator=random)

    x, y = draw(rows, 1.0)
    x_valid, y_valid = draw(100, 1.0)
    x_test, clean_test = draw(1000, 0.0)
    return Rows(x, y, x_valid, y_valid[..., 0], x_test, clean_test[..., 0])


@dataclass(frozen=True)
class Arm:
    """A trained network of every seed, and the rows it was trained on."""

    net: SeedMLP
    fitted: Fitted
    data: Rows
    x: Tensor
    y: Tensor

    def test(self) -> Tensor:
        """Error of the main task against the truth without noise, ``[S]``."""
        with torch.no_grad():
            return (self.net(self.data.x_test)[..., 0] - self.data.clean_test).square().mean(1)

    def test_at_the_end(self) -> Tensor:
        """The same without early stopping, ``[S]``."""
        return self._at_the_end(self.test)

    def gap_at_the_end(self) -> Tensor:
        """Test error minus training error of the main task without early stopping, ``[S]``."""
        train = self._at_the_end(lambda: (self.net(self.x)[..., 0] - self.y[..., 0]).square().mean(1).detach())
        return self.test_at_the_end() - train

    def _at_the_end(self, measure: Callable[[], Tensor]) -> Tensor:
        self.net.load_state_dict(self.fitted.last)
        measured = measure()
        self.net.load_state_dict(self.fitted.best)
        return measured


def train(
    data: Rows,
    hidden: int,
    tasks: int,
    steps: int,
    lr: float,
    seed: int,
    rows: int | None = None,
    shuffle: bool = False,
) -> Arm:
    """One hidden layer, an output per task, early stopping on the main task.

    With ``shuffle`` the extra tasks' targets are given to rows at random: the same numbers, and nothing to learn.
    """
    # Every arm draws from the same numbers: the hidden layers of all arms of one size start alike.
    random = torch.Generator().manual_seed(seed + 10_000)
    x, y = data.x[:, :rows], data.y[:, :rows, :tasks]
    net = SeedMLP(len(x), x.shape[-1], hidden, tasks, random=random)
    if shuffle:
        extra = [shuffled(y[..., [task]], random) for task in range(1, tasks)]
        y = torch.cat([y[..., :1], *extra], -1)
    fitted = fit(
        net,
        lambda: (net(x) - y).square().mean((1, 2)),
        steps,
        lr,
        validate=lambda: (net(data.x_valid)[..., 0] - data.y_valid).square().mean(1),
    )
    return Arm(net, fitted, data, x, y)


def overfit(seeds: int = 30, seed: int = 0, sizes: tuple[int, ...] = (4, 16, 64), out: Path | None = None) -> Study:
    """Overfitting prevention: fewer hidden units for several tasks against more of them for one.

    Args:
        seeds: how many networks per arm.
        seed: of the data and the networks.
        sizes: hidden units; 4 is among them.
        out: a further place for the figure.
    """
    started, random = time.perf_counter(), torch.Generator().manual_seed(seed)
    data = regression(seeds, inputs=20, rows=80, tasks=8, random=random)

    def arms(tasks: int, shuffle: bool = False) -> dict[int, Arm]:
        return {h: train(data, h, tasks, steps=600, lr=0.005, seed=seed, shuffle=shuffle) for h in sizes}

    single, several, noise = arms(1), arms(8), arms(8, shuffle=True)
    study = Study("overfit", "overfitting prevention", "test error, main task", "low")
    kinds = {"1 task": single, "8 tasks": several, "shuffled": noise}
    for kind, nets in kinds.items():
        study.scores |= {f"{kind}, h={h}": net.test() for h, net in nets.items()}
    for kind, nets in kinds.items():
        study.scores |= {f"{kind}, h={h}, to the end": net.test_at_the_end() for h, net in nets.items()}
    study.scores |= {f"{kind}, h=4, gap at the end": nets[4].gap_at_the_end() for kind, nets in kinds.items()}
    # The single task may choose its size by the test error itself: more than fair.
    best = min(sizes, key=lambda h: float(study.scores[f"1 task, h={h}"].mean()))
    study.compare("8 tasks, h=4", f"1 task, h={best}")
    study.compare("8 tasks, h=4, gap at the end", "1 task, h=4, gap at the end")
    for end in ("", ", to the end"):
        for h in sizes:
            study.compare(f"shuffled, h={h}{end}", f"1 task, h={h}{end}")
            study.compare(f"8 tasks, h={h}{end}", f"1 task, h={h}{end}")
    study.not_shown = (
        "that unrelated tasks regularise in general. As noise alone they help a tiny net that is trained to the end, "
        "harm larger ones there, and change little with early stopping; read the lines `shuffled`. Nor that related "
        "tasks replace early stopping: see `8 tasks, to the end`."
    )
    return finish(study, started, out, [*(f"{kind}, h={h}" for h in sizes for kind in kinds)])


def amplify(
    seeds: int = 60,
    seed: int = 0,
    tasks: tuple[int, ...] = (2, 4, 8, 16),
    rows: tuple[int, ...] = (120, 240, 480),
    out: Path | None = None,
) -> Study:
    """Data amplification: more tasks on the same rows against more rows of one task.

    Args:
        seeds: how many networks per arm.
        seed: of the data and the networks.
        tasks: how many of them share 60 rows.
        rows: how many of them one task has.
        out: a further place for the figure.
    """
    started, random = time.perf_counter(), torch.Generator().manual_seed(seed)
    data = regression(seeds, inputs=10, rows=max((60, *rows)), tasks=max((8, *tasks)), random=random)

    def error(count: int, size: int = 60, shuffle: bool = False) -> Tensor:
        return train(data, 16, count, steps=500, lr=0.01, seed=seed, rows=size, shuffle=shuffle).test()

    study = Study("amplify", "data amplification", "test error, main task", "low")
    study.scores |= {f"1 task, {size} rows": error(1, size) for size in (60, *rows)}
    study.scores |= {f"{count} tasks, 60 rows": error(count) for count in tasks}
    study.scores["8 shuffled, 60 rows"] = error(8, shuffle=True)
    for arm in (*(f"{count} tasks" for count in tasks), "8 shuffled"):
        study.compare(f"{arm}, 60 rows", "1 task, 60 rows")
    for count in tasks:
        study.compare(f"{count} tasks, 60 rows", "8 shuffled, 60 rows")
    for size in rows:
        study.compare(f"{max(tasks)} tasks, 60 rows", f"1 task, {size} rows")
    study.not_shown = (
        "a firm gain from two or four tasks at this number of seeds, or K-fold data from K tasks: the inputs are the "
        "same rows, only the noise on the targets is drawn again. Sixteen tasks on 60 rows stay behind 120 rows."
    )
    return finish(study, started, out)


def saliency(net: SeedMLP) -> Tensor:
    """How strongly each input reaches the main output, by absolute weights: ``[S, d]``."""
    first, last = (layer.weight.detach().abs() for layer in net if hasattr(layer, "weight"))  # type: ignore[operator]
    return (first @ last[..., :1]).squeeze(-1)


def attributes(seeds: int = 30, seed: int = 0, out: Path | None = None) -> Study:
    """Attribute selection: finding the five inputs of fifty that matter.

    Args:
        seeds: how many networks per arm.
        seed: of the data and the networks.
        out: a further place for the figure.
    """
    started, random = time.perf_counter(), torch.Generator().manual_seed(seed)
    data = regression(seeds, inputs=50, rows=400, tasks=16, random=random)
    relevant = torch.arange(50) < 5
    kinds = {
        "1 task": (1, 100, False),
        "4 tasks": (4, 100, False),
        "16 tasks": (16, 100, False),
        "16 shuffled": (16, 100, True),
        "1 task, 4x rows": (1, 400, False),
    }
    study = Study("attributes", "attribute selection", "AUROC, relevant inputs", "high")
    errors = {}
    for kind, (tasks, rows, shuffle) in kinds.items():
        arm = train(data, 8, tasks, steps=300, lr=0.01, seed=seed, rows=rows, shuffle=shuffle)
        study.scores[kind] = auroc(saliency(arm.net), relevant)
        errors[f"{kind}, test error"] = arm.test()
    main = list(study.scores)
    study.scores |= errors
    for kind in ("4 tasks", "16 tasks", "16 shuffled"):
        study.compare(kind, "1 task")
    study.compare("16 tasks", "16 shuffled")
    study.compare("16 tasks", "1 task, 4x rows")
    study.compare("16 tasks, test error", "1 task, test error", best="low")
    study.not_shown = (
        "that the choice of inputs is what lowers the error: it is seen beside the lower error, in nets without any "
        "means to switch an input off."
    )
    return finish(study, started, out, main)


# Eavesdropping


class TwoHeads(nn.Module):
    """A shared layer and a head with a hidden layer for each of two tasks: ``[S, N, d] -> [S, N, 2]``, logits."""

    def __init__(self, seeds: int, inputs: int, random: torch.Generator) -> None:
        super().__init__()
        self.trunk = SeedMLP(seeds, inputs, 32, random=random)
        heads = [SeedMLP(seeds, 32, 16, 1, random=random, activation=nn.ReLU) for _ in range(2)]
        self.heads = nn.ModuleList(heads)

    def forward(self, x: Tensor) -> Tensor:
        features = relu(self.trunk(x))
        return torch.cat([head(features) for head in self.heads], -1)


def signs(*shape: int, random: torch.Generator) -> Tensor:
    """Inputs of -1 and 1."""
    return torch.randint(2, shape, generator=random) * 2.0 - 1


def eavesdrop(seeds: int = 24, seed: int = 0, steps: int = 1000, out: Path | None = None) -> Study:
    """Eavesdropping: a feature that an easy task shows to a hard one.

    F = x0 x1 is all of the easy task T. The hard task T' is F x2, a parity of three inputs among twenty.

    Args:
        seeds: how many networks per arm.
        seed: of the data and the networks.
        steps: of training.
        out: a further place for the figure.
    """
    started, random = time.perf_counter(), torch.Generator().manual_seed(seed)
    x, x_test = signs(seeds, 300, 20, random=random), signs(seeds, 1000, 20, random=random)

    def hard(x: Tensor) -> Tensor:
        return (x[..., 0] * x[..., 1] * x[..., 2] > 0).float()

    easy = (x[..., 0] * x[..., 1] > 0).float()
    partners = {
        "alone": None,
        "with T": easy,
        "with T shuffled": shuffled(easy, random),
        "with unrelated parity": (x[..., 3] * x[..., 4] > 0).float(),
    }

    def accuracy(partner: Tensor | None) -> Tensor:
        net = TwoHeads(seeds, 20, torch.Generator().manual_seed(seed + 10_000))
        targets = [hard(x)] if partner is None else [hard(x), partner]

        def losses() -> Tensor:
            logits = net(x)
            each = binary_cross_entropy_with_logits(
                logits[..., : len(targets)], torch.stack(targets, -1), reduction="none"
            )
            return each.mean(1).sum(-1)

        fit(net, losses, steps, 0.005, weight_decay=1e-4)
        with torch.no_grad():
            return ((net(x_test)[..., 0] > 0).float() == hard(x_test)).float().mean(1)

    study = Study("eavesdrop", "eavesdropping", "accuracy, hard task T'", "high")
    study.scores = {kind: accuracy(partner) for kind, partner in partners.items()}
    for kind in list(partners)[1:]:
        study.compare(kind, "alone")
    study.compare("with T", "with T shuffled")
    study.not_shown = (
        "that any easy task helps: one that needs other inputs, as easy as T, does not. Nor what is left to gain where "
        "T' can be learned alone, with more rows or fewer inputs: that was not tried here."
    )
    return finish(study, started, out)


# Representation bias


Cue = Callable[[Tensor], Tensor]


def product(*places: int) -> Cue:
    """The sign of a product of inputs: ``[..., d] -> [...]``."""
    return lambda x: x[..., list(places)].prod(-1)


def labelled(x: Tensor, cue: Cue, other: Cue) -> Tensor:
    """What both cues say, as 0 or 1; NaN, a missing label, where they disagree."""
    return torch.where(cue(x) == other(x), (cue(x) > 0).float(), torch.nan)


def counted(y: Tensor, places: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """How many labels each of ``count`` inputs has among the rows, and their mean: ``[S, N]`` -> ``[S, count]``.

    NaN is no label, as in the package's own tasks.
    """
    there, empty = ~y.isnan(), torch.zeros(len(y), count)
    numbers = empty.scatter_add(1, places, there.float())
    return numbers, empty.scatter_add(1, places, y.nan_to_num(0.0)) / numbers.clamp(min=1)


@dataclass(frozen=True)
class Task:
    """A task that two cues explain equally well: labelled only where they agree."""

    cue: Cue
    other: Cue
    shuffle: bool = False


def follow(
    tasks: dict[str, Task],
    hidden: int,
    steps: int,
    seeds: int,
    random: torch.Generator,
    inputs: int = 6,
    rows: int = 512,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Train one net per seed on these tasks together, and ask it where the cues of a task disagree.

    Returns for each task the share of those inputs on which it follows the first cue, ``[S]``, and whether it is right
    on all inputs where they agree, ``[S]``. Both count every possible input once.
    """
    every = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * inputs)
    # There are fewer inputs than rows: the loss of equal rows is computed once, times how many there are.
    places = torch.randint(len(every), (seeds, rows), generator=random)
    labels = [labelled(every[places], task.cue, task.other) for task in tasks.values()]
    labels = [shuffled(y, random) if task.shuffle else y for y, task in zip(labels, tasks.values(), strict=True)]
    numbers, means = (
        torch.stack(part, -1) for part in zip(*(counted(y, places, len(every)) for y in labels), strict=True)
    )
    net = SeedMLP(seeds, inputs, hidden, len(tasks), random=random)
    x = every.expand(seeds, -1, -1).contiguous()

    def losses() -> Tensor:
        each = binary_cross_entropy_with_logits(net(x), means, reduction="none")
        return ((numbers * each).sum(1) / numbers.sum(1)).sum(-1)

    fit(net, losses, steps, 0.01)
    with torch.no_grad():
        answers = net(x) > 0
    found = {}
    for place, (name, task) in enumerate(tasks.items()):
        says = answers[..., place] == (task.cue(every) > 0)
        agree = task.cue(every) == task.other(every)
        found[name] = says[:, ~agree].float().mean(1), says[:, agree].all(1)
    return found


def bias1(seeds: int = 60, seed: int = 0, hidden: int = 4, steps: int = 1500, out: Path | None = None) -> Study:
    """Representation bias, first experiment: two tasks meet in the cue that both can use.

    T is explained by cue A or B, T' by A or C: alone each takes either, together both take A.

    Args:
        seeds: how many networks per arm.
        seed: of the data and the networks.
        hidden: units in the shared layer.
        steps: of training.
        out: a further place for the figure.
    """
    started, random = time.perf_counter(), torch.Generator().manual_seed(seed)
    a, b, c = product(0, 1), product(2, 3), product(4, 5)
    t, t2 = Task(a, b), Task(a, c)
    study = Study("bias1", "representation bias 1: two tasks meet in the cue they share", "networks", "high")
    cues = {"T": ("A", "B"), "T'": ("A", "C")}
    runs = {
        "alone": {"T": t},
        "alone ": {"T'": t2},
        "together": {"T": t, "T'": t2},
        "T' shuffled": {"T": t, "(T')": Task(a, c, shuffle=True)},
    }
    solved = []
    for arm, tasks in runs.items():
        for name, (share, right) in follow(tasks, hidden, steps, seeds, random).items():
            if name in cues:
                key = f"{name} {arm.strip()}" if arm != "T' shuffled" else "T with T' shuffled"
                study.scores[key], study.sides[key] = share, cues[name]
                solved.append(f"{key} {right.float().mean():.2f}")
    study.compare("T together", "T alone")
    study.compare("T' together", "T' alone")
    study.compare("T together", "T with T' shuffled")
    study.not_shown = (
        "anything about nets too small for the tasks. Share of networks without an error on their labels: "
        + ", ".join(solved)
        + "."
    )
    return finish(study, started, out)


def bias2(seeds: int = 60, seed: int = 0, steps: int = 1200, out: Path | None = None) -> Study:
    """Representation bias, second experiment: a task with a favourite draws the other to what it builds.

    T takes B, which is linear and easy, rather than A. T' can use A or C; C reuses what T builds for B.

    Args:
        seeds: how many networks per arm.
        seed: of the data and the networks.
        steps: of training.
        out: a further place for the figure.
    """
    started, random = time.perf_counter(), torch.Generator().manual_seed(seed)
    a, b = product(0, 1), product(2)
    study = Study("bias2", "representation bias 2: T' goes where T already is", "networks", "high")
    # The control's hidden layer is smaller: there the nets have to choose.
    for hidden, c, kind in ((8, product(2, 3), ""), (4, product(3, 4), ", C apart")):
        t, t2 = Task(a, b), Task(a, c)
        for arm, tasks in {"alone": {"T": t}, "alone ": {"T'": t2}, "together": {"T": t, "T'": t2}}.items():
            for name, (share, _) in follow(tasks, hidden, steps, seeds, random).items():
                key = f"{name} {arm.strip()}{kind}"
                study.scores[key], study.sides[key] = share, ("A", "B" if name == "T" else "C")
        study.tests[f"T' together against T' alone{kind}, towards C"] = paired(
            study.scores[f"T' together{kind}"], study.scores[f"T' alone{kind}"], "low"
        )
    study.not_shown = (
        "that T' follows T in general. C has to reuse what T builds, here x2: where it does not (C apart, x3 x4, four "
        "hidden units), T' is not drawn to C."
    )
    return finish(study, started, out)


# Output


def finish(study: Study, started: float, out: Path | None, drawn: Sequence[str] | None = None) -> Study:
    """Print, draw and write down what a study found."""
    values = {f"{arm}/mean": float(scores.mean()) for arm, scores in study.scores.items()}
    values |= {f"{test}/p": found.p for test, found in study.tests.items()}
    folder = report.log(f"caruana_{study.name}", values)
    report.write(folder / "seeds.csv", study.scores)
    console = report.console()
    seeds = len(next(iter(study.scores.values())))
    if study.sides:
        columns, rows = ("arm", "first cue", "other cue", "undecided", "p (binomial)"), side_rows(study)
    else:
        columns, rows = ("arm", study.label), [(arm, mean_sd(scores)) for arm, scores in study.scores.items()]
    console.print(report.table(f"{study.title}: {seeds} seeds", columns, rows))
    tests = [
        (name, f"{test.gain:+.3f}", f"{test.d_z:+.1f}", f"{test.wins}/{test.seeds}", f"{test.p:.0e}")
        for name, test in study.tests.items()
    ]
    gain = "shift" if study.sides else "better by"
    console.print(
        report.table("Wilcoxon signed-rank over seeds", ("first against second", gain, "d_z", "wins", "p"), tests)
    )
    console.print(f"Not shown: {study.not_shown}")
    draw(study, folder / "figure.png", out, drawn)
    console.print(f"figure   {folder / 'figure.png'}\nnumbers  {folder / 'seeds.csv'}")
    console.print(f"{time.perf_counter() - started:.0f} s in all\n")
    return study


def side_rows(study: Study) -> list[tuple[str, ...]]:
    """How many networks of each arm follow the one cue or the other."""
    rows = []
    for arm, (first, other) in study.sides.items():
        high, low, between = shares(study.scores[arm])
        seeds = high + low + between
        rows.append(
            (
                arm,
                f"{first} {high / seeds:.2f}",
                f"{other} {low / seeds:.2f}",
                f"{between / seeds:.2f}",
                f"{study.side_p(arm):.0e}",
            )
        )
    return rows


def draw(study: Study, file: Path, out: Path | None, drawn: Sequence[str] | None) -> None:
    """One panel: a dot per seed and arm, or, where networks take sides, a bar per arm."""
    arms = {arm: study.scores[arm] for arm in drawn or study.scores}
    figure, (axes,) = report.panels(1, study.title)
    figure.set_size_inches(max(5.0, 1.1 + 0.8 * len(arms)), 3.6)
    wrapped = {arm.replace(", ", "\n").replace(" with ", "\nwith ").replace("with ", "with\n"): arm for arm in arms}
    if study.sides:
        counts = {text: shares(arms[arm]) for text, arm in wrapped.items()}
        report.stacks(axes, counts, ("cue A", "the other cue", "undecided"), "share of networks")
    else:
        report.dots(axes, {text: arms[arm] for text, arm in wrapped.items()}, study.label)
    report.save(figure, file, out)


# The command line


def everything(seeds: int | None = None, seed: int = 0, out: Path | None = None) -> list[Study]:
    """All six, one after the other.

    Args:
        seeds: how many networks per arm; by default each study's own number.
        seed: of the data and the networks.
        out: a folder for the figures.
    """
    options = {} if seeds is None else {"seeds": seeds}
    return [
        study(**options, seed=seed, out=out and out / f"caruana_{name}.png")  # type: ignore[operator]
        for name, study in STUDIES.items()
    ]


STUDIES = {
    "overfit": overfit,
    "amplify": amplify,
    "attributes": attributes,
    "eavesdrop": eavesdrop,
    "bias1": bias1,
    "bias2": bias2,
}


def main(args: Sequence[str] | None = None) -> Study | list[Study]:
    """The command line of this recipe; without a name it is ``all``. Returns what was found."""
    given = sys.argv[1:] if args is None else list(args)
    return auto_cli(STUDIES | {"all": everything}, args=given or ["all"])


if __name__ == "__main__":
    main()
