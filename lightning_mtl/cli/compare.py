"""Train the arms of a comparison side by side, one process per core, and report what came out."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import math
import multiprocessing
import os
import re
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import Any

from lightning_mtl.cli.comparison import Comparison, Results, Row
from lightning_mtl.cli.folder import Recipe, RecipeError, make_importable

# The runs share the machine, so each is small and quiet; any of it can be overridden on the command line.
_TRAINER = (
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.limit_val_batches=0",
)


@dataclass(frozen=True)
class Trained:
    """What a run leaves.

    Args:
        metrics: those of the test, without ``test/``.
        seconds: of CPU time, training and test.
        auxiliary: the names of its model's auxiliary tasks.
    """

    metrics: Mapping[str, float]
    seconds: float
    auxiliary: Sequence[str] = ()


@dataclass(frozen=True)
class Run:
    """One training run: the arm and seed it belongs to, its command line, and where it logs."""

    arm: str
    seed: int
    arguments: tuple[str, ...]
    folder: Path


def compare(
    recipe: Recipe,
    *,
    seeds: Sequence[int] = (0,),
    arms: Sequence[str] | None = None,
    epochs: int | None = None,
    workers: int | None = None,
    out: str | None = None,
    arguments: Sequence[str] = (),
) -> Results:
    """Train every arm on every seed; print the table and its reading; write ``rows.csv`` and ``compare.png``.

    Args:
        recipe: a recipe with a constant ``COMPARE``.
        seeds: one run per arm and seed.
        arms: which arms, besides the base; by default all.
        epochs: in place of the recipe's own number.
        workers: processes of one thread each; by default one per core.
        out: the folder to write into; by default a new one under ``logs/compare``.
        arguments: go to every run.

    Raises: ``RecipeError`` if the recipe declares no comparison, an arm is unknown, or the folder is not empty.
    """
    from lightning_mtl.cli import report

    started = time.perf_counter()
    folder = _empty_folder(recipe, out)
    context = _start_method()
    module = load(recipe.path)
    comparison = _comparison_of(module, recipe)
    extra = [*([f"--trainer.max_epochs={epochs}"] if epochs else []), *arguments]
    runs = plan(comparison, folder, seeds, _known(arms, comparison), extra)
    if extra:
        _parse_only(module, runs[0])
    workers = min(workers or _cores(), len(runs))
    report.announce(f"{recipe.name}: {len(runs)} runs, seeds {_text(seeds)}, {workers} at a time")
    done: dict[Run, Trained] = {}
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        # Backwards: the dear arms tend to stand last, and started first they leave no core idle at the end.
        futures = {pool.submit(train, recipe.path, run.arguments): run for run in reversed(runs)}
        try:
            for future in as_completed(futures):
                run = futures[future]
                done[run] = future.result()
                report.announce(f"[{len(done)}/{len(runs)}] {run.folder.name}, {done[run].seconds:.1f} CPU seconds")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    results = collect(comparison, {run: done[run] for run in runs})
    report.show(recipe.name, comparison, results, folder, time.perf_counter() - started)
    return results


def load(path: Path) -> ModuleType:
    """Import a recipe's file under its own name, wherever it lies."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # LightningCLI and pickle look the recipe's classes up by the name of their module.
    sys.modules[path.stem] = module
    make_importable(path)
    spec.loader.exec_module(module)
    return module


def plan(
    comparison: Comparison, folder: Path, seeds: Sequence[int], arms: Sequence[str], extra: Sequence[str]
) -> list[Run]:
    """The runs of every arm on every seed, in the order of the table; seeds are the outer loop."""
    runs = []
    for seed in seeds:
        for arm in arms:
            lines = comparison.arms[arm]
            for number, line in enumerate(lines, start=1):
                name = "-".join(re.findall(r"\w+", arm)) + (f"-{number}" if len(lines) > 1 else "") + f"-seed{seed}"
                log = (f"--trainer.logger.{key}={value}" for key, value in _logger(folder, name).items())
                words = ["fit", f"--seed_everything={seed}", *_TRAINER, *log, *shlex.split(line), *extra]
                runs.append(Run(arm, seed, tuple(words), folder / name))
    return runs


