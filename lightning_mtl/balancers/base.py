"""What every balancer is: numbers in, numbers out, state in buffers and parameters."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
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

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        check_num_tasks(num_tasks, self)
        self.num_tasks = num_tasks
        self.names: tuple[str, ...] | None = None

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

    def combine(self, rows: Tensor, losses: Tensor, present: Tensor | None = None) -> Tensor:
        """The update of the shared parameters, whatever the family of the method; counts as one step.

        Shapes: rows ``[T, N]``, losses ``[T]``, present bool ``[T]`` -> ``[N]`` in the dtype of ``rows``.
        """
        raise NotImplementedError

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
    not count, unless it was to reuse its weights and had no gram. ``last_weights`` ``[T]``.
    Raises: ``ValueError`` if ``every_n_steps`` is not an integer >= 1.
    """

    step: Tensor
    last_weights: Tensor
    #: Where the gram is taken at level "parameters": all shared parameters, or the last shared layer only.
    gram_at: Literal["shared", "last_layer"] = "shared"

    def __init__(self, num_tasks: int, every_n_steps: int = 1) -> None:
        super().__init__(num_tasks)
        check_integer(every_n_steps, "every_n_steps", self, low=1)
        self.every_n_steps = every_n_steps
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self.register_buffer("last_weights", torch.ones(num_tasks, dtype=torch.float64))

    @abstractmethod
    def weights(self, gram: Tensor, losses: Tensor, tasks: Tasks) -> Tensor:
        """The weights of the present tasks; may move state. Overridden by each method.

        Shapes: gram float64 ``[P, P]``, losses float64 ``[P]``, ``tasks`` indexes ``[T]`` state -> ``[P]``.
        Called with finite numbers and ``P >= 1`` only, without autograd.
        """

    @property
    def due(self) -> bool:
        """Whether this step solves (else the last weights are used again)."""
        return int(self.step) % self.every_n_steps == 0

    @torch.no_grad()
    def forward(self, gram: Tensor, losses: Tensor, present: Tensor | None = None) -> Tensor:
        """One step: check, drop absent tasks, solve. Final.

        A gram or loss that is not finite gives NaN weights and moves no state, so that a gradient scaler skips
        the step. An absent task gets weight 0 and its state does not move.

        Shapes: gram ``[T, T]``, losses ``[T]``, present bool ``[T]`` -> float64 ``[T]`` on the CPU.
        """
        check_gram(gram, self.num_tasks, self)
        check_losses(losses, self.num_tasks, self)
        gram, losses = (x.detach().to(self.step.device, torch.float64) for x in (gram, losses))
        weights = torch.zeros_like(losses)
        tasks = ALL
        if present is not None:
            check_present(present, self.num_tasks, self)
            if not bool(present.all()):
                tasks = present.to(losses.device).nonzero().squeeze(1)
                gram, losses = gram[tasks][:, tasks], losses[tasks]
        if len(losses) == 0:
            return weights
        # One number instead of a mask: a sum is finite only if all its terms are.
        if not math.isfinite(gram.sum().item() + losses.sum().item()):
            return weights.fill_(float("nan"))
        solved = self.weights(gram, losses, tasks)
        if tasks is ALL:
            weights.copy_(solved)
            self.last_weights.copy_(solved)
        else:
            weights[tasks] = self.last_weights[tasks] = solved
        self.step += 1
        return weights

    @torch.no_grad()
    def reuse(self, present: Tensor | None = None) -> Tensor:
        """One step without a solve: the last weights, 0 for absent tasks. Shapes: present ``[T]`` -> ``[T]``."""
        self.step += 1
        if present is None:
            return self.last_weights.clone()
        return self.last_weights * present.to(self.last_weights.device)

    def combine(self, rows: Tensor, losses: Tensor, present: Tensor | None = None) -> Tensor:
        check_rows(rows, self.num_tasks, self)
        weights = self(gram_of(rows), losses, present) if self.due else self.reuse(present)
        return weights.to(rows.device, rows.dtype) @ rows

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GramBalancer:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        self._keep_buffers(before, on_cpu=True)
        return self
