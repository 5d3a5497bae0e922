"""Data amplification: more tasks on the same rows against more rows of one task."""

import time
from pathlib import Path

import torch
from torch import Tensor

from _caruana.regression import regression, train
from _caruana.study import Study, finish


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
    study.scores |= {f"{count} shuffled, 60 rows": error(count, shuffle=True) for count in tasks}
    for kind in ("tasks", "shuffled"):
        for count in tasks:
            study.compare(f"{count} {kind}, 60 rows", "1 task, 60 rows")
    for count in tasks:
        study.compare(f"{count} tasks, 60 rows", f"{count} shuffled, 60 rows")
    for size in rows:
        study.compare(f"{max(tasks)} tasks, 60 rows", f"1 task, {size} rows")
    study.not_shown = (
        "a firm gain from two tasks: there is none in a run of 30 seeds. Nor K-fold data from K tasks: the inputs are "
        "the same rows, only the noise on the targets is drawn again. Sixteen tasks on 60 rows stay behind 120 rows."
    )
    return finish(study, started, out)
