"""What every balancer is: numbers in, numbers out, state in buffers and parameters."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_mtl.checks import (
    bad_argument,
    check_gram,
    check_integer,
    check_losses,
    check_num_tasks,
    check_present,
    check_rows,
    listed,
)
from lightning_mtl.linalg import gram as gram_of

# What a method indexes its [T] state with: the present tasks. A slice when all are present (no copy, no sync).
Tasks = slice | Tensor
ALL: Tasks = slice(None)


class Balancer(nn.Module):
    """A method that turns the losses or gradients of ``T`` tasks into ``T`` weights.

    It never sees a module, autograd, the trainer or a process group: what it is given is already reduced over
    ranks. State lives in parameters and buffers of their final size, made in ``__init__``.

    Args:
        num_tasks: ``T``.

    Raises: ``ValueError`` if ``num_tasks`` is not an integer >= 1.
    """

    #: Levels at which the method is defined.
    levels: ClassVar[tuple[str, ...]] = ("parameters", "features")
    #: Buffers that get their size in the first step: they hold something per shared parameter.
    growing: ClassVar[tuple[str, ...]] = ()

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        check_num_tasks(num_tasks, self)
        self.num_tasks = num_tasks
        self.names: tuple[str, ...] | None = None
        self._settings: dict[str, tuple[object, float, float, float]] = {}

    def bind(self, names: Sequence[str]) -> None:
        """Learn the task names, in the order of every ``[T]`` tensor.

        Raises: ``ValueError`` if there are not ``num_tasks`` of them.
        """
        if len(names) != self.num_tasks:
            raise bad_argument(
                self,
                "num_tasks",
                f"equal the number of tasks ({listed(names)})",
                self.num_tasks,
                f"Build it with num_tasks={len(names)}, or pass the balancer's name and let the module build it",
            )
        self.names = tuple(names)
        for name in self._settings:
            self._buffers[name].copy_(self._setting_values(name))  # type: ignore[union-attr]

    def _setting(
        self, name: str, given: object, default: float, low: float = -math.inf, high: float = math.inf
    ) -> None:
        """An argument with one number per task, kept in the buffer ``name`` ``[T]``: a setting, not state."""
        self._settings[name] = (dict(given) if isinstance(given, Mapping) else given), default, low, high
        self.register_buffer(name, self._setting_values(name), persistent=False)

    def _setting_values(self, name: str) -> Tensor:
        given, default, low, high = self._settings[name]
        values = torch.tensor(self._by_task(given, default, name, float), dtype=torch.float64)
        if not bool((torch.isfinite(values) & (values >= low) & (values <= high)).all()):
            bound = "be finite" if math.isinf(low) else f"be finite and >= {low:g}"
            bound += "" if math.isinf(high) else f" and <= {high:g}"
            raise bad_argument(self, name, bound, values.tolist(), "Change the entry that is not")
        return values

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        # The size of these is known from the first step, or from a checkpoint, only.
        for name in self.growing:
            saved = state_dict.get(prefix + name)
            if isinstance(saved, Tensor) and saved.shape != self._buffers[name].shape:  # type: ignore[union-attr]
                self._buffers[name] = self._buffers[name].new_empty(saved.shape)  # type: ignore[union-attr]
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def combine(self, rows: Tensor, losses: Tensor, present: Tensor | None = None) -> Tensor:
        """The update of the shared parameters, whatever the family of the method; counts as one step.

        Shapes: rows ``[T, N]``, losses ``[T]``, present bool ``[T]`` -> ``[N]`` in the dtype of ``rows``.
        """
        raise NotImplementedError

    def _place(self, task: int | str, arg: str) -> int:
        """Where a task stands in the order; 0 as long as its name cannot be looked up."""
        known = self.names if isinstance(task, str) else range(self.num_tasks)
        if isinstance(task, str) and self.names is None:
            return 0
        if isinstance(task, bool) or known is None or task not in known:
            raise bad_argument(
                self,
                arg,
                f"be a task's name or a place in their order, 0 to {self.num_tasks - 1}",
                repr(task),
                f"The tasks are {listed(self.names or ())}",
            )
        return task if isinstance(task, int) else list(known).index(task)

    def end_epoch(self) -> None:
        """A training epoch has ended (for methods that compare epochs). Modules call it; plain loops call it too."""

    def _by_task(self, values: object, default: Any, arg: str, convert: Callable[[Any], Any]) -> list[Any]:
        """``values`` per task, in task order: from None, one value, a sequence, or a mapping of the bound names."""
        if values is None:
            return [default] * self.num_tasks
        if isinstance(values, dict):
            names = self.names or ()
            unknown = [name for name in values if name not in names]
            if unknown and self.names is not None:
                raise bad_argument(
                    self,
                    arg,
                    f"name tasks among {listed(names)}",
                    listed(unknown),
                    "Correct the name; tasks left out keep the default",
                )
            return [self._entry(values.get(name, default), arg, convert) for name in names] or [
                default
            ] * self.num_tasks
        if isinstance(values, Tensor):
            values = values.tolist()
        if isinstance(values, str) or not isinstance(values, Sequence):
            return [self._entry(values, arg, convert)] * self.num_tasks
        if len(values) != self.num_tasks:
            raise bad_argument(
                self,
                arg,
                f"have one entry per task ({self.num_tasks})",
                f"{len(values)} entries",
                "Give one entry per task, in task order, or a mapping of task names",
            )
        return [self._entry(value, arg, convert) for value in values]

    def _entry(self, value: object, arg: str, convert: Callable[[Any], Any]) -> Any:
        try:
            return convert(value)
        except (TypeError, ValueError) as error:
            raise bad_argument(
                self,
                arg,
                "hold one number per task",
                repr(value),
                "Give a number, a sequence in task order, or a mapping of task names",
                type(error),
            ) from error

    def _keep_buffers(self, before: dict[str, Tensor | None], *, on_cpu: bool) -> None:
        """Undo casts (``precision="bf16-true"`` would ruin counters and moments) and, on demand, moves."""
        for name, old in before.items():
            new = self._buffers[name]
            if old is None or new is None or old.is_meta:
                continue
            if on_cpu:
                self._buffers[name] = old
            elif new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)


class LossBalancer(Balancer):
    """A method that needs the losses only: it is a scalar function of them, and one ordinary backward runs.

    Its weights are the partial derivatives of that function, so heads are weighted as the encoder is.
    Buffers follow the module's device (unless ``state_on_cpu``) and keep their dtype.

    State moves in the backward only: ``objective`` leaves it alone, ``observe`` moves it afterwards.
    """

    #: Whether the objective is linear in the losses; then averaging over ranks needs no communication.
    linear_in_losses: ClassVar[bool] = False
    #: Whether a loss of exactly 0 with zero gradient leaves objective and state alone.
    indifferent_to_absent: ClassVar[bool] = False
    #: Whether buffers stay on the CPU (a counter that seeds a generator: reading it elsewhere would make the host wait).
    state_on_cpu: ClassVar[bool] = False

    @abstractmethod
    def objective(self, losses: Tensor, tasks: Tasks = ALL) -> Tensor:
        """The scalar to minimise. Overridden by each method.

        Shapes: losses ``[P]`` of the present tasks, ``tasks`` indexes ``[T]`` state with them -> ``[]``.
        """

    def observe(self, losses: Tensor, tasks: Tasks = ALL) -> None:
        """Move state after a backward. Overridden by methods that have any.

        Called without autograd and with ``P >= 1``; what is written from losses that are not finite is undone.
        Shapes: as in :meth:`objective`.
        """

    @torch.no_grad()
    def advance(self, losses: Tensor, present: Tensor | None = None) -> None:
        """One step is done: move the state, except that of absent tasks or if a loss is not finite. Final.

        Shapes: losses ``[T]``, present bool ``[T]``.
        """
        if type(self).observe is LossBalancer.observe:
            return
        tasks = ALL
        if present is not None:
            tasks = present.to(losses.device).nonzero().squeeze(1)
            losses = losses[tasks]
        if len(losses) == 0:
            return
        before = {name: buffer.clone() for name, buffer in self.named_buffers()}
        self.observe(losses.detach(), tasks)
        # Not a branch, for which the host would have to wait.
        finite = torch.isfinite(losses).all()
        for name, buffer in self.named_buffers():
            buffer.copy_(torch.where(finite.to(buffer.device), buffer, before[name]))

    def forward(self, losses: Tensor, present: Tensor | None = None) -> Tensor:
        """Check, drop absent tasks, and call :meth:`objective`. Final.

        Shapes: losses ``[T]``, present bool ``[T]`` -> ``[]``.
        """
        check_losses(losses, self.num_tasks, self)
        if present is None:
            return self.objective(losses)
        check_present(present, self.num_tasks, self)
        if self.indifferent_to_absent:
            # Cut off, not left out: no device sync, and the weight of an absent task is 0.
            return self.objective(torch.where(present.to(losses.device), losses, 0))
        tasks = present.to(losses.device).nonzero().squeeze(1)
        if len(tasks) == 0:
            # DDP waits for the balancer's own parameters too.
            return losses.sum() * 0 + sum((p.sum() * 0 for p in self.parameters()), losses.new_zeros(()))
        return self.objective(losses[tasks], tasks)

    def weights(self, losses: Tensor, present: Tensor | None = None) -> Tensor:
        """The weights ``d objective / d losses``: shapes losses ``[T]`` -> ``[T]``, detached."""
        with torch.enable_grad():
            leaf = losses.detach().clone().requires_grad_()
            (grad,) = torch.autograd.grad(self(leaf, present), leaf)
        return grad

    def combine(self, rows: Tensor, losses: Tensor, present: Tensor | None = None) -> Tensor:
        check_rows(rows, self.num_tasks, self)
        losses = losses.to(rows.device)
        weights = self.weights(losses, present).to(rows.dtype)
        self.advance(losses, present)
        return weights @ rows

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LossBalancer:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        self._keep_buffers(before, on_cpu=self.state_on_cpu)
        return self


class GramBalancer(Balancer):
    """A method that needs only the inner products of the task gradients (and the losses).

    The solve runs on the CPU in float64: it is a few numbers, and dozens of tiny kernels would cost a GPU more
    than one transfer. So buffers stay on the CPU and keep their dtype whatever happens to the module.

    Args:
        num_tasks: ``T``.
        every_n_steps: solve in every n-th step only and reuse the weights in between; a step without a solve
            costs one ordinary backward. Overflows are noticed in steps with a solve only.

    State: ``step`` counts backwards (with accumulation several per optimizer step); one whose gram is not finite does
    not count, unless it was to reuse its weights and had no gram. ``last_weights`` ``[T]`` (``[K, T]`` in groups).
    Raises: ``ValueError`` if ``every_n_steps`` is not an integer >= 1.
    """

    step: Tensor
    last_weights: Tensor
    #: Where the gram is taken at level "parameters": all shared parameters, or the last shared layer only.
    gram_at: Literal["shared", "last_layer"] = "shared"
    #: Whether the method works on ``K`` groups of parameters apart: each parameter tensor, each layer, or all as one.
    granularity: Literal["whole", "layer", "tensor"] = "whole"
    #: Whether :meth:`weights` is written for groups: gram ``[K, P, P]`` -> weights ``[K, P]``.
    grouped: ClassVar[bool] = False
    #: Whether the method compares two independent halves of the batch: the gram is ``[2T, 2T]``, the rows of the first
    #: halves before those of the second, each half's loss a share of the task's loss.
    halves: ClassVar[bool] = False

    def __init__(self, num_tasks: int, every_n_steps: int = 1) -> None:
        super().__init__(num_tasks)
        check_integer(every_n_steps, "every_n_steps", self, low=1)
        self.every_n_steps = every_n_steps
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        shape = (1, num_tasks) if self.grouped else (num_tasks,)
        self.register_buffer("last_weights", torch.ones(shape, dtype=torch.float64))

    @abstractmethod
    def weights(self, gram: Tensor, losses: Tensor, tasks: Tasks) -> Tensor:
        """The weights of the present tasks; may move state. Overridden by each method.

        Shapes: gram float64 ``[P, P]``, losses float64 ``[P]``, ``tasks`` indexes ``[T]`` state -> ``[P]``.
        Called with finite numbers and ``P >= 1`` only, without autograd.
        """

    def private_weights(self, losses: Tensor, present: Tensor | None = None) -> Tensor | None:
        """Factors of the heads' own gradients, for methods that scale the losses; ``None`` for 1 each.

        Shapes: losses ``[T]`` (averaged over the ranks), present bool ``[T]`` -> ``[T]``.
        """
        return None

    def own_objective(self, losses: Tensor, present: Tensor | None = None) -> Tensor | None:
        """What the balancer's own parameters minimise, if it has any. Shapes: losses ``[T]``, detached -> ``[]``."""
        return None

    @property
    def due(self) -> bool:
        """Whether this step solves (else the last weights are used again)."""
        return int(self.step) % self.every_n_steps == 0

    @torch.no_grad()
    def forward(self, gram: Tensor, losses: Tensor, present: Tensor | None = None) -> Tensor:
        """One step: check, drop absent tasks, solve. Final.

        A gram or loss that is not finite gives NaN weights and moves no state, so that a gradient scaler skips
        the step. An absent task gets weight 0 and its state does not move.

        Shapes: gram ``[T, T]`` (``[2T, 2T]`` with halves, ``[K, T, T]`` in groups), losses ``[T]``, present bool
        ``[T]`` -> float64 ``[T]`` (``[K, T]``) on the CPU.
        """
        check_gram(gram, self.num_tasks * (2 if self.halves else 1), self, grouped=self.grouped)
        check_losses(losses, self.num_tasks, self)
        gram, losses = (x.detach().to(self.step.device, torch.float64) for x in (gram, losses))
        weights = losses.new_zeros((*gram.shape[:-2], self.num_tasks))
        tasks = ALL
        if present is not None:
            check_present(present, self.num_tasks, self)
            if not bool(present.all()):
                tasks = present.to(losses.device).nonzero().squeeze(1)
                rows = torch.cat([tasks, tasks + self.num_tasks]) if self.halves else tasks
                gram, losses = gram[..., rows, :][..., rows], losses[tasks]
        if len(losses) == 0:
            return weights
        # One number instead of a mask: a sum is finite only if all its terms are.
        if not math.isfinite(gram.sum().item() + losses.sum().item()):
            return weights.fill_(float("nan"))
        if self.last_weights.shape != weights.shape:
            self.last_weights = weights.new_ones(weights.shape)
        solved = self.weights(gram, losses, tasks)
        if tasks is ALL:
            weights.copy_(solved)
            self.last_weights.copy_(solved)
        else:
            weights[..., tasks] = self.last_weights[..., tasks] = solved
        self.step += 1
        return weights

    @torch.no_grad()
    def reuse(self, present: Tensor | None = None) -> Tensor:
        """One step without a solve: the last weights, 0 for absent tasks. Shapes: present ``[T]`` -> as forward."""
        self.step += 1
        if present is None:
            return self.last_weights.clone()
        return self.last_weights * present.to(self.last_weights.device)

    def combine(
        self, rows: Tensor, losses: Tensor, present: Tensor | None = None, sizes: Sequence[int] | None = None
    ) -> Tensor:
        """As for every balancer; ``sizes`` are the widths of the ``K`` groups, by default one of all ``N``.

        With halves, rows ``[2T, N]``.
        """
        check_rows(rows, self.num_tasks * (2 if self.halves else 1), self)
        parts = rows.split(list(sizes or [rows.shape[1]]), dim=1)
        if self.due:
            gram = torch.stack([gram_of(part) for part in parts]) if self.grouped else gram_of(rows)
            weights = self(gram, losses, present)
        else:
            weights = self.reuse(present)
        if self.halves:
            weights = weights.repeat(2)
        weights = weights.to(rows.device, rows.dtype)
        if not self.grouped:
            return weights @ rows
        return torch.cat([weight @ part for weight, part in zip(weights, parts, strict=True)])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GramBalancer:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        self._keep_buffers(before, on_cpu=True)
        return self


