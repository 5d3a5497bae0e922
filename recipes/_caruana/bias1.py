"""Representation bias, first experiment: two tasks meet in the cue that both can use."""

import time
from pathlib import Path

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
    started = time.perf_counter()
    a, b, c = product(0, 1), product(2, 3), product(4, 5)
    t, t2 = Task(a, b), Task(a, c)
    study = Study("bias1", "representation bias 1: two tasks meet in the cue they share", "networks", "high")
    runs: list[tuple[tuple[str, ...], tuple[Task | None, Task | None]]] = [
        (("T alone",), (t, None)),
        (("T' alone",), (None, t2)),
        (("T together", "T' together"), (t, t2)),
        (("T with T' shuffled",), (t, Task(a, c, shuffle=True))),
    ]
    solved = []
    for keys, tasks in runs:
        # The shuffled task has no key: there is nothing to ask it.
        for key, (share, right) in zip(keys, follow(tasks, hidden, steps, seeds, seed).values(), strict=False):
            study.scores[key], study.sides[key] = share, ("A", "C" if key.startswith("T'") else "B")
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
