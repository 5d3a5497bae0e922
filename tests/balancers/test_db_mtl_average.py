"""DB-MTL with its moving average, against its algorithm step by step."""

from __future__ import annotations

import pytest
import torch

from lightning_mtl.balancers import DBMTL, DBMTLAverage
from tests.balancers import oracles
from tests.balancers.cases import losses, rows


@pytest.mark.parametrize("beta, beta_decay", [(0.9, 0.0), (0.9, 0.5), (0.3, 0.0), (0.0, 0.0)])
@pytest.mark.parametrize("num_tasks", [1, 2, 4])
def test_equals_the_algorithm(num_tasks, beta, beta_decay):
    balancer = DBMTLAverage(num_tasks, beta=beta, beta_decay=beta_decay)
    steps = [(list(rows(num_tasks, seed=seed)), losses(num_tasks, seed).tolist()) for seed in range(10)]
    for (given, values), expected in zip(steps, oracles.db_mtl(steps, beta, beta_decay), strict=True):
        found = balancer.combine(torch.stack(given), torch.tensor(values, dtype=torch.float64))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_without_a_memory_it_is_dbmtl():
    one, other = DBMTLAverage(3, beta=0.0), DBMTL(3)
    for seed in range(4):
        given, values = rows(3, seed=seed), losses(3, seed)
        torch.testing.assert_close(one.combine(given, values), other.combine(given, values))


def test_the_first_average_is_the_first_gradient():
    balancer = DBMTLAverage(2)
    balancer.combine(rows(2), losses(2), torch.tensor([True, False]))
    balancer.combine(rows(2, seed=1), losses(2, 1))
    torch.testing.assert_close(balancer.averages[1], rows(2, seed=1)[1] / (losses(2, 1)[1] + 1e-8))
    assert balancer.seen.tolist() == [2, 1]


def test_heads_follow_the_logarithm_of_their_loss():
    leaf = losses(3).requires_grad_()
    torch.log(leaf + 1e-8).sum().backward()
    balancer = DBMTLAverage(3)
    torch.testing.assert_close(balancer.private_weights(losses(3)), leaf.grad)
    present = torch.tensor([True, False, True])
    torch.testing.assert_close(balancer.private_weights(losses(3), present), leaf.grad * present)


@pytest.mark.parametrize("loss", [-1e-3, -1.0])
def test_a_loss_that_has_no_logarithm_is_refused_and_moves_nothing(loss):
    balancer = DBMTLAverage(2)
    before = {name: value.clone() for name, value in balancer.state_dict().items()}
    with pytest.raises(ValueError, match=r"^DBMTLAverage: `losses` must be >= 0, because .*, got .*\. .*\.$"):
        balancer.combine(rows(2), torch.tensor([1.0, loss]))
    assert all(
        torch.equal(value.nan_to_num(-7), before[n].nan_to_num(-7)) for n, value in balancer.state_dict().items()
    )


def test_the_loss_of_an_absent_task_need_not_have_one():
    update = DBMTLAverage(2).combine(rows(2), torch.tensor([2.0, -1.0]), torch.tensor([True, False]))
    torch.testing.assert_close(update, rows(2)[0] / (2 + 1e-8))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"beta": 1.1}, r"`beta` must be a finite number >= 0 and <= 1, got 1\.1\. .*\."),
        ({"beta": -0.1}, r"`beta` must be .*, got -0\.1\. .*\."),
        ({"beta_decay": -0.5}, r"`beta_decay` must be a finite number >= 0, got -0\.5\. .*\."),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=f"^DBMTLAverage: {message}$"):
        DBMTLAverage(2, **options)
