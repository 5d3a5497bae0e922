"""Two losses of two parameters: which balancer reaches the Pareto front, from where, and where on it.

Run:      lightning-mtl run toy2d
          lightning-mtl run toy2d --scale 1                      CAGrad's landscape; 0.1 is that of Nash-MTL and FAMO
Override: --methods [nash,sum]                                   some of them
          --pace 1                                               the published learning rate, twenty times as long
          --out docs/images/toy2d.png                            the figure there too
Expect:   100 seconds on two cores. On the front: sum, pcgrad, upgrad and cagrad from 4 of 5 starts, all others from
          all; the sum always at the louder loss's end, nash first of all, famo and gradnorm in the middle.
Source:   arXiv:2110.14048 (CAGrad), arXiv:2202.01017 (Nash-MTL) and arXiv:2306.03792 (FAMO) draw this landscape.
"""

import csv
import os
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jsonargparse import auto_cli
from lightning.pytorch.loggers import CSVLogger
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lightning_mtl.balancers import load

STARTS = ((-8.5, 7.5), (0.0, 0.0), (9.0, 9.0), (-7.5, -0.5), (9.0, -1.0))
FRONT = -8.3552  # the Pareto set is x2 = FRONT, -7 <= x1 <= 7
NEAR = 0.2  # closer to the front than this is on it
FLOOR = 5e-6  # where the logarithms are cut off
BOUND = -21.0  # below both losses, for methods that compare their ratios
Method = Literal["sum", "pcgrad", "upgrad", "cagrad", "mgda", "imtl_g", "aligned", "nash", "famo", "gradnorm"]
METHODS: tuple[Method, ...] = get_args(Method)


# The landscape


