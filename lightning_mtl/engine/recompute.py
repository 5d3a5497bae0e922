"""Activations that are computed again in the backward: once per task, but a module may count them only once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook


@contextmanager
def forwards_leave_no_trace() -> Iterator[None]:
    """Undo what modules write into their buffers, such as the running statistics of batch norm.

    Checkpointed activations run their modules again in every backward over them. Within this context those runs leave
    buffers as they were, so that the forward of the step has counted once, however many tasks there are.
    """
    outermost: list[nn.Module] = []
    before: list[tuple[nn.Module, str, Tensor, Tensor]] = []

    def save(module: nn.Module, args: Any) -> None:
        if not outermost:
            outermost.append(module)
            for part in module.modules():
                if part.training:
                    named = part._buffers.items()
                    before.extend((part, name, buffer, buffer.clone()) for name, buffer in named if buffer is not None)

    def restore(module: nn.Module, args: Any, output: Any) -> None:
        if not outermost or module is not outermost[0]:
            return
        outermost.clear()
        with torch.no_grad():
            for part, name, buffer, saved in before:
                part._buffers[name] = buffer
                # Through .data: the graph has saved the buffer, and a counted write would forbid the next backward.
                buffer.data.copy_(saved)
        before.clear()

    hooks = register_module_forward_pre_hook(save), register_module_forward_hook(restore, always_call=True)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def one_backward_only(error: RuntimeError) -> bool:
    """Whether an error comes from activations that are checkpointed selectively, as they are computed once more.

    What stands aside of them is not computed under their rules, so that a copy of a buffer may be what is missed.
    """
    return "selective activation checkpoint" in str(error) or "not found in storage" in str(error)
