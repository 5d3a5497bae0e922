"""Balanced multi-task training inside PyTorch Lightning's automatic optimization.

A :class:`MultiTaskModule` (everything declared) or a module that inherits from :class:`Balanced` (an existing
LightningModule) returns one scalar from ``training_step``; its ordinary backward deposits the balanced gradients.
"""

from lightning_mtl.balanced import Balanced as Balanced
from lightning_mtl.balancers.registry import BalancerSpec as BalancerSpec
from lightning_mtl.engine import allow_several_backwards as allow_several_backwards
from lightning_mtl.engine import backward as backward
from lightning_mtl.engine import boundary as boundary
from lightning_mtl.module import MultiTaskModule as MultiTaskModule
from lightning_mtl.tasks import Task as Task
from lightning_mtl.tasks import TaskRegistry as TaskRegistry
from lightning_mtl.types import Balance as Balance
