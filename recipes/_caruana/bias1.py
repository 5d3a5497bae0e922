"""Representation bias, first experiment: two tasks meet in the cue that both can use."""

import time
from pathlib import Path

import torch

from _caruana.cues import Task, follow, product
from _caruana.study import Study, finish


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
