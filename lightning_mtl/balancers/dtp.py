"""Dynamic task prioritisation: more weight for the tasks whose metric is still poor."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_mtl.balancers.base import ALL, LossBalancer, Tasks
from lightning_mtl.checks import bad_argument, check_number

# A metric of 0 would have an infinite weight.
_WORST = 1e-3


class DTP(LossBalancer):
    r"""Weigh the losses by how difficult their tasks are: :math:`w_t = -(1 - k_t)^\gamma \log k_t`.

    :math:`k_t` is a running mean of a metric in [0, 1] (1 is best), measured outside of training.

    Args:
        num_tasks: ``T``.
        metric: the name of the validation metric that each task shows.
        gamma: focus, >= 0: the larger, the less a good task counts. The paper chooses it per task.
        smoothing: the share of a new value in the running mean, in (0, 1]; 1 keeps the last value.

    Shapes: losses ``[T]`` -> objective ``[]``.
    State: ``progress`` ``[T]``, NaN until a task's metric is known; :meth:`observe_metrics` moves it.
    Update: no fixed scale; heads are weighted. A weight is >= 0; 1 until the task's metric is known, 0 at a metric of
    1, and 6.9 at most (metrics below 0.001 count as 0.001).
    Raises: ``ValueError`` if an argument is out of range or a metric does not lie in [0, 1].
    Paper: Guo et al., "Dynamic Task Prioritization for Multitask Learning", ECCV 2018 (task-level prioritisation only).
    The defaults of ``gamma`` and ``smoothing`` are ours.

    Example:
        >>> import torch
        >>> balancer = DTP(2)
        >>> balancer.observe_metrics(torch.tensor([0.5, 0.9]))
        >>> balancer.weights(torch.ones(2))
        tensor([0.3466, 0.0105])
    """

    progress: Tensor
    # The weights move with the metrics alone.
    linear_in_losses = True
    indifferent_to_absent = True

    def __init__(self, num_tasks: int, metric: str = "accuracy", gamma: float = 1.0, smoothing: float = 0.5) -> None:
        super().__init__(num_tasks)
        if not isinstance(metric, str) or not metric:
            raise bad_argument(self, "metric", "be the name of a metric", repr(metric), "Pass it as the tasks name it")
        check_number(gamma, "gamma", self, low=0.0)
        check_number(smoothing, "smoothing", self, low=0.0, exclusive=True)
        if smoothing > 1:
            raise bad_argument(self, "smoothing", "be <= 1", smoothing, "Pass 1 to keep the last value")
        self.metric, self.gamma, self.smoothing = metric, gamma, smoothing
        self.register_buffer("progress", torch.full((num_tasks,), float("nan"), dtype=torch.float64))

    @torch.no_grad()
    def observe_metrics(self, values: Tensor) -> None:
        """Move the running means towards new values of the metric; a task whose value is NaN keeps its own.

        Shapes: values ``[T]``.
        Raises: ``ValueError`` if a value does not lie in [0, 1], or there are not ``T``.
        """
        if values.shape != (self.num_tasks,):
            want = f"have shape [T] = [{self.num_tasks}]"
            raise bad_argument(self, "values", want, list(values.shape), "Pass NaN for a task whose value is not known")
        values = values.to(self.progress)
        if bool(((values < 0) | (values > 1)).any()):
            raise bad_argument(self, "values", "lie in [0, 1]", values.tolist(), "Pass a share, 1 for a perfect task")
        mean = torch.where(self.progress.isnan(), values, torch.lerp(self.progress, values, self.smoothing))
        self.progress.copy_(torch.where(values.isnan(), self.progress, mean))

    def objective(self, losses: Tensor, tasks: Tasks = ALL) -> Tensor:
        progress = self.progress[tasks].clamp(_WORST, 1)
        weights = torch.where(progress.isnan(), 1, -((1 - progress) ** self.gamma) * progress.log())
        return losses @ weights.to(losses.dtype)
