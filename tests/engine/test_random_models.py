"""Random models: with their features told, every gradient is what a person computes by hand, or the step is refused.

Each refusal prints cures; each is applied, and must then give the right gradients.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import lightning_mtl
from tests.engine.by_hand import (
    Maybe,
    Net,
    Own,
    assert_right,
    by_hand,
    make,
    numbers,
    train,
    update_of,
)

NUM_MODELS = 1400
WIDTH = 3
METHODS = ("pcgrad", "mgda", "gradnorm", "moco")


class Encoder(nn.Module):
    """Layers in a random order, products, sums and pairs of outputs; any of its tensors may be a feature."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH * rng.choice([1, 1, 2])) for _ in range(rng.randint(1, 4)))
        self.steps: list[tuple[str, int, int, int]] = [("layer", 0, 0, 0)]
        for _ in range(rng.randint(0, 4)):
            kind = rng.choice(["layer", "layer", "product", "sum"])
            self.steps.append((kind, rng.randrange(99), rng.randrange(99), rng.randrange(len(self.layers))))
        self.picked = [rng.randrange(99) for _ in range(rng.randint(1, 3))]
        self.form = rng.choice(["dict", "list", "nested", "tensor"])
        #: Tensors and weights that are returned as features too, as an error advised.
        self.also: Callable[[Encoder], list[Tensor]] = lambda encoder: []
        self.inner: list[Tensor] = []

    def forward(self, x: Tensor) -> Any:
        pool: list[Tensor] = []
        for kind, a, b, layer in self.steps:
            first, second = (pool[n % len(pool)] if pool else x for n in (a, b))
            if kind == "layer":
                pool += torch.tanh(self.layers[layer](first)).split(WIDTH, 1)
            else:
                pool.append(first * second if kind == "product" else first + second.sin())
        self.inner = pool
        chosen = list({n % len(pool): pool[n % len(pool)] for n in self.picked}.values()) + self.also(self)
        if len(chosen) == 1 and self.form == "tensor":
            return chosen[0]
        if self.form == "dict":
            return {f"f{n}": tensor for n, tensor in enumerate(chosen)}
        return [chosen[0], tuple(chosen[1:])] if self.form == "nested" else chosen


class Head(nn.Module):
    """Reads some of the features; and, where a model is to be refused, something beside them."""

    def __init__(self, rng: random.Random, encoder: Encoder) -> None:
        super().__init__()
        self.reads = [rng.randrange(99) for _ in range(rng.randint(1, 2))]
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(rng.randint(1, 2)))
        #: (the encoder's tensors, its weights, other heads) that it reads past the features.
        self.beside: list[Callable[[], Tensor]] = []
        self.output = torch.zeros(())

    def forward(self, features: Any) -> Tensor:
        leaves = [leaf for leaf in tree_leaves(features) if leaf.shape[0] == 4]
        out = leaves[self.reads[0] % len(leaves)]
        for number in self.reads[1:]:
            out = out * leaves[number % len(leaves)].cos()
        for layer in self.layers:
            out = torch.tanh(layer(out))
        for read in self.beside:
            out = out + read()
        self.output = out
        return out


class Model:
    """A random model; ``beside`` are the tensors of the encoder that losses read past the features."""

    def __init__(self, seed: int) -> None:
        rng = self.rng = random.Random(seed)
        torch.manual_seed(seed)
        encoder = Encoder(rng).double()
        names = "abc"[: rng.choice([2, 3])]
        heads = {name: Head(rng, encoder).double() for name in names}
        x = torch.randn(4, WIDTH).double()
        self.net = Net(encoder, heads, x, {name: 2 * torch.randn(4, WIDTH).double() for name in names})
        self.beside: list[Callable[[], Tensor]] = []
        self.tied = False
        self._past_the_features(rng, encoder, heads)
        if rng.random() < 0.3:
            absent = rng.sample(names, rng.randint(1, len(names) - 1))
            self.net.absent = absent
        if rng.random() < 0.2:
            for layer in rng.sample(list(encoder.layers), rng.randint(1, len(encoder.layers))):
                layer.requires_grad_(False)
        if rng.random() < 0.1:
            heads["a"].requires_grad_(False)

    def _past_the_features(self, rng: random.Random, encoder: Encoder, heads: dict[str, Head]) -> None:
        for name, head in heads.items():
            if rng.random() < 0.1:  # an inner tensor
                number = rng.randrange(99)
                self._read(head, lambda number=number: encoder.inner[number % len(encoder.inner)])
            if rng.random() < 0.1:  # a weight of the encoder, which the head owns too or not
                weight = rng.choice(list(encoder.layers)).weight
                if rng.random() < 0.5:
                    head.tied = weight
                    self.tied = True
                    self.beside.append(lambda weight=weight: weight)
                    head.beside.append(lambda weight=weight: weight[:1].sin())
                else:
                    self._read(head, lambda weight=weight: weight, lambda w: w[:1].sin())
            if rng.random() < 0.08:  # a penalty on the encoder
                weight = rng.choice(list(encoder.layers)).weight
                self.beside.append(lambda weight=weight: weight)
                self.net.criteria = {**self.net.criteria, name: penalised(weight)}
            if name != "a" and rng.random() < 0.06 and "a" in heads:  # another head's output
                self.reads_another_head = True
                head.beside.append(lambda: heads["a"].output)

    def _read(self, head: Head, tensor: Callable[[], Tensor], use: Callable[[Tensor], Tensor] = torch.sin) -> None:
        self.beside.append(tensor)
        head.beside.append(lambda: use(tensor()))

    reads_another_head = False


