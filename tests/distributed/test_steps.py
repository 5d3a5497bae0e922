"""Single steps on two processes with unequal parts: the gradients that a person computes over the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tests.distributed.runs import Run
from tests.distributed.steps import CASES as EVERY_CASE
from tests.distributed.steps import NAMES, Case
from tests.engine.by_hand import by_hand, make, numbers
from tests.versions import has

FOUND = ("Counts", "HalfWeights", "Absent", "Nowhere", "Constant", "OffHere", "Off", "Plain", "Said", "Depths")
# Gloo of older versions adds up no complex numbers, with or without a balancer.
CASES = {name: case for name, case in EVERY_CASE.items() if name != "Complex" or has("torch", "2.13")}
LAYOUTS = ("Sparse", "SparseAbsent", "SparseNowhere", "Complex", "ChannelsLast")
LAYOUTS = tuple(name for name in LAYOUTS if name in CASES)
ZERO_IS_SAID = "The gradient of task 'b' is exactly zero"


def run(case: str, method: str, way: str = "told", level: str = "parameters") -> Run:
    return Run(method, level, do="step", model=case, labels=way)


RUNS = [
    *(run(case, method, "found") for case in FOUND for method in ("pcgrad", "moco")),
    *(
        run(case, "mgda", way)
        for case in CASES
        for way in ("told", "loop_told")
        if case != "Said" and (case, way) != ("Constant", "loop_told")
    ),
    *(run(case, "mgda", "told", "features") for case in CASES if case not in ("Said", "Depths")),
    *(run(case, "fixed") for case in ("Counts", "Absent", "Constant", "Plain", *LAYOUTS)),
    *(run(case, "moco") for case in LAYOUTS),
    *(run(case, "gradnorm", "found") for case in ("Depths", "Absent")),
]


def expected(given: Run) -> tuple[Case, list[Tensor]]:
    """By hand, over the whole batch on one process."""
    case = CASES[given.model]()
    losses, z = case.losses(None)
    parameters = list(case.parameters())
    shared: Any = case.shared
    there = [loss for loss in losses.values() if isinstance(loss, Tensor)]
    reached = [torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for loss in there]
    if shared is None and given.labels == "found":
        times = [sum(task[i] is not None for task in reached) for i in range(len(parameters))]
        shared = [p for p, number in zip(parameters, times, strict=True) if number > 1]
    elif shared is None:
        shared = list(case.encoder.parameters())
    at = tree_leaves(z) if given.level == "features" else None
    if at is not None and given.model == "Pooled":
        at = at[:1]  # the other is computed from it
    balancer = make(given.balancer, len(NAMES))
    found = by_hand(given.balancer, balancer, list(losses.values()), parameters, shared, at=at)
    if case.plain:
        extra = torch.autograd.grad(case.term(z, None), parameters, retain_graph=True, allow_unused=True)
        found = [a if b is None else b if a is None else a + b for a, b in zip(found, extra, strict=True)]
    return case, [torch.zeros_like(p) if grad is None else grad for p, grad in zip(parameters, found, strict=True)]


@pytest.mark.parametrize("given", RUNS, ids=lambda given: f"{given}")
def test_gradients_are_those_of_the_whole_batch(given, everything):
    case, want = expected(given)
    names = [name for name, _ in case.named_parameters()]
    for process in everything(given):
        for name, grad, right in zip(names, process["value"]["grads"], want, strict=True):
            torch.testing.assert_close(
                grad, right, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
            )
        said = [text for text in process["warnings"] if "strides" in text or "exactly zero" in text]
        zero = given.model == "Off" and given.balancer != "fixed"
        assert len(said) == zero, said
        assert all(ZERO_IS_SAID in text for text in said)


@pytest.mark.parametrize("given", [given for given in RUNS if given.model in LAYOUTS], ids=str)
def test_they_lie_as_their_parameters_do_and_are_sparse_where_those_are(given, together):
    case = CASES[given.model]()
    tables = ["words" in name for name, _ in case.named_parameters()]
    for process in together(given):
        assert process["sparse"] == tables
        assert all(process["strides"])


GRAMS = [Run("gradnorm_at_last", do="step", model=case, labels="found") for case in ("Depths", "Absent", "Nowhere")]


@pytest.mark.parametrize("given", GRAMS, ids=str)
def test_the_last_layer_is_one_that_all_present_tasks_reach_on_every_process(given, together):
    case = CASES[given.model]()
    losses, _ = case.losses(None)
    layer = case.encoder[0] if given.model == "Depths" else case.encoder[2]
    there = [place for place, name in enumerate(NAMES) if losses[name] is not None]
    rows = []
    for place in there:
        grads = torch.autograd.grad(losses[NAMES[place]], list(layer.parameters()), retain_graph=True)
        rows.append(torch.cat([numbers(grad, p) for grad, p in zip(grads, layer.parameters(), strict=True)]))
    want = torch.stack([torch.stack([a @ b for b in rows]) for a in rows])
    for process in together(given):
        torch.testing.assert_close(process["gram"][there][:, there], want, rtol=1e-9, atol=1e-12)
