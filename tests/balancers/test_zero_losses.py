"""A loss of exactly 0 counts as absent where a method takes logarithms or ratios; one near 0 is bounded by a floor."""

from __future__ import annotations

from math import log
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_mtl.balancers import Balancer, GradNorm, LossBalancer, load
from tests.balancers.cases import end_epoch, gram, losses, rows

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "log_sum": ("log_sum", {}),
    "log_sum, offset": ("log_sum", {"loss_offset": -3.0}),
    "log_sum, offset above 0": ("log_sum", {"loss_offset": [0.0, 0.01, 0.0]}),
    "geometric_mean": ("geometric_mean", {}),
    "stch": ("stch", {"warmup_epochs": 2, "mu": 0.3}),
    "stch, warm": ("stch", {"warmup_epochs": 20}),
    "stch, plain": ("stch", {"warmup_epochs": 0, "preference": [1.0, 2.0, 3.0]}),
    "famo": ("famo", {"lr": 0.5}),
    "dwa": ("dwa", {}),
    "dwa, window": ("dwa", {"window": 2}),
    "uncertainty": ("uncertainty", {}),
    "uncertainty, own Adam": ("uncertainty", {"lr": 0.1}),
    "imtl_l": ("imtl_l", {}),
    "imtl_l, own Adam": ("imtl_l", {"lr": 0.1}),
}
ALL = pytest.mark.parametrize("case", CASES)
WHO = [[1], [0, 2], [0, 1, 2]]


def used(case: str) -> LossBalancer:
    """One whose state is no longer that of the first step."""
    key, options = CASES[case]
    balancer = load(key, 3, **options)
    assert isinstance(balancer, LossBalancer)
    with torch.no_grad():
        for parameter in balancer.parameters():
            parameter.copy_(torch.tensor([0.3, -0.8, 1.1]))
    for seed in range(5):
        balancer.advance(losses(3, seed))
        end_epoch(balancer, seed)
    return balancer


def step(balancer: LossBalancer, given: Tensor, present: Tensor | None = None) -> list[Tensor]:
    """The objective, its gradients, and the state after the step."""
    leaf = given.clone().requires_grad_()
    for parameter in balancer.parameters():
        parameter.grad = None
    objective = balancer(leaf, present)
    objective.backward()
    balancer.advance(given, present)
    learned = [p.grad for p in balancer.parameters() if p.grad is not None]
    return [objective.detach(), leaf.grad, *learned, *balancer.state_dict().values()]


@ALL
@pytest.mark.parametrize("who", WHO, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_absent_in_that_step(case, who, dtype):
    given, present = losses(3, 9).to(dtype), torch.ones(3, dtype=torch.bool)
    given[who], present[who] = 0, False
    one, other = used(case), used(case)
    for _ in range(2):
        for found, expected in zip(step(one, given), step(other, given, present), strict=True):
            torch.testing.assert_close(
                found, expected, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=0, equal_nan=True
            )
        assert (one.weights(given)[who] == 0).all()
    torch.testing.assert_close(one.weights(losses(3)), other.weights(losses(3)))


@ALL
def test_a_task_that_starts_at_0_and_one_that_was_absent_until_then_are_the_same(case):
    key, options = CASES[case]
    one, other = (load(key, 3, **options) for _ in range(2))
    for seed in range(6):
        given, late = losses(3, seed), torch.tensor([True, seed > 2, True])
        found = step(one, given.where(late, 0))
        expected = step(other, given, late)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, equal_nan=True)
        end_epoch(one), end_epoch(other)


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("uncertainty", "imtl_l")])
def test_the_host_does_not_wait_for_it(case):
    """On the meta device there is nothing to wait for: whoever looks at a value gets an error."""
    balancer = used(case)
    balancer(losses(3))
    balancer._move_state(torch.device("meta"))
    there = torch.ones(3, device="meta")
    assert balancer(there).is_meta
    balancer.advance(there)


# Near 0.


@pytest.mark.parametrize("case", ["log_sum", "geometric_mean", "stch, warm", "stch", "famo"])
@pytest.mark.parametrize("small", [1e-42, 1e-38, 1e-20, 1e-7])
def test_weights_near_0_are_finite(case, small):
    balancer = used(case)
    given = torch.tensor([1.0, small, 2.0])
    for _ in range(3):
        objective, weights, *_ = step(balancer, given)
        assert objective.isfinite()
        assert weights.isfinite().all()
    assert balancer.weights(losses(3)).isfinite().all()


@pytest.mark.parametrize("small", [1e-12, 1e-4, 1e-3, 1e-2, 1.0])
def test_a_floor_bounds_the_weight(small):
    """By hand: 1 / max(loss, floor); for the mean of logarithms times G / T, where G goes down along the tangent."""
    floor, given = 1e-3, torch.tensor([2.0, small], dtype=torch.float64)
    slope = 1 / max(small, floor)
    assert load("log_sum", 2, floor=floor).weights(given).tolist() == pytest.approx([0.5, slope])
    assert load("stch", 2, floor=floor).weights(given).tolist() == pytest.approx([0.5, slope])
    tangent = log(small) if small >= floor else log(floor) + (small - floor) / floor
    mean = torch.tensor((log(2.0) + tangent) / 2).exp().item()
    assert load("geometric_mean", 2, floor=floor).weights(given).tolist() == pytest.approx(
        [mean / 4, mean / 2 * slope], rel=1e-6
    )
    share = slope / (0.5 + slope)
    assert load("famo", 2, floor=floor).weights(given).tolist() == pytest.approx([1 - share, share])


