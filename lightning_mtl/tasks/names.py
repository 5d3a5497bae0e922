"""Names as the user wrote them, and the keys under which torch holds them."""

from __future__ import annotations

from torch import nn

_EMPTY = nn.ModuleDict()


def usable(name: object) -> bool:
    """Whether a name can stand in a log key: a non-empty string, without what Lightning puts into keys itself."""
    return isinstance(name, str) and bool(name) and "dataloader_idx_" not in name


def key_of(name: str) -> str:
    """The key of a name in a ``ModuleDict``: the name itself, wherever torch can hold it.

    No two names have one key: what torch cannot hold (a dot, the attributes of a module) begins with a percent sign,
    and so does no other key.
    """
    if "." in name or name.startswith("%") or hasattr(_EMPTY, name):
        return "%" + name.replace("%", "%25").replace(".", "%2E")
    return name


def name_of(key: str) -> str:
    """The name that has this key."""
    return key[1:].replace("%2E", ".").replace("%25", "%") if key.startswith("%") else key
