"""Multi-task Gaussian process: five tasks of few rows, one encoder, and a learned matrix of how the tasks correlate.

Run:      lightning-mtl run multitask_gp
Needs:    pip install "lightning-mtl[recipes,gp]"                (GPyTorch)
Override: --seeds 10                                             fewer repetitions
          --rows 40                                              more data per task
          --out docs/images/multitask_gp.png                     the figure there too
Expect:   30 seconds on one core. Correlated tasks: distance from the true functions 0.39 with one Gaussian process per
          task, 0.22 with a shared encoder, 0.17 with the correlation of the tasks learned too. Without correlation the
          matrix gains nothing; with nothing in common, the shared encoder makes it much worse (0.41 to 0.68).
Source:   Bonilla, Chai and Williams, NIPS 2007 (tasks in the covariance); Wilson et al., AISTATS 2016 (deep kernels).
"""

import itertools
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import IndexKernel, RBFKernel
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.mlls import ExactMarginalLogLikelihood
from gpytorch.models import ExactGP
from jsonargparse import auto_cli
from matplotlib.axes import Axes
from torch import Tensor

from _lab import report
from _lab.seeds import SeedLinear, SeedMLP, fit
from _lab.stats import mean_sd, paired

T, D = 5, 3  # tasks, inputs
WIDTH, FEATURES = 16, 2  # of an encoder
RANK = 2  # of the part of the tasks' covariance that is not diagonal; the first truth has it
TEST, NOISE, LENGTH = 60, 0.2, 0.4
ANGLES = torch.tensor([0.0, 20.0, 40.0, 110.0, 180.0], dtype=torch.float64).deg2rad()
CORRELATION = (ANGLES - ANGLES[:, None]).cos()  # of the tasks of the first truth, [T, T]
TRUTHS = ("correlated", "common feature", "unrelated")
ARMS = ("no encoder", "own encoder", "shared encoder", "coregional")
ALONE = ARMS[:2]  # one Gaussian process per task
Scores = dict[str, dict[str, Tensor]]  # arm -> score -> a value per seed [S]


# The truth, and data from it


def functions(name: str, x: Tensor, generator: torch.Generator) -> Tensor:
    """A random function per task, each at its own points: ``[T, N, D] -> [T, N]``.

    Each is smooth in one feature, ``tanh`` of a random direction of the inputs. *Correlated*: all read the same feature
    and are mixtures of the same two functions. *Common feature*: independent functions of the same feature.
    *Unrelated*: each has a feature and a function of its own.
    """
    directions = torch.randn(T, D, 1, generator=generator, dtype=x.dtype) / D**0.5
    feature = (x @ (directions if name == "unrelated" else directions[:1])).tanh()
    # 200 random waves: a draw from a Gaussian process with an RBF kernel, which can be evaluated anywhere.
    waves = torch.randn(T, 1, 200, generator=generator, dtype=x.dtype) / LENGTH
    phases = 2 * torch.pi * torch.rand(T, 1, 200, generator=generator, dtype=x.dtype)
    heights = torch.randn(T, 200, 1, generator=generator, dtype=x.dtype) / 10
    if name != "correlated":
        return ((feature @ waves + phases).cos() @ heights).squeeze(-1)
    first, second = (((feature @ waves[q] + phases[q]).cos() @ heights[q]).squeeze(-1) for q in range(2))
    return ANGLES.cos()[:, None] * first + ANGLES.sin()[:, None] * second