def test_floors_are_per_task_and_above_the_offset():
    balancer = load("log_sum", 2, loss_offset={"a": -1.0}, floor={"a": 0.5})
    balancer.bind(["a", "b"])
    assert balancer.weights(torch.tensor([-0.9, 0.1])).tolist() == pytest.approx([2.0, 10.0])


def test_what_rounding_leaves_of_0_is_within_a_floor():
    """1 - cos may be a little less than 0."""
    assert load("log_sum", 2, floor=1e-4).weights(torch.tensor([1.0, -1e-7])).tolist() == pytest.approx([1.0, 1e4])


@pytest.mark.parametrize("key", ["log_sum", "geometric_mean", "stch", "famo"])
@pytest.mark.parametrize("floor", [0.0, -1.0, float("nan"), [1.0]])
def test_bad_floors(key, floor):
    with pytest.raises(ValueError, match="`floor` must"):
        load(key, 2, floor=floor)


@pytest.mark.parametrize("key", ["log_sum", "geometric_mean", "stch", "famo"])
def test_a_run_in_which_a_loss_reaches_0_goes_on(key):
    """A rare label: batches without a positive are learned until their loss is exactly 0."""
    torch.manual_seed(0)
    x = torch.randn(64, 4)
    encoder, heads = nn.Linear(4, 8), nn.ModuleList([nn.Linear(8, 1), nn.Linear(8, 1)])
    balancer = load(key, 2)
    optimizer = torch.optim.Adam([*encoder.parameters(), *heads.parameters()], lr=0.5)
    zeros = 0
    for _ in range(200):
        z = encoder(x).tanh()
        rare = nn.functional.relu(heads[0](z) + 1).mean()
        common = (heads[1](z) - x[:, :1]).square().mean()
        given = torch.stack([rare, common])
        zeros += int(rare == 0)
        optimizer.zero_grad()
        balancer(given).backward()
        balancer.advance(given.detach())
        optimizer.step()
    assert zeros > 10
    assert all(parameter.isfinite().all() for parameter in encoder.parameters())


# GradNorm, which compares with the first loss.


def gradnorm_step(balancer: Balancer, given: list[float], seed: int, present: Tensor | None = None) -> Tensor:
    assert isinstance(balancer, GradNorm)
    return balancer(gram(balancer, rows(3, seed=seed)), torch.tensor(given), present)


@pytest.mark.parametrize("offset", [0.0, -2.0])
def test_gradnorms_first_loss_is_the_first_above_its_offset(offset):
    """Until then the task keeps its weight, and the others move as if it were absent."""
    one, other = (GradNorm(3, lr=0.1, loss_offset=offset) for _ in range(2))
    for seed in range(5):
        given = losses(3, seed).tolist()
        late = torch.tensor([True, seed > 2, True])
        shown = [given[0], given[1] if seed > 2 else [0.0, offset, 0.0][seed % 3], given[2]]
        found, expected = gradnorm_step(one, shown, seed), gradnorm_step(other, given, seed, late)
        assert found[[0, 2]].tolist() == pytest.approx(expected[[0, 2]].tolist(), rel=1e-9)
        assert seed > 2 or found[1] == 1
        assert torch.equal(one.task_weights, other.task_weights)
    assert float(one.initial_losses[1]) == pytest.approx(losses(3, 3).tolist()[1], rel=1e-6)


def test_gradnorm_with_all_losses_at_0_stays():
    balancer = GradNorm(3)
    assert gradnorm_step(balancer, [0.0, 0.0, 0.0], 0).tolist() == [1, 1, 1]
    assert balancer.initial_losses.isnan().all()
    assert gradnorm_step(balancer, [1.0, 2.0, 3.0], 0).tolist() == [1, 1, 1]
    assert balancer.initial_losses.tolist() == [1, 2, 3]


# Between two methods.


@pytest.mark.parametrize(
    "first", ["log_sum", {"class_path": "fixed", "init_args": {"weights": [1.0, 0.0, 2.0]}}], ids=str
)
@pytest.mark.parametrize("then", ["mgda", "pcgrad", "nash"])
def test_a_chain_leaves_out_what_its_first_part_weighs_with_0(first, then):
    given, present = losses(3), torch.tensor([True, False, True])
    if first == "log_sum":
        given[1] = 0
    chain = load("chain", 3, first=first, then=then)
    scale = chain.first.weights(given)
    expected = load(then, 3).combine(scale[:, None] * rows(3), scale * given, present)
    assert expected.norm() > 1e-3
    torch.testing.assert_close(chain.combine(rows(3), given), expected, rtol=1e-9, atol=1e-12)