def penalised(weight: Tensor) -> Callable[[Any, Any], Tensor]:
    return lambda output, target: (output - target) ** 2 + 0.3 * weight.square().sum()


# By hand.


def reached(outputs: Sequence[Tensor], ends: Sequence[Tensor]) -> list[Tensor]:
    """Those of ``ends`` that the outputs depend on."""
    outputs = [tensor.sum() for tensor in outputs if tensor.requires_grad]
    if not outputs or not ends:
        return []
    grads = torch.autograd.grad(torch.stack(outputs).sum(), list(ends), retain_graph=True, allow_unused=True)
    return [end for end, grad in zip(ends, grads, strict=True) if grad is not None]


def upstream(features: Sequence[Tensor]) -> list[Tensor]:
    """Those that are computed from no other one."""
    others = [(f, [g for g in features if g is not f]) for f in features]
    return [f for f, rest in others if not reached([f], rest)]


def met(losses: Sequence[Maybe], parameters: Sequence[Tensor]) -> list[Tensor]:
    """What at least two losses reach."""
    times = Counter(id(p) for loss in losses if loss is not None for p in reached([loss], parameters))
    return [p for p in parameters if times[id(p)] > 1]


def at_each_feature(net: Net, method: str, balancer: Any, features: Any) -> list[Maybe]:
    """For a declared module at level "features": rows are partial derivatives, as each head reads its features."""
    rows, tasks = [], [n for n, name in enumerate(net.heads) if name not in net.absent]
    for number in tasks:
        name = list(net.heads)[number]
        leaves = tree_map(lambda t: t.detach().requires_grad_(t.requires_grad), features)
        ends = [leaf for leaf in tree_leaves(leaves) if leaf.requires_grad]
        loss = net.loss(name, net.heads[name](leaves))
        grads = (
            torch.autograd.grad(loss, ends, allow_unused=True) if loss.requires_grad and ends else [None] * len(ends)
        )
        rows.append(torch.cat([numbers(g, e) for g, e in zip(grads, ends, strict=True)]) if ends else torch.zeros(0))
    losses = [loss for loss in net.losses()[0].values() if loss is not None]
    weights = update_of(method, rows, tasks, balancer)[0] if rows[0].numel() else [1.0] * len(rows)
    inside = {id(p) for p in net.shared()}
    result: list[Maybe] = []
    every = [torch.autograd.grad(t, net.parameters(), retain_graph=True, allow_unused=True) for t in losses]
    for p, column in zip(net.parameters(), zip(*every, strict=True), strict=True):
        terms = [(w if id(p) in inside else 1.0) * g for w, g in zip(weights, column, strict=True) if g is not None]
        result.append(torch.stack(terms).sum(0) if terms else None)
    return result


def expected(model: Model, way: str, method: str, level: str, balancer: Any, *, weight_heads: bool) -> list[Maybe]:
    net = model.net
    losses, z = net.losses()
    every = list(losses.values())
    parameters, features = net.parameters(), [t for t in tree_leaves(z) if t.requires_grad]
    if way == "declared" and level == "features":
        return at_each_feature(net, method, balancer, z)
    if way == "declared":
        shared = net.shared()
    else:
        shared = reached(features, parameters) if way.endswith("told") else met(every, parameters)
    at = upstream(features) if level == "features" else None
    return by_hand(method, balancer, every, parameters, shared, at=at, weight_heads=weight_heads)