class RowBalancer(Balancer):
    """A method that needs the task gradients themselves: it looks at single coordinates, or keeps a memory of rows.

    Every process gets the rows averaged over all of them. Buffers follow the module's device and keep their dtype;
    those that hold something per parameter get their size in the first step (or from a checkpoint).

    State: ``step`` counts the updates that were finite, ``last_weights`` ``[T]`` are the weights behind the last one,
    NaN for a method that has none.
    """

    step: Tensor
    last_weights: Tensor
    levels: ClassVar[tuple[str, ...]] = ("parameters",)

    def __init__(self, num_tasks: int) -> None:
        super().__init__(num_tasks)
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self.register_buffer("last_weights", torch.full((num_tasks,), float("nan"), dtype=torch.float64))

    @abstractmethod
    def update(self, rows: Tensor, losses: Tensor, tasks: Tasks) -> Tensor:
        """The update from the rows of the present tasks; may move state. Overridden by each method.

        Shapes: rows ``[P, N]``, losses float64 ``[P]``, ``tasks`` indexes ``[T]`` state -> ``[N]``.
        Called with finite numbers and ``P >= 1`` only, without autograd.
        """

    def private_weights(self, losses: Tensor, present: Tensor | None = None) -> Tensor | None:
        """See :meth:`GramBalancer.private_weights`."""
        return None

    @torch.no_grad()
    def combine(self, rows: Tensor, losses: Tensor, present: Tensor | None = None) -> Tensor:
        """One step: check, drop absent tasks, :meth:`update`. Final.

        Rows or losses that are not finite give a NaN update and move no state.

        Shapes: rows ``[T, N]``, losses ``[T]``, present bool ``[T]`` -> ``[N]``.
        """
        check_rows(rows, self.num_tasks, self)
        check_losses(losses, self.num_tasks, self)
        losses = losses.detach().to(rows.device, torch.float64)
        tasks = ALL
        if present is not None:
            check_present(present, self.num_tasks, self)
            if not bool(present.all()):
                tasks = present.to(rows.device).nonzero().squeeze(1)
                rows, losses = rows[tasks], losses[tasks]
        if len(losses) == 0:
            return rows.new_zeros(rows.shape[1])
        wide = rows if rows.dtype == torch.float64 else rows.float()
        if not bool(torch.isfinite(wide).all() & torch.isfinite(losses).all()):
            return rows.new_full((rows.shape[1],), float("nan"))
        result = self.update(wide, losses, tasks).to(rows.dtype)
        self.step += 1
        return result

    def _grown(self, name: str, rows: Tensor) -> Tensor:
        """The buffer ``name``, ``[T, N]``, made of zeros at the first step."""
        buffer = self._buffers[name]
        assert buffer is not None
        if buffer.shape[1] != rows.shape[1]:
            if buffer.shape[1]:
                raise bad_argument(
                    self,
                    "rows",
                    f"have {buffer.shape[1]} columns, as many as before",
                    rows.shape[1],
                    "Do not freeze or unfreeze shared parameters in between, or build a new balancer then",
                )
            self._buffers[name] = rows.new_zeros((self.num_tasks, rows.shape[1]))
        grown: Tensor = getattr(self, name)
        return grown

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RowBalancer:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        self._keep_buffers(before, on_cpu=False)
        return self
