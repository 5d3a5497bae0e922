"""Representation bias, second experiment: a task with a favourite draws the other to what it builds."""

import time
from pathlib import Path

import torch

from _caruana.cues import Task, follow, product
from _caruana.study import Study, finish
from _lab.stats import paired


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
