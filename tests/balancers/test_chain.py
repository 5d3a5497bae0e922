"""A chain equals two balancers by hand: scale the losses and the rows, then combine."""

from __future__ import annotations

from math import exp
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_mtl.balancers import DBMTL, Chain, GramBalancer, load
from tests.balancers.cases import losses, rows

FIXED = {"class_path": "fixed", "init_args": {"weights": [0.5, 2.0, 0.1]}}
PRESENT = [None, torch.tensor([True, False, True])]


def scaled(scale: Tensor, given: Tensor) -> Tensor:
    """The rows of the scaled losses, task by task."""
    return torch.stack([float(factor) * row for factor, row in zip(scale, given, strict=True)])


@pytest.mark.parametrize("present", PRESENT, ids=["all", "one absent"])
@pytest.mark.parametrize("then", ["pcgrad", "mgda", "cagrad", "db_mtl", "nash", "imtl_g", "famo"])
def test_equals_fixed_weights_on_the_losses_and_then_the_second(then, present):
    chain, second = Chain(3, FIXED, then), load(then, 3)
    scale = torch.tensor([0.5, 2.0, 0.1], dtype=torch.float64)
    for seed in range(4):
        found = chain.combine(rows(3, seed=seed), losses(3, seed), present)
        expected = second.combine(scaled(scale, rows(3, seed=seed)), scale * losses(3, seed), present)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_with_uncertainty_first():
    """A half of exp(-s) weighs a loss."""
    chain, second = Chain(3, "uncertainty", "mgda"), load("mgda", 3)
    log_variance = [0.3, -1.0, 2.0]
    with torch.no_grad():
        chain.first.log_variance.copy_(torch.tensor(log_variance))
    scale = torch.tensor([0.5 * exp(-s) for s in log_variance], dtype=torch.float64)
    expected = second.combine(scaled(scale, rows(3)), scale * losses(3))
    torch.testing.assert_close(chain.combine(rows(3), losses(3)), expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(chain.private_weights(losses(3)), scale, rtol=1e-6, atol=0)


def test_the_state_of_both_moves_as_by_itself():
    chain, first, second = Chain(3, "dwa", "pcd"), load("dwa", 3), load("pcd", 3)
    for seed in range(8):
        given, values = rows(3, seed=seed), losses(3, seed)
        scale = first.weights(values)
        expected = second.combine(scaled(scale, given), scale * values)
        first.advance(values)
        torch.testing.assert_close(chain.combine(given, values), expected, rtol=1e-9, atol=1e-12)
        if seed % 2:
            chain.end_epoch(), first.end_epoch()
    assert scale.unique().numel() == 3


def test_heads_are_weighted_by_the_first():
    chain = Chain(3, FIXED, "mgda")
    assert chain.private_weights(losses(3)).tolist() == pytest.approx([0.5, 2.0, 0.1])


def test_heads_under_a_second_that_weights_them_too():
    """The gradient of log(v l + 1e-8) with respect to the loss."""
    chain, leaf = Chain(3, FIXED, "db_mtl"), losses(3).requires_grad_()
    torch.log(torch.tensor([0.5, 2.0, 0.1], dtype=torch.float64) * leaf + 1e-8).sum().backward()
    torch.testing.assert_close(chain.private_weights(losses(3)), leaf.grad)


def test_only_a_first_that_learns_has_an_objective():
    assert Chain(3, "dwa", "mgda").own_objective(losses(3)) is None
    objective = Chain(3, "uncertainty", "mgda").own_objective(losses(3).requires_grad_())
    assert objective.requires_grad


def test_names_reach_both():
    first = {"class_path": "fixed", "init_args": {"weights": {"b": 4.0}}}
    then = {"class_path": "upgrad", "init_args": {"preference": {"a": 2.0}}}
    chain = Chain(2, first, then)
    chain.bind(["a", "b"])
    expected = load("upgrad", 2, preference=[2.0, 1.0]).combine(rows(2) * torch.tensor([[1.0], [4.0]]), losses(2))
    torch.testing.assert_close(chain.combine(rows(2), losses(2)), expected)


def test_an_unknown_name_inside_is_refused_when_the_names_are_known():
    first = {"class_path": "fixed", "init_args": {"weights": {"c": 4.0}}}
    with pytest.raises(ValueError, match=r"^Fixed: `weights` must name tasks among 'a', 'b', got 'c'\. .*\.$"):
        Chain(2, first, "mgda").bind(["a", "b"])


class Half(GramBalancer):
    """A user's method."""

    def weights(self, gram: Tensor, losses: Tensor, tasks: Any) -> Tensor:
        return torch.full_like(losses, 0.5)


@pytest.mark.parametrize("then", [Half(2), Half, lambda num_tasks: Half(num_tasks)])
def test_the_second_may_be_ones_own(then):
    torch.testing.assert_close(Chain(2, "fixed", then).combine(rows(2), losses(2)), rows(2).mean(0))


NOT_ONE_GRAM = ["graddrop", "moco", "modo", "sdmgrad", "gradnorm", "gradvac"]


@pytest.mark.parametrize("then", NOT_ONE_GRAM)
def test_a_second_that_needs_more_than_one_gram_is_refused(then):
    name = type(load(then, 2)).__name__
    with pytest.raises(
        ValueError,
        match=rf"^Chain: `then` must need the losses, or one gram of all shared parameters, got {name}\. .*\.$",
    ):
        Chain(2, "dwa", then)


@pytest.mark.parametrize(
    "options, kind, message",
    [
        ({"first": "mgda"}, ValueError, r"Chain: `first` must need the losses only, got MGDA\. .*\."),
        ({"first": "moco"}, ValueError, r"Chain: `first` must need the losses, or one gram .*, got MoCo\. .*\."),
        ({"then": "mgdaa"}, ValueError, r"balancer: `balancer` must be one of .*, got 'mgdaa'\. .*\."),
        ({"then": 3}, TypeError, r"balancer: `balancer` must be a name, .*, got int\. .*\."),
        ({"then": DBMTL(3)}, ValueError, r"Chain: `then` must be a balancer of 2 tasks, got one of 3\. .*\."),
        ({"every_n_steps": 0}, ValueError, r"Chain: `every_n_steps` must be an integer >= 1, got 0\. .*\."),
    ],
)
def test_bad_arguments(options, kind, message):
    with pytest.raises(kind, match=f"^{message}$"):
        Chain(2, **options)