def losses_at(x: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """Both losses, the first times ``scale``, at any points: ``[..., 2] -> [..., 2]``.

    Above x2 = 0 each is a valley along a bent line, the logarithm of the distance to it; below, a shallow bowl.
    """
    x1, x2 = x.unbind(-1)
    bend = torch.tanh(-x2)
    valley_1 = torch.log((0.5 * (-x1 - 7) - bend).abs().clamp(min=FLOOR)) + 6
    valley_2 = torch.log((0.5 * (-x1 + 3) + bend + 2).abs().clamp(min=FLOOR)) + 6
    bowl_1 = ((x1 - 7) ** 2 + 0.1 * (x2 + 8) ** 2) / 10 - 20
    bowl_2 = ((x1 + 7) ** 2 + 0.1 * (x2 + 8) ** 2) / 10 - 20
    # On the line x2 = 0 itself both have their slope, so the start (0, 0) is not stationary; clamp would pass the
    # gradient on there in some versions of torch, and not in others.
    above, below = (torch.tanh(0.5 * side).where(side >= 0, 0.0) for side in (x2, -x2))
    return torch.stack([scale * (above * valley_1 + below * bowl_1), above * valley_2 + below * bowl_2], -1)


def rows_at(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and their gradients at ``B`` points: ``[B, 2]``, scales ``[B]`` -> ``[B, 2]`` and rows ``[B, 2, 2]``."""
    leaf = x.detach().requires_grad_()
    losses = losses_at(leaf, scale)
    grads = [torch.autograd.grad(losses[:, task].sum(), leaf, retain_graph=task == 0)[0] for task in (0, 1)]
    return losses.detach(), torch.stack(grads, 1)


# The methods


def balancer_of(method: str, scale: float) -> Any:
    """A fresh balancer, with the options that were published for this landscape."""
    bounds = [BOUND * scale, BOUND]
    name, options = {
        "sum": ("fixed", {}),
        "cagrad": ("cagrad", {"c": 0.4}),
        "famo": ("famo", {"gamma": 0.0, "min_losses": bounds}),
        "gradnorm": ("gradnorm", {"alpha": 0.12, "loss_offset": bounds}),
    }.get(method, (method, {}))
    return load(name, num_tasks=2, **options)


def descend(arms: Sequence[tuple[str, float]], steps: int, pace: float) -> Tensor:
    """Adam on x, for ``M`` pairs of method and scale, from all starts at once, each with a balancer of its own.

    A pace of 20 makes one step of twenty: 20 times the published rate of 1e-3, Adam's averages over a 20th of the
    steps. The rates of weights that a balancer learns stay as they are. Returns ``[steps / pace + 1, M, B, 2]``.
    """
    torch.set_num_threads(1)
    balancers = [balancer_of(method, scale) for method, scale in arms for _ in STARTS]
    # In float64: the paths cross valleys without a floor, where rounding would grow into other paths.
    scales = torch.tensor([scale for _, scale in arms], dtype=torch.float64).repeat_interleave(len(STARTS))
    x = torch.tensor(STARTS, dtype=torch.float64).repeat(len(arms), 1).requires_grad_()
    optimizer = torch.optim.Adam([x], lr=1e-3 * pace, betas=(0.9**pace, 0.999**pace))
    path = [x.detach().clone()]
    for _ in range(round(steps / pace)):
        losses, rows = rows_at(x, scales)
        x.grad = torch.stack([b.combine(r, at) for b, r, at in zip(balancers, rows, losses, strict=True)])
        optimizer.step()
        path.append(x.detach().clone())
    return torch.stack(path).unflatten(1, (len(arms), len(STARTS)))


def all_paths(arms: Sequence[tuple[str, float]], steps: int, pace: float, workers: int) -> dict[Any, Tensor]:
    """What :func:`descend` returns for each arm, ``[steps / pace + 1, B, 2]``, its arms spread over some processes."""
    parts = [arms[worker::workers] for worker in range(min(workers, len(arms)))]
    if len(parts) == 1:
        return dict(zip(arms, descend(arms, steps, pace).unbind(1), strict=True))
    with ProcessPoolExecutor(len(parts), mp_context=get_context("spawn")) as pool:
        done = [pool.submit(descend, part, steps, pace) for part in parts]
        found = [zip(part, job.result().unbind(1), strict=True) for part, job in zip(parts, done, strict=True)]
    return {arm: path for part in found for arm, path in part}


# What came out


def arrival(path: Tensor, pace: float = 1.0) -> list[float | None]:
    """When each start came to the front, ``None`` if it does not end there: ``[S, B, 2] -> B`` steps."""
    near = (path[..., 1] - FRONT).abs() < NEAR
    return [float(column.int().argmax()) * pace if column[-1] else None for column in near.T]


def distances(path: Tensor, other: Tensor) -> list[float]:
    """How far two paths are apart from each start until the first is on the front, where there is nothing to gain."""
    until = [len(path) if at is None else int(at) for at in arrival(path)]
    apart = (path - other).abs().amax(-1)
    return [float(apart[:end, start].max()) for start, end in enumerate(until)]


def table(paths: dict[str, Tensor], scale: float, steps: int, pace: float) -> Table:
    """One row per method; where each start ends, and when it came to the front."""
    grid = Table(
        title=f"toy2d, first loss x {scale:g}, {steps} steps: x1 on the front and when it was reached, else (x1, x2)",
        box=box.SIMPLE_HEAD,
        title_justify="left",
        padding=(0, 0, 0, 1),
    )
    grid.add_column("method", no_wrap=True)
    for start in STARTS:
        grid.add_column("from {:g}, {:g}".format(*start), justify="right", no_wrap=True)
    grid.add_column("on the front", justify="right")
    for method, path in paths.items():
        steps_to = arrival(path, pace)
        ends = zip(path[-1].tolist(), steps_to, strict=True)
        cells = [f"({x1:.1f}, {x2:.1f})" if at is None else f"{x1:.2f} @{at / 1000:4.1f}k" for (x1, x2), at in ends]
        grid.add_row(method, *cells, f"{sum(at is not None for at in steps_to)} of {len(STARTS)}")
    return grid


def write(paths: dict[str, Tensor], scale: float, pace: float, file: Path) -> None:
    """Every tenth step as a line: where each method is from each start, and its losses."""
    with file.open("w", newline="") as lines:
        writer = csv.writer(lines)
        writer.writerow(["method", "start", "step", "x1", "x2", "loss/1", "loss/2"])
        for method, path in paths.items():
            for place in range(0, len(path), 10):
                rows = torch.cat([path[place], losses_at(path[place], scale)], -1).tolist()
                writer.writerows([method, start, round(place * pace), *row] for start, row in enumerate(rows))


def draw(paths: dict[str, Tensor], scale: float, file: Path) -> None:
    """A panel per method: paths from all starts over the contours of the mean loss."""
    columns = min(5, len(paths))
    lines = -(-len(paths) // columns)
    figure = Figure(figsize=(0.6 + 2.75 * columns, 0.7 + 2.9 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for axes, (method, path) in zip(panels.flat, paths.items(), strict=False):
        landscape(axes, scale)
        trails(axes, path)
        arrived = sum(at is not None for at in arrival(path))
        axes.set_title(f"{method}: {arrived} of {len(STARTS)}", loc="left", fontsize=11)
    for axes in panels.flat[len(paths) :]:
        axes.set_axis_off()
    figure.supxlabel("x1", fontsize=10)
    figure.supylabel("x2", fontsize=10)
    figure.suptitle(
        f"Starts (rings), paths (dark to bright), ends (dots; crosses: not on the front); first loss x {scale:g}",
        x=0.01,
        ha="left",
        fontsize=11,
    )
    figure.savefig(file, dpi=110)


def landscape(axes: Axes, scale: float) -> None:
    """Contours of the mean loss and the Pareto front."""
    line = torch.linspace(-10.5, 10.5, 211, dtype=torch.float64)
    x1, x2 = torch.meshgrid(line, line, indexing="xy")
    mean = losses_at(torch.stack([x1, x2], -1), scale).mean(-1)
    axes.contour(x1.numpy(), x2.numpy(), mean.numpy(), levels=18, colors="#bdbdbd", linewidths=0.6, linestyles="solid")
    axes.plot([-7, 7], [FRONT, FRONT], color="#8c8c8c", linewidth=5, solid_capstyle="round", zorder=1.5)


def trails(axes: Axes, path: Tensor) -> None:
    """The paths from all starts: ``[S, B, 2]``."""
    for trail, at in zip(path.unbind(1), arrival(path), strict=True):
        points = trail[:: max(1, len(trail) // 500)]
        pieces = torch.stack([points[:-1], points[1:]], 1).numpy()
        axes.add_collection(LineCollection(list(pieces), array=range(len(pieces)), cmap="plasma", linewidths=1.8))
        axes.plot(*trail[0].tolist(), "o", color="black", markerfacecolor="white", markersize=5)
        axes.plot(*trail[-1].tolist(), "o" if at is not None else "X", color="black", markersize=6)
    axes.set_xlim(-10.5, 10.5)
    axes.set_ylim(-10.5, 10.5)


# The command line


def toy2d(
    scale: float = 0.1,
    steps: int = 30_000,
    pace: float = 20.0,
    methods: Sequence[Method] = METHODS,
    workers: int | None = None,
    out: Path | None = None,
) -> dict[str, Tensor]:
    """Descend by every method from five starts; print where that ends, draw the paths, write them down.

    Args:
        scale: factor of the first loss.
        steps: how far to go, in steps of the published learning rate, 1e-3.
        pace: how many of them are made one.
        methods: which ones.
        workers: processes of one thread each; by default one per core.
        out: a further place for the figure.
    """
    started = time.perf_counter()
    # A bargain does not ask in which unit a loss is measured: Nash-MTL goes the same way on both landscapes.
    other = 1.0 if scale != 1 else 0.1
    again = [("nash", other)] if "nash" in methods else []
    arms = [*((method, scale) for method in methods), *again]
    done = all_paths(arms, steps, pace, workers or len(os.sched_getaffinity(0)))
    paths = {method: done[method, scale] for method in methods}
    folder = Path(CSVLogger("logs", name="toy2d").log_dir)
    folder.mkdir(parents=True)
    write(paths, scale, pace, folder / "paths.csv")
    draw(paths, scale, folder / "paths.png")
    console = Console(highlight=False)
    console.width = max(console.width, 118)
    console.print(table(paths, scale, steps, pace))
    if again:
        text = ", ".join(f"{far:.0e}" for far in distances(done["nash", scale], done["nash", other]))
        console.print(
            f"nash, first loss x {scale:g} against x {other:g}, largest distance on the way to the front: {text}\n"
            "(from 0, 0 one coordinate's gradient is zero by symmetry, and Adam makes steps of its rounding; a scale "
            "that binary numbers hold exactly, such as 0.125, leaves no rounding)"
        )
    if out is not None:
        shutil.copyfile(folder / "paths.png", out)
    console.print(f"drawing  {folder / 'paths.png'}\npaths    {folder / 'paths.csv'}")
    console.print(f"{time.perf_counter() - started:.0f} s in all")
    return paths


def main(args: Sequence[str] | None = None) -> dict[str, Tensor]:
    """The command line of this recipe; returns the paths."""
    return auto_cli(toy2d, args=None if args is None else list(args))


if __name__ == "__main__":
    main()
