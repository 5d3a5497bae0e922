"""IMTL: balance the losses by IMTL-L, then the gradients by IMTL-G."""

from __future__ import annotations

from lightning_mtl.balancers.chain import Chain


class IMTL(Chain):
    r"""Balance the losses by IMTL-L, then the gradients by IMTL-G.

    Impartial in both ways: :math:`e^{s_t} \ell_t` with learned :math:`s_t` (:class:`IMTLL`), and on the gradients
    of these losses equal projections (:class:`IMTLG`).

    Args:
        num_tasks: ``T``.
        every_n_steps: solve in every n-th step only.
        lr: that of :class:`IMTLL`.

    Shapes: gram ``[T, T]``, losses ``[T]`` -> weights ``[T]``.
    State: that of :class:`GramBalancer` and of both parts; without ``lr`` the :math:`s_t` are parameters of the
    user's optimizer.
    Update: mean scale of the scaled gradients; heads are weighted by :math:`e^{s_t}`.
    Paper: Liu et al., ICLR 2021, "Towards Impartial Multi-task Learning", section 3.3 and algorithm 1.

    Example:
        >>> import torch
        >>> IMTL(2).combine(torch.tensor([[4.0, 0.0], [0.0, 1.0]]), torch.ones(2))
        tensor([0.8000, 0.8000])
    """

    def __init__(self, num_tasks: int, every_n_steps: int = 1, lr: float | None = None) -> None:
        super().__init__(num_tasks, {"class_path": "imtl_l", "init_args": {"lr": lr}}, "imtl_g", every_n_steps)
