"""Overfitting prevention: fewer hidden units for several tasks against more of them for one."""

import time
from pathlib import Path

import torch

from _caruana.regression import Arm, regression, train
from _caruana.study import Study, finish


def overfit(seeds: int = 30, seed: int = 0, sizes: tuple[int, ...] = (4, 16, 64), out: Path | None = None) -> Study:
    """Overfitting prevention: fewer hidden units for several tasks against more of them for one.

    Args:
        seeds: how many networks per arm.
        seed: of the data and the networks.
        sizes: hidden units; the first is the small net's.
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
    for kind, nets in kinds.items():
        study.scores |= {f"{kind}, h={h}, gap at the end": net.gap_at_the_end() for h, net in nets.items()}
    # The single task may choose its size by the test error itself: more than fair.
    best = min(sizes, key=lambda h: float(study.scores[f"1 task, h={h}"].mean()))
    study.compare(f"8 tasks, h={sizes[0]}", f"1 task, h={best}")
    for end in ("", ", to the end", ", gap at the end"):
        for h in sizes:
            study.compare(f"shuffled, h={h}{end}", f"1 task, h={h}{end}")
            study.compare(f"8 tasks, h={h}{end}", f"1 task, h={h}{end}")
    study.not_shown = (
        "that unrelated tasks regularise in general. As noise alone they help a tiny net that is trained to the end, "
        "harm larger ones there, and change little with early stopping; read the lines `shuffled`. Nor that related "
        "tasks replace early stopping: see `8 tasks, to the end`. A smaller gap between training and new rows is "
        "shown for the tiny net only, where shuffled tasks make it smaller too; larger nets' gap eight tasks widen."
    )
    return finish(study, started, out, [*(f"{kind}, h={h}" for h in sizes for kind in kinds)])
