"""The laws of balancers, each written once and run over the table in ``cases.py``."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_mtl.balancers import Balancer, GramBalancer, LossBalancer, RowBalancer, available, load
from tests.balancers.cases import (
    CASES,
    Case,
    combine,
    end_epoch,
    gram,
    in_order,
    losses,
    outcome,
    rows,
    shown,
    state_of,
    weigh,
)

TESTED: set[str] = set()


def over(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=[case.key for case in cases])


def promised(promise: str) -> pytest.MarkDecorator:
    """Run for the balancers that give the promise."""
    TESTED.add(promise)
    return over([case for case in CASES if promise in case.promises])


ALL = over(CASES)
GRAM = over([case for case in CASES if isinstance(case.make(2), GramBalancer)])
LOSS = over([case for case in CASES if isinstance(case.make(2), LossBalancer)])
ROWS = over([case for case in CASES if isinstance(case.make(2), RowBalancer)])
# Sizes of the rows: their squares reach from nothing to 1e20.
SIZES = pytest.mark.parametrize("size", [0.0, 1e-10, 1e-5, 1.0, 1e5, 1e10])
SHAPES = pytest.mark.parametrize("num_tasks, rank", [(1, 1), (2, 1), (2, 2), (4, 2), (5, 5), (9, 11)])


def state(balancer: Balancer) -> Tensor:
    """All state as one vector; NaN (not known yet) as -7."""
    parts = [value.double().flatten() for value in balancer.state_dict().values()]
    return torch.cat([*parts, torch.zeros(0, dtype=torch.float64)]).nan_to_num(-7)


def run(balancer: Balancer, num_tasks: int, steps: int = 4, step: Callable[..., Tensor] = outcome) -> Tensor:
    """The outcomes of a few more steps, each the last of an epoch."""
    found = []
    for seed in range(50, 50 + steps):
        found.append(step(balancer, rows(num_tasks, seed=seed), losses(num_tasks, seed=seed)).clone())
        end_epoch(balancer, seed)
    return torch.stack(found)


# The table is complete.


def test_every_balancer_has_its_line():
    missing = set(available()) - {case.key for case in CASES}
    assert not missing, f"add a line to tests/balancers/cases.py for {sorted(missing)}"
    assert sorted(case.key for case in CASES) == available()


def test_every_promise_has_its_test():
    missing = {promise for case in CASES for promise in case.promises} - TESTED
    assert not missing, f"write a test decorated with @promised for {sorted(missing)}"


# Laws of all.


@ALL
def test_known_first_step(case):
    two = torch.tensor([[-4.0, 1, 1], [6, 1, 1]], dtype=torch.float64)
    assert case.known or case.update
    if case.known:
        assert weigh(case.make(2), two, torch.ones(2)).tolist() == pytest.approx(case.known)
    if case.update:
        assert combine(case.make(2), two, torch.ones(2)).tolist() == pytest.approx(case.update)


@ALL
def test_a_single_task(case):
    expected = {"inverse": 1 / float(losses(1)), "unit": 1 / float(rows(1).norm())}.get(case.alone, case.alone)
    update = combine(case.make(1), rows(1), losses(1))
    torch.testing.assert_close(update, expected * rows(1)[0], rtol=1e-6, atol=0)


@over([case for case in CASES if not isinstance(case.make(2), RowBalancer)])
@pytest.mark.parametrize("present", [None, [True, False, True, True]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_combine_is_weights_times_rows(case, dtype, present):
    balancer, given = case.used(4), rows(4).to(dtype)
    mask = None if present is None else torch.tensor(present)
    weights = weigh(deepcopy(balancer), given.double(), losses(4), mask)
    update = combine(balancer, given, losses(4), mask)
    expected = sum(float(weight) * row for weight, row in zip(weights, given, strict=True))
    assert update.dtype == dtype
    torch.testing.assert_close(update, expected, rtol=1e-5, atol=1e-5)


@ALL
def test_combine_counts_as_one_step(case):
    one, other = case.used(3), case.used(3)
    combine(one, rows(3), losses(3))
    outcome(other, rows(3), losses(3))
    torch.testing.assert_close(state(one), state(other), rtol=1e-12, atol=0)


@ALL
@SIZES
@SHAPES
def test_finite_on_any_rows(case, num_tasks, rank, size):
    balancer = case.make(num_tasks)
    for seed in range(3):
        given = size * rows(num_tasks, rank=rank, seed=seed)
        found = outcome(balancer, given, losses(num_tasks, seed))
        assert found.shape == (given.shape[1] if isinstance(balancer, RowBalancer) else num_tasks,)
        assert found.isfinite().all()
    assert state(balancer).isfinite().all()


@ALL
@pytest.mark.parametrize("which", [[0], [1, 2], [0, 1, 2]])
def test_finite_with_rows_of_zeros(case, which):
    given = rows(3)
    given[which] = 0
    assert outcome(case.used(3), given, losses(3)).isfinite().all()


@ALL
def test_finite_with_equal_and_opposite_rows(case):
    row = rows(1)[0]
    assert outcome(case.used(4), torch.stack([row, row, -row, 1e-9 * row]), losses(4)).isfinite().all()


@ALL
def test_state_survives_a_checkpoint(case):
    used, fresh = case.used(3), case.make(3)
    fresh.load_state_dict(used.state_dict())
    assert torch.equal(run(fresh, 3), run(used, 3))
    assert torch.equal(state(fresh), state(used))


@ALL
@pytest.mark.parametrize("copy", [deepcopy, lambda b: pickle.loads(pickle.dumps(b))], ids=["deepcopy", "pickle"])
def test_state_survives_a_copy(case, copy):
    used = case.used(3)
    twin = copy(used)
    expected = run(used, 3)
    assert torch.equal(run(twin, 3), expected)


@ALL
@pytest.mark.parametrize("move", ["bfloat16", "half", "float", "double"])
def test_state_keeps_its_dtype_and_values(case, move):
    balancer = case.used(3)
    before = {name: (value.dtype, value.clone()) for name, value in balancer.named_state()}
    getattr(balancer, move)()
    for name, value in balancer.named_state():
        dtype, values = before[name]
        assert value.dtype == dtype
        assert torch.equal(value.nan_to_num(-7), values.nan_to_num(-7))


@ALL
def test_only_what_is_said_is_trainable(case):
    assert tuple(name for name, _ in case.make(3).named_parameters()) == case.learned


@ALL
def test_the_outcome_carries_no_graph(case):
    found = outcome(case.used(3), rows(3).requires_grad_(), losses(3).requires_grad_())
    assert not found.requires_grad


# Absent tasks.


def without(balancer: Balancer, task: int) -> Balancer:
    """The balancer of the other tasks, in the same state."""
    smaller = load(_key(balancer), balancer.num_tasks - 1)
    others = [t for t in range(balancer.num_tasks) if t != task]
    smaller.load_state_dict({n: state_of(v, others, balancer.num_tasks) for n, v in balancer.state_dict().items()})
    return smaller


def _key(balancer: Balancer) -> str:
    return type(balancer).__module__.rpartition(".")[2]


@over([case for case in CASES if "random" not in case.promises])
@pytest.mark.parametrize("task", range(4))
def test_an_absent_task_is_dropped(case, task):
    if task == 0 and "equivariant_but_first" in case.promises:
        pytest.skip("the first task is not like the others: see test_without_the_first_the_others_are_equal")
    balancer = case.used(4)
    others = [t for t in range(4) if t != task]
    smaller = without(balancer, task)
    present = torch.tensor([t != task for t in range(4)])
    found = outcome(balancer, rows(4), losses(4), present)
    expected = outcome(smaller, rows(4)[others], losses(4)[others])
    assert isinstance(balancer, RowBalancer) or found[task] == 0
    # Twenty long steps, as SDMGrad makes them, enlarge what rounding leaves.
    assert in_order(balancer, found, others).tolist() == pytest.approx(expected.tolist(), rel=1e-9, abs=1e-12)


@ALL
@pytest.mark.parametrize("task", range(4))
def test_the_state_of_an_absent_task_does_not_move(case, task):
    balancer = case.used(4)
    before = deepcopy(balancer.state_dict())
    outcome(balancer, rows(4), losses(4), torch.tensor([t != task for t in range(4)]))
    for name, value in balancer.state_dict().items():
        if name.endswith("last_weights"):  # what was done, not what is remembered
            continue
        for dim, size in enumerate(value.shape):
            if size == 4:
                assert torch.equal(
                    value.select(dim, task).nan_to_num(-7), before[name].select(dim, task).nan_to_num(-7)
                )


@ALL
def test_what_an_absent_task_shows_does_not_matter(case):
    present = torch.tensor([True, False, True])
    one, other = case.used(3), case.used(3)
    odd_rows, odd_losses = rows(3), losses(3)
    odd_rows[1], odd_losses[1] = torch.nan, torch.inf
    expected = outcome(one, rows(3), losses(3), present)
    assert torch.equal(outcome(other, odd_rows, odd_losses, present), expected)
    assert torch.equal(state(one), state(other))


@ALL
def test_with_all_tasks_absent_nothing_moves(case):
    balancer = case.used(3)
    before = state(balancer).clone()
    nobody = torch.zeros(3, dtype=torch.bool)
    assert not outcome(balancer, rows(3), losses(3), nobody).any()
    assert combine(balancer, rows(3), losses(3), nobody).tolist() == [0] * 7
    assert torch.equal(state(balancer), before)


@ALL
def test_a_task_that_was_absent_at_first_joins_later(case):
    balancer = case.make(3)
    outcome(balancer, rows(3), losses(3), torch.tensor([True, True, False]))
    assert run(balancer, 3).isfinite().all()


# Laws of the methods that see the gram.


@GRAM
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["gram", "losses"])
def test_what_is_not_finite_gives_nan_and_moves_no_state(case, bad, where):
    balancer = case.used(3)
    before = state(balancer).clone()
    given: dict[str, Any] = {"gram": gram(balancer, rows(3)), "losses": losses(3)}
    given[where].view(-1)[1] = bad
    assert balancer(given["gram"], given["losses"]).isnan().all()
    assert torch.equal(state(balancer), before)


@GRAM
def test_weights_are_float64_on_the_cpu_whatever_comes(case):
    balancer = case.make(3)
    weights = balancer(gram(balancer, rows(3)).bfloat16(), losses(3).half())
    assert (weights.dtype, weights.device.type) == (torch.float64, "cpu")


@GRAM
def test_every_n_steps(case):
    balancer = load(case.key, 3, every_n_steps=3)
    solved, weights = [], []
    for step in range(7):
        solved.append(balancer.due)
        given = rows(3, seed=step)
        weights.append(combine(balancer, given, losses(3, step)) @ torch.linalg.pinv(given))
    assert solved == [True, False, False, True, False, False, True]
    torch.testing.assert_close(weights[1], weights[0])
    torch.testing.assert_close(weights[5], weights[3])
    assert int(balancer.step) == 7


@GRAM
def test_a_reused_step_gives_an_absent_task_nothing(case):
    balancer = case.used(3)
    last = balancer.last_weights.clone()
    assert torch.equal(balancer.reuse(torch.tensor([True, False, True])), last * torch.tensor([1, 0, 1]))
    assert torch.equal(balancer.last_weights, last)


# Laws of the methods that see the rows.


@ROWS
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["rows", "losses"])
@pytest.mark.parametrize("used", [True, False])
def test_rows_that_are_not_finite_give_nan_and_move_no_state(case, bad, where, used):
    balancer = case.used(3) if used else case.make(3)
    before = state(balancer).clone()
    given: dict[str, Any] = {"rows": rows(3), "losses": losses(3)}
    given[where].view(-1)[1] = bad
    update = balancer.combine(given["rows"], given["losses"])
    assert update.shape == (7,)
    assert update.isnan().all()
    assert torch.equal(state(balancer), before)


@ROWS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_an_update_has_the_dtype_of_its_rows(case, dtype):
    wide, balancer = case.make(3), case.make(3)
    for seed in range(3):
        given = rows(3, seed=seed).to(dtype)
        update = balancer.combine(given, losses(3, seed).to(dtype))
        expected = wide.combine(given.double(), losses(3, seed).to(dtype).double())
        assert update.dtype == dtype
        torch.testing.assert_close(update, expected.to(dtype), rtol=4 * torch.finfo(dtype).eps + 1e-5, atol=1e-5)


@ROWS
def test_the_dtype_of_the_rows_may_change(case):
    one, other = case.make(3), case.make(3)
    for seed, dtype in enumerate([torch.float32, torch.float64, torch.bfloat16, torch.float32]):
        given = rows(3, seed=seed).bfloat16()
        update = one.combine(given.to(dtype), losses(3, seed))
        expected = other.combine(given.double(), losses(3, seed))
        torch.testing.assert_close(update.double(), expected, rtol=1e-2, atol=1e-2)


@ROWS
def test_a_checkpoint_from_before_the_first_step(case):
    used = case.used(3)
    used.load_state_dict(case.make(3).state_dict())
    assert torch.equal(run(used, 3), run(case.make(3), 3))


@ROWS
def test_the_number_of_columns_may_not_change(case):
    balancer = case.used(3)
    if not any(getattr(balancer, name).numel() for name in balancer.growing):
        assert balancer.combine(rows(3, num=9), losses(3)).shape == (9,)
        return
    before = state(balancer).clone()
    with pytest.raises(ValueError, match=r"`rows` must have 7 columns, as many as before, got 9\."):
        balancer.combine(rows(3, num=9), losses(3))
    assert torch.equal(state(balancer), before)


@GRAM
def test_a_task_that_was_absent_at_the_solve_waits_for_the_next(case):
    balancer = load(case.key, 3, every_n_steps=2)
    given = shown(balancer, rows(3))
    balancer.combine(given, losses(3), torch.tensor([True, True, False]))
    weights = balancer.reuse().view(-1, 3)
    assert (weights[:, 2] == 0).all()
    assert (weights[:, :2] == balancer.last_weights.view(-1, 3)[:, :2]).all()


# Laws of the methods that see the losses only.


@LOSS
def test_weights_are_the_gradient_of_the_objective(case):
    balancer, leaf = case.used(4), losses(4).requires_grad_()
    balancer(leaf).backward()
    assert torch.equal(balancer.weights(losses(4)), leaf.grad)


@LOSS
def test_the_objective_moves_no_state(case):
    balancer = case.used(4)
    before = state(balancer).clone()
    first = balancer(losses(4)).item()
    assert balancer(losses(4)).item() == first
    assert torch.equal(state(balancer), before)


@LOSS
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_loss_that_is_not_finite_shows_and_moves_no_state(case, bad):
    balancer, given = case.used(3), losses(3)
    before = state(balancer).clone()
    given[1] = bad
    assert not balancer(given).isfinite()
    weights = weigh(balancer, rows(3), given)
    # Weights that do not depend on the losses leave it to the gradients to show what is wrong.
    assert not weights.isfinite().any() or torch.equal(weights, weigh(deepcopy(balancer), rows(3), losses(3)))
    assert torch.equal(state(balancer), before)


@LOSS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [(1e-30, 1e-30, 1e-30), (1e30, 1e30, 1e30), (1e-30, 1.0, 1e30), (1.0, 1.0, 1.0)])
def test_finite_for_small_large_and_equal_losses(case, sizes, dtype):
    balancer = case.make(3)
    for seed in range(6):
        given = torch.tensor(sizes, dtype=dtype)
        assert weigh(balancer, rows(3), given).isfinite().all()
        assert balancer(given).isfinite()
        end_epoch(balancer, seed)
    assert state(balancer).isfinite().all()


# What only some promise.


@promised("scale_free")
@pytest.mark.parametrize("factor", [1e-8, 1e-3, 7.0, 1e8])
def test_scale_free(case, factor):
    one, other = case.used(4), case.used(4)
    for seed in range(3):
        update = combine(one, rows(4, seed=seed), losses(4, seed))
        scaled = combine(other, factor * rows(4, seed=seed), losses(4, seed))
        torch.testing.assert_close(scaled / factor, update, rtol=1e-9, atol=1e-9)


@promised("scale_free_from_the_start")
@pytest.mark.parametrize("factor", [1e-8, 1e-3, 7.0, 1e8])
def test_scale_free_from_the_start(case, factor):
    one, other = case.make(4), case.make(4)
    for seed in range(4):
        update = combine(one, rows(4, seed=seed), losses(4, seed))
        scaled = combine(other, factor * rows(4, seed=seed), losses(4, seed))
        torch.testing.assert_close(scaled / factor, update, rtol=1e-9, atol=1e-9)


@promised("scale_power")
@pytest.mark.parametrize("factor", [1e-8, 1e-3, 7.0, 1e8])
def test_scale_power(case, factor):
    update = combine(case.make(4), rows(4), losses(4))
    scaled = combine(case.make(4), factor * rows(4), losses(4))
    torch.testing.assert_close(scaled / factor**case.power, update, rtol=1e-9, atol=1e-9)


def permuted(case: Case, order: list[int]) -> tuple[Tensor, Tensor]:
    """Outcomes of a few steps, and of the same steps with the tasks in another order, put back in order."""
    plain, other = case.used(len(order)), case.used(len(order))
    other.load_state_dict({n: state_of(v, order, len(order)) for n, v in other.state_dict().items()})
    back = torch.tensor(order).argsort().tolist()
    pairs = [(rows(len(order), seed=s), losses(len(order), s)) for s in range(4)]
    expected = torch.stack([outcome(plain, r, x) for r, x in pairs])
    found = torch.stack([in_order(other, outcome(other, r[order], x[order]), back) for r, x in pairs])
    return found, expected


@promised("loss_scale_free")
@pytest.mark.parametrize("seed", range(3))
def test_the_unit_of_a_loss_does_not_turn_the_update(case, seed):
    """A loss and its gradient are multiplied by one number, from the first step on."""
    one, other = case.make(4), case.make(4)
    units = torch.tensor([1e-4, 0.3, 1.0, 2e5], dtype=torch.float64)
    for step in range(8):
        given, values = rows(4, seed=10 * seed + step), losses(4, 10 * seed + step)
        update = combine(one, given, values)
        scaled = combine(other, units[:, None] * given, units * values)
        torch.testing.assert_close(scaled / scaled.norm(), update / update.norm(), rtol=1e-9, atol=1e-9)
        end_epoch(one), end_epoch(other)


@promised("random")
def test_random_weights_favour_no_place(case):
    balancer = case.make(3)
    drawn = run(balancer, 3, steps=600)
    # The mean of 600 weights has a standard error of about 0.01.
    assert drawn.mean(0).tolist() == pytest.approx([float(drawn.mean())] * 3, abs=0.04)
    assert drawn.std(0).tolist() == pytest.approx([float(drawn.std(0).mean())] * 3, rel=0.15)
    assert len(drawn.unique(dim=0)) == 600


@promised("random")
def test_without_a_task_the_random_weights_of_the_others_keep_their_proportion(case):
    whole = weigh(case.used(4), rows(4), losses(4))
    part = weigh(case.used(4), rows(4), losses(4), torch.tensor([True, False, True, True]))
    others = whole[[0, 2, 3]] / whole[[0, 2, 3]].sum() * whole.sum()
    assert part.tolist() == pytest.approx([float(others[0]), 0, float(others[1]), float(others[2])], rel=1e-12)


@promised("equivariant")
@pytest.mark.parametrize("order", [[1, 0, 2, 3], [3, 1, 0, 2], [3, 2, 1, 0]])
def test_equivariant(case, order):
    torch.testing.assert_close(*permuted(case, order), rtol=1e-12, atol=1e-12)


@promised("equivariant_for_two")
def test_equivariant_for_two(case):
    torch.testing.assert_close(*permuted(case, [1, 0]), rtol=1e-12, atol=1e-12)


@promised("equivariant_but_first")
@pytest.mark.parametrize("order", [[0, 2, 1, 3], [0, 3, 1, 2], [0, 3, 2, 1]])
def test_equivariant_but_first(case, order):
    torch.testing.assert_close(*permuted(case, order), rtol=1e-12, atol=1e-12)


@promised("equivariant_but_first")
def test_without_the_first_the_others_are_equal(case):
    weights = weigh(case.used(4), rows(4), losses(4), torch.tensor([False, True, True, True]))
    assert weights.tolist() in ([0, 1, 1, 1], [0, *[pytest.approx(1 / 3)] * 3])


@promised("sum_if_agreeing")
@pytest.mark.parametrize("num_tasks", [1, 2, 5])
def test_a_plain_sum_when_nothing_conflicts(case, num_tasks):
    agreeing = rows(num_tasks).abs()
    torch.testing.assert_close(combine(case.make(num_tasks), agreeing, losses(num_tasks)), agreeing.sum(0))


@promised("mean_if_agreeing")
@pytest.mark.parametrize("num_tasks", [1, 2, 5])
def test_the_mean_when_nothing_conflicts(case, num_tasks):
    agreeing = rows(num_tasks).abs()
    torch.testing.assert_close(combine(case.make(num_tasks), agreeing, losses(num_tasks)), agreeing.mean(0))


@promised("ignores_state")
def test_ignores_state(case):
    assert torch.equal(run(case.used(3), 3), run(case.make(3), 3))


@promised("no_task_of_two_gets_worse")
@pytest.mark.parametrize("seed", range(20))
def test_no_task_of_two_gets_worse(case, seed):
    given = rows(2, num=3, seed=seed)
    assert (given @ combine(case.make(2), given, losses(2)) >= -1e-12).all()


def progress(case: Case, num_tasks: int, seed: int) -> Tensor:
    """Cosines between the update and the gradients of tasks of different lengths."""
    given = torch.logspace(-2, 2, num_tasks)[:, None] * rows(num_tasks, seed=seed)
    update = combine(case.make(num_tasks), given, losses(num_tasks, seed))
    return given @ update / given.norm(dim=1) / update.norm()


SEVERAL = pytest.mark.parametrize("num_tasks, seed", [(n, s) for n in (2, 3, 6) for s in range(10)])


@promised("no_task_gets_worse")
@SEVERAL
def test_no_task_gets_worse(case, num_tasks, seed):
    assert (progress(case, num_tasks, seed) >= -1e-12).all()


@promised("all_but_the_first_advance")
@SEVERAL
def test_all_but_the_first_advance(case, num_tasks, seed):
    assert (progress(case, num_tasks, seed)[1:] > 0).all()


@promised("at_most_1_long")
@SEVERAL
def test_the_update_is_at_most_1_long(case, num_tasks, seed):
    assert combine(case.make(num_tasks), rows(num_tasks, seed=seed), losses(num_tasks, seed)).norm() <= 1 + 1e-12


@promised("equal_cosines")
@SEVERAL
def test_equal_cosines(case, num_tasks, seed):
    cosines = progress(case, num_tasks, seed)
    assert cosines.tolist() == pytest.approx([float(cosines[0])] * num_tasks, rel=1e-9)


@promised("equal_lengths")
@SEVERAL
def test_equal_lengths(case, num_tasks, seed):
    given = rows(num_tasks, seed=seed)
    lengths = weigh(case.make(num_tasks), given, losses(num_tasks, seed)) * given.norm(dim=1)
    assert lengths.tolist() == pytest.approx([float(lengths[0])] * num_tasks, rel=1e-12)


def bold(case: Case, num_tasks: int) -> Tensor:
    """The weights of many steps, with options that move the state fast."""
    return run(load(case.key, num_tasks, **case.bold), num_tasks, steps=30, step=weigh)


@promised("sums_to_T")
def test_sums_to_t(case):
    assert bold(case, 5).sum(1).tolist() == pytest.approx([5.0] * 30, rel=1e-12)


@promised("sums_to_1")
def test_sums_to_1(case):
    assert bold(case, 5).sum(1).tolist() == pytest.approx([1.0] * 30, rel=1e-12)


@promised("never_negative")
def test_never_negative(case):
    assert (bold(case, 3) >= 0).all()
