"""What a balancer remembers, kept apart from the buffers of the model that it belongs to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from lightning_mtl.checks import bad_argument, shape

_Self = TypeVar("_Self", bound="State")


class State(nn.Module):
    """A module whose registered tensors belong to a method and not to a model.

    They are in the state dict like buffers, but none of the module's: what averages buffers over time (EMA), or
    broadcasts, casts or empties them, must leave alone what a method counts and remembers. They keep their dtype and
    their values whatever is done to the module, and follow it to another device unless ``state_on_cpu``; so do the
    values of its parameters. Within ``torch.device("meta")`` all of them are made for real.
    """

    #: Whether state stays on the CPU, such as a counter that seeds a generator there.
    state_on_cpu: ClassVar[bool] = False
    #: State that gets its size in the first step: it holds something per shared parameter,
    growing: ClassVar[tuple[str, ...]] = ()
    #: in this dimension.
    grows_along: ClassVar[int] = 0

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in ("__init__", "bind", "bind_roles"):
            if name in vars(cls):
                setattr(cls, name, _making_real_tensors(vars(cls)[name]))

    def __init__(self) -> None:
        super().__init__()
        # Name -> whether it is in the state dict.
        self._state: dict[str, bool] = {}

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """Remember a tensor under a name, as in any module; only that :meth:`named_state` has it, not ``buffers()``."""
        if name in self._state:
            self.__dict__.pop(name, None)
        super().register_buffer(name, tensor, persistent)
        self._state[name] = persistent
        self._non_persistent_buffers_set.discard(name)
        self.__dict__[name] = self._buffers.pop(name)

    def get_buffer(self, target: str) -> Tensor:
        """What is remembered under a name, as in any module."""
        found: Tensor = self.__dict__[target] if target in self._state else super().get_buffer(target)
        return found

    def named_state(self) -> Iterator[tuple[str, Tensor]]:
        """All that is remembered here and in the modules below, in the state dict or not."""
        for prefix, module in self.named_modules():
            for name in module._state if isinstance(module, State) else ():
                if (value := module.__dict__.get(name)) is not None:
                    yield f"{prefix}.{name}" if prefix else name, value
        yield from self.named_buffers()  # those of modules of other kinds

    @torch.no_grad()
    def rearrange(self, kept: Tensor) -> None:
        """The shared parameters have changed: bring what is remembered of each to its new place.

        Of a new one nothing is remembered, as before the first step. A method without such a memory does nothing.

        Args:
            kept: for each column of the rows from now on (each group of parameters, for a method that works on groups
                apart) its place among those before, or -1 for a new one.

        Shapes: kept integers ``[N]`` (``[K]`` of the groups).
        Raises: ``ValueError`` if that is no place.
        """
        for name in self.growing:
            old, dim = getattr(self, name), self.grows_along
            size = old.shape[dim]
            if not size:
                continue
            if kept.ndim != 1 or kept.is_floating_point() or not bool(((kept >= -1) & (kept < size)).all()):
                raise bad_argument(
                    self,
                    "kept",
                    f"hold places from 0 to {size - 1}, or -1",
                    f"{kept.dtype} {shape(kept)}" + (f" up to {int(kept.max())}" if kept.numel() else ""),
                    "Say for each parameter where it was before, and -1 for a new one",
                )
            places = kept.to(old.device, torch.long)
            moved = old.index_select(dim, places.clamp(min=0))
            self.__dict__[name] = moved.index_fill_(dim, (places < 0).nonzero().squeeze(1), self._fresh(name))

    def _fresh(self, name: str) -> float:
        """What state that grows holds before the first step."""
        return 0.0

    def _move_state(self, device: torch.device) -> None:
        for name in self._state:
            value = self.__dict__.get(name)
            if value is not None and value.device != device:
                self.__dict__[name] = value.to(device)

    def _apply(self: _Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Self:
        def keeping_values(tensor: Tensor) -> Tensor:
            made = fn(tensor)
            if tensor.is_meta:
                return made
            return tensor if made.is_meta else made.copy_(tensor)

        super()._apply(keeping_values, recurse)
        if not self.state_on_cpu:
            for name in self._state:
                if (value := self.__dict__.get(name)) is not None:
                    self.__dict__[name] = value.to(keeping_values(value.new_empty(0)).device)
        return self

    @contextmanager
    def _as_buffers(self) -> Iterator[None]:
        """For torch's own reading and writing of state dicts."""
        names = [name for name, persistent in self._state.items() if persistent]
        self._buffers.update({name: self.__dict__.pop(name, None) for name in names})
        try:
            yield
        finally:
            for name in names:
                if name in self._buffers:  # else it was registered anew (load_state_dict with assign=True)
                    self.__dict__[name] = self._buffers.pop(name)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        with self._as_buffers():
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        with self._as_buffers():
            # The size of these is known from the first step, or from a checkpoint, only.
            for name in self.growing:
                saved, own = state_dict.get(prefix + name), self._buffers[name]
                if isinstance(saved, Tensor) and own is not None and saved.shape != own.shape:
                    # What is still empty has no dtype of its own yet: that of the rows.
                    self._buffers[name] = own.new_empty(saved.shape, dtype=own.dtype if own.numel() else saved.dtype)
            super()._load_from_state_dict(state_dict, prefix, *rest)
        if self.state_on_cpu:
            self._move_state(torch.device("cpu"))


def _making_real_tensors(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method, in which tensors are made on the CPU where they have to be there or would have no values."""

    @wraps(method)
    def made(self: State, *args: Any, **kwargs: Any) -> Any:
        # The first call is that of the object's own class: what it was made from can be written down.
        self.__dict__.setdefault("_made_from", (args, kwargs))
        if self.state_on_cpu or torch.empty(0).is_meta:
            with torch.device("cpu"):
                return method(self, *args, **kwargs)
        return method(self, *args, **kwargs)

    return made