def problems(name: str, seeds: Sequence[int], rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """One problem per seed: inputs ``[S, T, rows + TEST, D]``, truth and noisy targets ``[S, T, rows + TEST]``."""
    found = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(1000 * seed + TRUTHS.index(name))
        x = torch.randn(T, rows + TEST, D, generator=generator, dtype=torch.float64)
        truth = functions(name, x, generator)
        found.append((x, truth, truth + NOISE * torch.randn(truth.shape, generator=generator, dtype=x.dtype)))
    inputs, truths, targets = (torch.stack(part) for part in zip(*found, strict=True))
    return inputs, truths, targets


# The models


class TaskGP(ExactGP):
    """S Gaussian processes: the covariance of two rows is the kernel of their features times that of their tasks.

    Args:
        x: rows of all tasks, ``[S, N, D]``.
        task: which task each is of, ``[S, N, 1]``.
        y: targets, ``[S, N]``.
        num_tasks: how many there are.
        arm: one of ``ARMS``. All but *coregional* keep the tasks uncorrelated.
    """

    def __init__(self, x: Tensor, task: Tensor, y: Tensor, num_tasks: int, arm: str) -> None:
        seeds, random = torch.Size([len(x)]), torch.Generator().manual_seed(0)
        super().__init__((x, task), y, GaussianLikelihood(batch_shape=seeds))
        plain = arm == "no encoder"
        self.encoder = None if plain else SeedMLP(len(x), D, WIDTH, FEATURES, random=random)
        self.kernel = RBFKernel(ard_num_dims=D if plain else None, batch_shape=seeds)
        self.tasks = IndexKernel(num_tasks, rank=min(RANK, num_tasks), batch_shape=seeds)
        shape, mixed = self.tasks.covar_factor.shape, arm == "coregional"
        self.tasks.covar_factor.data = 0.5 * torch.randn(shape, generator=random) if mixed else torch.zeros(shape)
        self.tasks.covar_factor.requires_grad_(mixed)
        self.tasks.raw_var.data.zero_()
        self.double()
        if plain:
            self.kernel.lengthscale = 2.0  # for inputs of variance 1; a deep kernel makes its own scale
        # Every arm is told the noise: with few rows a deep kernel would otherwise explain it away.
        self.likelihood.noise = NOISE**2
        self.likelihood.raw_noise.requires_grad_(False)

    def forward(self, x: Tensor, task: Tensor) -> MultivariateNormal:
        features = x if self.encoder is None else self.encoder(x)
        return MultivariateNormal(torch.zeros_like(x[..., 0]), self.kernel(features).mul(self.tasks(task)))

    def surprise(self) -> Tensor:
        """Minus the log of a normal prior, ``[S]``: encoders as wide as they are drawn, and the tasks' factor."""
        terms = [self.tasks.covar_factor.flatten(1)]
        for layer in self.encoder or ():
            if isinstance(layer, SeedLinear):
                precision = 3 * layer.weight.shape[1]  # of numbers drawn between -1 and 1, over the root of the inputs
                terms += [precision**0.5 * part.flatten(1) for part in (layer.weight, layer.bias)]
        return torch.cat(terms, 1).square().sum(1) / 2

    def correlation(self) -> Tensor:
        """Of the tasks, ``[S, T, T]``."""
        covariance = self.tasks.covar_matrix.to_dense().detach()
        scale = covariance.diagonal(dim1=1, dim2=2).rsqrt()
        return covariance * scale[:, :, None] * scale[:, None]


def learn(arm: str, x: Tensor, y: Tensor, x_test: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Fit to x ``[S, T, N, D]`` and y ``[S, T, N]`` by the most probable parameters.

    Returns: mean and variance of new targets at ``x_test``, ``[S, T, M]`` each, and the tasks' correlation.
    """
    # One process per task is one of a single task, with more seeds.
    at, num_tasks = (0, 1) if arm in ALONE else (1, T)

    def seen(rows: Tensor) -> tuple[Tensor, Tensor]:
        task = torch.arange(num_tasks).repeat_interleave(rows.shape[2])[:, None]
        flat = rows.flatten(at, at + 1)
        return flat, task.expand(len(flat), -1, -1)

    inputs, targets = seen(x), y.flatten(at, at + 1)
    gp = TaskGP(*inputs, targets, num_tasks, arm)
    likelihood = ExactMarginalLogLikelihood(gp.likelihood, gp)  # per row

    def loss() -> Tensor:
        return gp.surprise() / targets.shape[1] - likelihood(gp(*inputs), targets)

    # torch asks to be told; GPyTorch makes sparse tensors in the backward pass.
    with torch.sparse.check_sparse_tensor_invariants(False):
        fit(gp, loss, steps, lr=0.05)
        gp.eval()
        with torch.no_grad():
            said = gp(*seen(x_test))
            return said.mean.view(x_test.shape[:3]), said.variance.view(x_test.shape[:3]) + NOISE**2, gp.correlation()


def scores(mean: Tensor, variance: Tensor, truth: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Four times ``[S, T, M]`` -> a value per seed, ``[S]`` each.

    ``rmse``: from the true function. ``nlpd``: minus the log density of the noisy targets. ``covered``: share of them
    inside their 95% intervals.
    """
    off = (y - mean).square() / variance
    density = -0.5 * (off + (2 * torch.pi * variance).log())
    values = {"rmse": (mean - truth).square(), "nlpd": -density, "covered": (off < 1.96**2).double()}
    means = {name: value.mean((1, 2)) for name, value in values.items()}
    return means | {"rmse": means["rmse"].sqrt()}


def measure(
    seeds: Sequence[int], rows: int, steps: int, truths: Sequence[str] = TRUTHS
) -> tuple[dict[str, Scores], dict[str, Tensor]]:
    """All arms on these truths, and the correlation that *coregional* learned on each, ``[S, T, T]``."""
    found: dict[str, Scores] = {}
    learned: dict[str, Tensor] = {}
    for name in truths:
        x, truth, y = problems(name, seeds, rows)
        found[name] = {}
        for arm in ARMS:
            mean, variance, learned[name] = learn(arm, x[:, :, :rows], y[:, :, :rows], x[:, :, rows:], steps)
            found[name][arm] = scores(mean, variance, truth[:, :, rows:], y[:, :, rows:])
    return found, learned


# What came out


def tests(found: dict[str, Scores]) -> list[list[str]]:
    """A row per truth and arm, against the arm that it adds something to: difference, wins and p of two scores."""
    rows = []
    for name, arms in found.items():
        for first, second in (("shared encoder", "own encoder"), ("coregional", "shared encoder")):
            row = [f"{name}: {first} against {second}"]
            for score in ("rmse", "nlpd"):
                test = paired(arms[first][score], arms[second][score])
                row += [f"{-test.gain:+.3f}", f"{test.wins}/{test.seeds}", f"{test.p:.0e}"]
            rows.append(row)
    return rows


def distances(learned: dict[str, Tensor]) -> list[tuple[str, str]]:
    """How far the correlation of two tasks is from the true one, in the mean over all pairs of tasks."""
    rows, pairs = [], torch.ones(T, T).triu(1).bool()
    for name, found in learned.items():
        true = CORRELATION if name == "correlated" else torch.eye(T)
        rows.append((name, mean_sd((found - true)[:, pairs].abs().mean(1))))
    return rows


def matrix(axes: Axes, learned: Tensor) -> None:
    """The true correlation below the diagonal, the learned one, ``[S, T, T]``, averaged over seeds above it."""
    shown = CORRELATION.tril() + learned.mean(0).triu(1)
    axes.imshow(shown.numpy(), cmap="RdBu", vmin=-1.5, vmax=1.5)
    for row, column in itertools.product(range(T), repeat=2):
        axes.text(column, row, f"{shown[row, column]:.2f}", ha="center", va="center", fontsize=8)
    axes.set_xticks(range(T), [f"task {task + 1}" for task in range(T)], fontsize=8)
    axes.set_yticks([])
    axes.set_title("correlated: true below, learned above", loc="left", fontsize=10)


def multitask_gp(seeds: int = 30, rows: int = 15, steps: int = 100, out: Path | None = None) -> dict[str, Scores]:
    """Fit all arms to all truths; print the scores and tests, draw the errors, write them down.

    Args:
        seeds: how many problems of each kind.
        rows: of each task, at points of its own.
        steps: of Adam, on all rows.
        out: a further place for the figure.
    """
    started = time.perf_counter()
    torch.set_num_threads(1)
    found, learned = measure(range(seeds), rows, steps)
    console = report.console()
    figure, panels = report.panels(len(found) + 1, f"Distance from the true functions, {seeds} seeds (bar: mean)")
    for axes, (name, arms) in zip(panels, found.items(), strict=False):
        lines = [[arm, *(mean_sd(values) for values in score.values())] for arm, score in arms.items()]
        console.print(report.table(name, ["arm", "rmse", "nlpd", "covered"], lines))
        report.dots(axes, {arm.replace(" ", "\n"): score["rmse"] for arm, score in arms.items()}, "rmse")
        axes.set_title(name, loc="left", fontsize=10)
        axes.set_ylim(0, 1.05 * max(float(score["rmse"].max()) for kind in found.values() for score in kind.values()))
    matrix(panels[-1], learned["correlated"])
    values = {f"{name}/{arm}/{s}": v for name, arms in found.items() for arm in arms for s, v in arms[arm].items()}
    folder = report.log("multitask_gp", {name: float(value.mean()) for name, value in values.items()})
    report.write(folder / "scores.csv", values)
    report.save(figure, folder / "rmse.png", out)
    columns = ("first against second", "rmse", "better in", "p", "nlpd", "better in", "p")
    console.print(report.table("Wilcoxon signed-rank over seeds, minus is better", columns, tests(found)))
    title = "Distance of a learned correlation from the true one, coregional"
    console.print(report.table(title, ("truth", "distance"), distances(learned)))
    console.print(f"figure   {folder / 'rmse.png'}\nscores   {folder / 'scores.csv'}")
    console.print(f"{time.perf_counter() - started:.0f} s in all")
    return found


def main(args: Sequence[str] | None = None) -> dict[str, Scores]:
    """The command line of this recipe; returns the scores."""
    return auto_cli(multitask_gp, args=None if args is None else list(args))


if __name__ == "__main__":
    main()
