"""Tell each balance of a module once."""

from __future__ import annotations

from typing import Any

from lightning_mtl.types import Balance


class NewBalance:
    """``last_balance`` stays where it is while nothing is balanced (a frozen encoder): what was seen is not new."""

    def __init__(self) -> None:
        self._seen: Balance | None = None

    def start(self, module: Any) -> None:
        """Leave out what another fit has left."""
        self.take(module)

    def take(self, module: Any) -> Balance | None:
        """The module's last balance, or ``None`` if there is none or this one was taken before."""
        balance = getattr(module, "last_balance", None)
        if not isinstance(balance, Balance) or balance is self._seen:
            return None
        self._seen = balance
        return balance
