"""A head whose labels see each other."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_mtl.checks import bad_argument, shape


class CorNet(nn.Module):
    r"""Labels that correct each other: a block on top of a head moves each logit by what the head says of all labels.

    Of the head's logits :math:`z` and their probabilities :math:`\sigma(z)`, a block makes

    .. math:: z + W_2 \operatorname{elu}(W_1 \sigma(z) + b_1) + b_2

    with ``width`` units in between. It reads no target, so missing labels need no care: a label that is missing is seen
    by the others as the head predicts it. What comes out is still one probability per label: that two labels hold
    together more often than their probabilities say cannot be expressed.

    Args:
        head: features -> logits ``[B, K]``.
        num_labels: ``K``.
        width: units of each block, the paper's bottleneck.
        num_blocks: how many blocks there are, one on top of the other.

    Shapes: features of ``B`` samples -> logits ``[B, K]``.
    Raises: ``TypeError`` if the head is no module; ``ValueError`` if a number is below 1, and in ``forward`` if the
    head's output has another shape.
    Paper: Xun, Jha, Sun and Zhang, *Correlation networks for extreme multi-label text classification*, KDD 2020, the
    CorNet block. Ours starts with :math:`W_2 = b_2 = 0`, so that the first logits are the head's own.

    Example:
        >>> import torch
        >>> head = CorNet(nn.Linear(8, 3), num_labels=3)
        >>> head(torch.ones(5, 8)).shape
        torch.Size([5, 3])
    """

    def __init__(self, head: nn.Module, num_labels: int, width: int = 16, num_blocks: int = 1) -> None:
        super().__init__()
        if not isinstance(head, nn.Module):
            raise bad_argument(
                self, "head", "be an nn.Module", type(head).__name__, "Pass a module that returns logits", TypeError
            )
        for name, value in (("num_labels", num_labels), ("width", width), ("num_blocks", num_blocks)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise bad_argument(self, name, "be an integer >= 1", repr(value), "Pass how many there are")
        self.head, self.num_labels = head, num_labels
        self.blocks = nn.ModuleList(_block(num_labels, width) for _ in range(num_blocks))

    def forward(self, features: Any) -> Tensor:
        logits = self.head(features)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[1] != self.num_labels:
            raise bad_argument(
                self,
                "head",
                f"return logits of shape [B, K] with K = {self.num_labels}",
                shape(logits),
                "Change the head's last layer or num_labels",
            )
        for block in self.blocks:
            logits = logits + block(logits.sigmoid())
        return logits


def _block(num_labels: int, width: int) -> nn.Sequential:
    last = nn.Linear(width, num_labels)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(num_labels, width), nn.ELU(), last)
