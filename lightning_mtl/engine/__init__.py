"""From task losses to one scalar whose ordinary backward deposits balanced gradients.

The only code of the package that calls autograd or a collective. What a step does is always the same: decide who is
shared and who is present (``step``, ``present``), take the tasks' gradients (``gradients``, one file per way), ask the
balancer (``balanced_backward``), hand the combination to autograd (``node``).
"""

from lightning_mtl.engine.collectives import mean_over_ranks as mean_over_ranks
from lightning_mtl.engine.collectives import world_size as world_size
from lightning_mtl.engine.compiled import allow_several_backwards as allow_several_backwards
from lightning_mtl.engine.differentiate import as_plain as as_plain
from lightning_mtl.engine.features import boundary as boundary
from lightning_mtl.engine.features import leaves_of as leaves_of
from lightning_mtl.engine.features import leaves_per_head as leaves_per_head
from lightning_mtl.engine.features import mapped as mapped
from lightning_mtl.engine.features import tensors_of as tensors_of
from lightning_mtl.engine.features import unknown_types as unknown_types
from lightning_mtl.engine.graph import reached as reached
from lightning_mtl.engine.loss import LEVELS as LEVELS
from lightning_mtl.engine.loss import balanced_loss as balanced_loss
from lightning_mtl.engine.model import Model as Model
from lightning_mtl.engine.node import free_graph as free_graph
from lightning_mtl.engine.plain_loop import backward as backward
from lightning_mtl.engine.present import Labelled as Labelled
from lightning_mtl.engine.present import TaskLoss as TaskLoss
from lightning_mtl.engine.present import collect as collect
from lightning_mtl.engine.present import halves_to_global as halves_to_global
from lightning_mtl.engine.present import to_global as to_global
from lightning_mtl.engine.present import zero_that_reaches as zero_that_reaches
from lightning_mtl.engine.step import Owned as Owned
from lightning_mtl.engine.step import declared as declared
from lightning_mtl.engine.step import found as found
from lightning_mtl.engine.step import make_step as make_step
