"""One loss per task from an unreduced one, against loops in plain Python."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mtl import Balanced
from lightning_mtl.tasks import losses_per_task
from tests.nets import WIDTH, mlp

NAMES = ["logP (o/w)", "type", "c"]
B, T = 7, 3


def by_hand(loss: Tensor, mask: Tensor | None, weights: Tensor | None) -> list[tuple[float | None, float]]:
    """Per task the mean and what it is the mean over, entry by entry."""
    found: list[tuple[float | None, float]] = []
    for t in range(loss.shape[1]):
        total = count = 0.0
        for b in range(len(loss)):
            if mask is None or mask[b, t]:
                weight = 1.0 if weights is None else float(weights[b] if weights.ndim == 1 else weights[b, t])
                total, count = total + weight * float(loss[b, t]), count + weight
        found.append((total / count if count else None, count))
    return found


WEIGHTS = {"none": None, "samples": torch.tensor([0.5, 2, 0, 1, 1, 3, 0.25]), "entries": torch.rand(B, T)}
MASKS = {
    "none": None,
    "some": torch.rand(B, T, generator=torch.Generator().manual_seed(1)) < 0.5,
    "a column": torch.tensor([True, False, True]).expand(B, T),
    "nothing": torch.zeros(B, T, dtype=torch.bool),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("mask", MASKS)
def test_means_and_counts(mask, weights, dtype):
    loss = torch.rand(B, T).to(dtype)
    losses, labelled = losses_per_task(loss, NAMES, MASKS[mask], WEIGHTS[weights])
    assert list(losses) == list(labelled) == NAMES
    wanted = by_hand(loss, MASKS[mask], WEIGHTS[weights])
    assert [None if mean is None else mean.item() for mean in losses.values()] == [
        None if mean is None else pytest.approx(mean, rel=1e-6) for mean, _ in wanted
    ]
    assert [float(count.sum()) for count in labelled.values()] == pytest.approx([count for _, count in wanted])
    integers = WEIGHTS[weights] is None
    assert all((count.dtype == torch.int64 and count.ndim == 0) == integers for count in labelled.values())
    assert all(integers or count.shape == (B,) for count in labelled.values())


@pytest.mark.parametrize("weights", WEIGHTS)
def test_gradients_are_those_of_the_labelled_entries(weights):
    output = torch.randn(B, T, dtype=torch.float64, requires_grad=True)
    target, mask, weight = torch.randn(B, T, dtype=torch.float64), MASKS["some"], WEIGHTS[weights]
    losses, _ = losses_per_task((output - target.masked_fill(~mask, 0)) ** 2, NAMES, mask, weight)
    for t, loss in enumerate(losses.values()):
        (found,) = torch.autograd.grad(loss, output, retain_graph=True)
        each = torch.ones(B, T) if weight is None else weight if weight.ndim == 2 else weight[:, None].expand(B, T)
        wanted = torch.zeros_like(output)
        rows = mask[:, t]
        wanted[rows, t] = (2 * (output - target)[:, t] * each[:, t] / each[rows, t].sum())[rows].detach()
        torch.testing.assert_close(found, wanted)


def test_weights_of_zero_alone_leave_a_task_out():
    losses, labelled = losses_per_task(torch.ones(2, 2), ["a", "b"], weights=torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
    assert losses["a"] is None
    assert losses["b"].item() == 1.0
    assert [count.sum().item() for count in labelled.values()] == [0.0, 1.0]


@pytest.mark.parametrize("weights", [None, torch.ones(0), torch.ones(0, 2)])
@pytest.mark.parametrize("mask", [None, torch.ones(0, 2, dtype=torch.bool)])
def test_an_empty_batch_has_no_loss(mask, weights):
    losses, labelled = losses_per_task(torch.ones(0, 2), ["a", "b"], mask, weights)
    assert losses == {"a": None, "b": None}
    assert [float(count.sum()) for count in labelled.values()] == [0.0, 0.0]


@pytest.mark.parametrize("parts", [[0, 3, 7], [0, 1, 2, 7]])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_means_of_parts_make_the_mean_of_all(weights, parts):
    """What several processes do: each mean times what it is the mean over, divided by the sum of these."""
    loss, mask, weight = torch.rand(B, T, dtype=torch.float64), MASKS["some"], WEIGHTS[weights]
    whole, _ = losses_per_task(loss, NAMES, mask, weight)
    total, over = dict.fromkeys(NAMES, 0.0), dict.fromkeys(NAMES, 0.0)
    for begin, end in itertools.pairwise(parts):
        rows = slice(begin, end)
        losses, labelled = losses_per_task(loss[rows], NAMES, mask[rows], None if weight is None else weight[rows])
        for name in NAMES:
            count = float(labelled[name].sum())
            total[name] += count * (0.0 if losses[name] is None else losses[name].item())
            over[name] += count
    assert {name: total[name] / over[name] for name in NAMES} == pytest.approx(
        {name: loss.item() for name, loss in whole.items()}
    )


def test_the_balanced_gradients_are_those_of_the_tasks_means():
    class Molecules(Balanced, nn.Module):
        _trainer, device = None, torch.device("cpu")

        def __init__(self) -> None:
            super().__init__(tasks=["a", "b", "c"], balancer="fixed")
            self.encoder, self.head = mlp(), nn.Linear(WIDTH, T)

    torch.manual_seed(0)
    model, x, target = Molecules(), torch.randn(B, 8), torch.randn(B, T)
    mask = MASKS["a column"] & MASKS["some"]
    target[~mask] = math.nan
    unreduced = F.mse_loss(model.head(model.encoder(x)), target.nan_to_num(), reduction="none")
    losses, labelled = losses_per_task(unreduced, ["a", "b", "c"], mask)
    model.balance(losses, labelled=labelled).backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    output = model.head(model.encoder(x))
    sum((output[mask[:, t], t] - target[mask[:, t], t]).square().mean() for t in (0, 2)).backward()
    for one, p in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(one, p.grad)


LOSS = torch.ones(4, 2)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((LOSS, ["a"]), r"`unreduced` must be a floating-point tensor \[B, T\] with T = 1, got \[4, 2\]"),
        ((LOSS.sum(1), ["a", "b"]), r"`unreduced` must be a floating-point tensor \[B, T\] with T = 2, got \[4\]"),
        ((LOSS.long(), ["a", "b"]), r"`unreduced` must be a floating-point tensor"),
        ((LOSS, ["a", "a"]), r"`names` must be distinct task names"),
        ((LOSS, "ab"), r"`names` must be distinct task names, got 'ab'"),
        ((LOSS, ["a", "b"], LOSS), r"`mask` must be a bool tensor \[4, 2\], got torch.float32 \[4, 2\]"),
        ((LOSS, ["a", "b"], LOSS[:, 0] > 0), r"`mask` must be a bool tensor \[4, 2\], got torch.bool \[4\]"),
        ((LOSS, ["a", "b"], None, LOSS[:3, 0]), r"`weights` must have shape \[4\] or \[4, 2\], got \[3\]"),
        ((LOSS, ["a", "b"], None, -LOSS), r"`weights` must be finite numbers >= 0"),
        ((LOSS, ["a", "b"], None, LOSS * math.nan), r"`weights` must be finite numbers >= 0"),
        ((LOSS * math.nan, ["a", "b"], LOSS < 0), r"`unreduced` must be finite where it does not count.*nan_to_num"),
        ((LOSS * math.inf, ["a", "b"], None, LOSS * 0), r"`unreduced` must be finite where it does not count"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(ValueError, match=f"^losses_per_task: {message}"):
        losses_per_task(*arguments)


def test_a_loss_that_is_not_finite_where_it_counts_is_handed_on():
    """A diverged model must be seen, and an overflow in half precision must reach the gradient scaler."""
    loss = torch.tensor([[1.0, math.inf], [2.0, 3.0]])
    losses, _ = losses_per_task(loss, ["a", "b"])
    assert losses["a"].item() == 1.5
    assert losses["b"].isinf()
