"""Representation bias, second experiment: a task with a favourite draws the other to what it builds."""

import time
from pathlib import Path

from _caruana.cues import Task, follow, product
from _caruana.study import Study, finish
from _lab.stats import paired


def bias2(
    seeds: int = 60, seed: int = 0, steps: int = 1200, sizes: tuple[int, ...] = (8, 4), out: Path | None = None
) -> Study:
    """Representation bias, second experiment: a task with a favourite draws the other to what it builds.

    T takes B, which is linear and easy, rather than A. T' can use A or C; C reuses what T builds for B. In the control
    C is apart from B. Both in nets of two sizes.

    Args:
        seeds: how many networks per arm.
        seed: of the data and the networks.
        steps: of training.
        sizes: units in the shared layer.
        out: a further place for the figure.
    """
    started = time.perf_counter()
    a, b = product(0, 1), product(2)
    study = Study("bias2", "representation bias 2: T' goes where T already is", "networks", "high")
    kinds = {"C on x2": product(2, 3), "C apart": product(3, 4)}
    for hidden in sizes:
        shifts = {}
        for kind, c in kinds.items():
            t, t2, where = Task(a, b), Task(a, c), f"{kind}, h={hidden}"
            # T alone knows nothing of C: the same nets in both kinds.
            scores = {f"T alone, h={hidden}": follow((t, None), hidden, steps, seeds, seed)[0][0]}
            scores[f"T' alone, {where}"] = follow((None, t2), hidden, steps, seeds, seed)[1][0]
            together = follow((t, t2), hidden, steps, seeds, seed)
            scores |= {f"T together, {where}": together[0][0], f"T' together, {where}": together[1][0]}
            study.scores |= scores
            study.sides |= {key: ("A", "C" if key.startswith("T'") else "B") for key in scores}
            shifts[kind] = scores[f"T' alone, {where}"] - scores[f"T' together, {where}"]
            study.compare(f"T' together, {where}", f"T' alone, {where}", best="low")
        study.tests[f"that shift, C on x2 against C apart, h={hidden}"] = paired(*shifts.values(), best="high")
    study.not_shown = (
        "that T' follows T in general. C has to reuse what T builds, here x2, and there has to be room: where C is "
        "apart (x3 x4) T' is not drawn to it, and in a net of four hidden units it is not seen to be drawn to either C."
    )
    return finish(study, started, out, [arm for arm in study.scores if arm.startswith("T'")])
