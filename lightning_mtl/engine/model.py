"""What is known of a model beyond the graph of one step."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from lightning_mtl.checks import listed


@dataclass
class Model:
    """What is known of a model beyond the graph of one step.

    Args:
        owner: whom an error names.
        own: its trainable parameters in order of registration; ``None`` in a plain loop, where they are those that the
            losses reach.
        modules: its modules in order of registration.
        met: parameters found shared before; they stay so in a batch in which only one of their tasks has labels.
        last_layers: the last shared layers found before, by who was there.
        found_tables: the ``id`` of each parameter that the losses read sparsely, where modules are not known.
    """

    owner: object
    own: Sequence[Tensor] | None = None
    modules: Sequence[nn.Module] = ()
    met: list[Tensor] = field(default_factory=list)
    last_layers: dict[object, list[Tensor]] = field(default_factory=dict)
    found_tables: Collection[int] = ()

    def tables(self) -> frozenset[int]:
        """The ``id`` of each parameter of which DDP expects sparse gradients, by its own rule."""
        kinds = (nn.Embedding, nn.EmbeddingBag)
        known = frozenset(id(module.weight) for module in self.modules if isinstance(module, kinds) and module.sparse)
        return known.union(self.found_tables)

    def named(self, parameters: Iterable[Tensor]) -> str:
        """The first few of them, for a message."""
        known = {id(p): n for n, p in self.owner.named_parameters()} if isinstance(self.owner, nn.Module) else {}
        return listed([known.get(id(p), f"one of shape {list(p.shape)}") for p in parameters][:3])