def is_right(model: Model, way: str, method: str, level: str, step: Callable[[], Any], weight_heads: bool) -> bool:
    """One step; raises what the engine raises."""
    want = expected(model, way, method, level, make(method, len(model.net.heads)), weight_heads=weight_heads)
    for parameter in model.net.parameters():
        parameter.grad = None
    step()
    try:
        assert_right(model.net.parameters(), want, or_zero=way == "declared", strides=False)
    except AssertionError:
        return False
    return True


# The cures that errors print, by what the error says.


def told(model: Model, method: str, way: str, level: str, more: Sequence[Tensor] = (), **options: Any) -> None:
    net = model.net
    losses, z = net.losses()
    features, balancer = (z, [tensor() for tensor in more]), make(method, len(losses))
    if way.startswith("loop"):
        lightning_mtl.backward(losses, balancer, features, level=level, **options)
    else:
        module = Own([net.encoder, *net.heads.values()], list(losses), balancer, level=level, **options)
        module.balance(losses, features).backward()


def cured(seed: int, message: str, method: str, weight_heads: bool) -> dict[str, bool]:
    """Each cure of an error, applied to a fresh copy of the model: whether it then was right."""
    options, done = {"weight_heads": weight_heads}, {}

    def found(loop: bool) -> bool:
        model, way = Model(seed), "loop" if loop else "found"
        step = lambda: train(way, model.net, make(method, len(model.net.heads)), **options)  # noqa: E731
        return is_right(model, way, method, "parameters", step, weight_heads)

    def with_more(way: str) -> bool:
        model = Model(seed)
        more = model.beside
        want_at = [tensor for tensor in more]
        balancer = make(method, len(model.net.heads))
        losses, z = model.net.losses()
        features = [t for t in [*tree_leaves(z), *(tensor() for tensor in want_at)] if t.requires_grad]
        shared = reached(features, model.net.parameters())
        every = list(losses.values())
        want = by_hand(method, balancer, every, model.net.parameters(), shared, weight_heads=weight_heads)
        told(model, method, way, "parameters", more, **options)
        try:
            assert_right(model.net.parameters(), want, strides=False)
        except AssertionError:
            return False
        return True

    if "leave features out" in message:
        loop = message.startswith("lightning_mtl.backward")
        done["leave features out"] = found(loop)
        if "Add the other tensors" in message:
            done["add the other tensors"] = with_more("loop_told" if loop else "told")
    elif "use Balanced without features=" in message:
        done["use Balanced without features"] = found(False)
    elif 'must be "parameters"' in message:
        model = Model(seed)
        step = lambda: told(model, method, "told", "parameters", **options)  # noqa: E731
        done['level="parameters"'] = is_right(model, "told", method, "parameters", step, weight_heads)
    return done


def outcome(seed: int) -> tuple[str, dict[str, bool]]:
    """ "right", "wrong", or the shape of an error's message; and what its cures did."""
    rng, model = random.Random(-seed), Model(seed)
    method, way = rng.choice(METHODS), rng.choice(["declared", "told", "loop_told"])
    level = "features" if method != "moco" and rng.random() < 0.35 else "parameters"
    if way == "declared" and model.tied:
        level = "parameters"  # at the features a tied parameter has a test of its own
    weight_heads = method != "moco" and rng.random() < 0.3 and not (way == "declared" and level == "features")
    balancer = make(method, len(model.net.heads))
    step = lambda: train(way, model.net, balancer, level, weight_heads=weight_heads)  # noqa: E731
    try:
        return ("right" if is_right(model, way, method, level, step, weight_heads) else "wrong"), {}
    except (ValueError, TypeError) as error:
        shape = re.sub(r"got .*", "", str(error)).strip(" ,")
        return shape, cured(seed, str(error), method, weight_heads)


if __name__ == "__main__":
    import sys, time

    t = time.process_time()
    c = Counter()
    cures = Counter()
    wrong = []
    for seed in range(int(sys.argv[1]), int(sys.argv[2])):
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                o, d = outcome(seed)
            except Exception as e:
                o, d = "EXC " + type(e).__name__ + str(e)[:150], {}
        c[o] += 1
        if o == "wrong" or o.startswith("EXC"):
            wrong.append(seed)
        for k, v in d.items():
            cures[(k, v)] += 1
            if not v:
                wrong.append((seed, k))
    for k, v in c.most_common():
        print(v, k)
    print(cures)
    print(wrong[:30])
    print(time.process_time() - t)