def train(path: Path, arguments: Sequence[str]) -> Trained:
    """Run one command line of a recipe and test the model that it leaves."""
    from lightning_mtl.module import MultiTaskModule

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    module = load(path)
    started = time.process_time()
    cli = module.main(list(arguments))
    (metrics,) = cli.trainer.test(cli.model, cli.datamodule, verbose=False)
    tasks = list(cli.model.tasks.items()) if isinstance(cli.model, MultiTaskModule) else []
    return Trained(
        {key.removeprefix("test/"): value for key, value in metrics.items()},
        time.process_time() - started,
        [name for name, task in tasks if task.role == "auxiliary"],
    )


def collect(comparison: Comparison, done: Mapping[Run, Trained]) -> Results:
    """One row per arm and seed, from the runs that it consists of.

    A task that is auxiliary in any of the runs does not count in delta m, in none of the arms.
    """
    from lightning_mtl.metrics import delta_m

    tasks = {name for trained in done.values() for name in trained.auxiliary}
    auxiliary = [score for score in comparison.scores if score.removeprefix("loss/").partition("/")[0] in tasks]
    merged: dict[tuple[str, int], dict[str, float]] = {}
    for run, trained in done.items():
        known = {score: trained.metrics[score] for score in comparison.scores if score in trained.metrics}
        merged.setdefault((run.arm, run.seed), {}).update(known)
    rows = []
    for (arm, seed), scores in merged.items():
        main = {score: value for score, value in scores.items() if score not in auxiliary}
        base = {score: merged[comparison.base, seed][score] for score in main}
        higher = {score: comparison.scores[score] for score in main}
        mine = [run for run in done if (run.arm, run.seed) == (arm, seed)]
        rows.append(
            Row(
                arm,
                seed,
                scores,
                delta_m(main, base, higher) if main else math.nan,
                sum(done[run].seconds for run in mine),
                [run.folder for run in mine],
            )
        )
    order = list(comparison.arms)
    return Results(sorted(rows, key=lambda row: order.index(row.arm)), auxiliary)


def _cores() -> int:
    """Those that this process may use, which in a container can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start_method() -> Any:
    """Processes that import torch once, in a server started here, while this process imports it too."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    from multiprocessing import forkserver

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lightning_mtl.cli.recipe_cli"])
    forkserver.ensure_running()
    return context


def _empty_folder(recipe: Recipe, out: str | None) -> Path:
    folder = Path(out) if out else Path("logs", "compare", recipe.name, datetime.now().strftime("%Y%m%d-%H%M%S"))
    if folder.is_dir() and any(folder.iterdir()):
        raise RecipeError(f"lightning-mtl: `out` must be an empty or a new folder, got {folder}. Choose another one.")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _comparison_of(module: ModuleType, recipe: Recipe) -> Comparison:
    comparison = getattr(module, "COMPARE", None)
    if not isinstance(comparison, Comparison):
        raise RecipeError(
            f"lightning-mtl: `recipe` must declare COMPARE, got {recipe.name!r} without it. "
            "Give it a constant of that name (lightning_mtl.cli.comparison.Comparison)."
        )
    return comparison


def _known(arms: Sequence[str] | None, comparison: Comparison) -> list[str]:
    unknown = [arm for arm in arms or () if arm not in comparison.arms]
    if unknown:
        raise RecipeError(
            f"lightning-mtl: `arms` must be among {_text(comparison.arms)}, got {_text(unknown)}. Correct the name."
        )
    return [arm for arm in comparison.arms if arms is None or arm in arms or arm == comparison.base]


def _parse_only(module: ModuleType, run: Run) -> None:
    """Stop here, and not in every worker, if the recipe does not know an argument."""
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            module.main([*run.arguments, "--print_config"])
        except SystemExit as stop:
            if stop.code:
                raise


def _logger(folder: Path, name: str) -> dict[str, str]:
    return {"save_dir": str(folder), "name": "null", "version": name}


def _text(values: Any) -> str:
    return ", ".join(map(str, values))
