"""From task losses to one scalar whose ordinary backward deposits balanced gradients.

The only code of the package that calls autograd or a collective.
"""

from lightning_mtl.engine.compiled import allow_several_backwards as allow_several_backwards
from lightning_mtl.engine.cut import boundary as boundary
from lightning_mtl.engine.cut import leaves_per_head as leaves_per_head
from lightning_mtl.engine.cut import tensors_of as tensors_of
from lightning_mtl.engine.gather import halves_to_global as halves_to_global
from lightning_mtl.engine.gather import on_host as on_host
from lightning_mtl.engine.gather import rescale_to_global as rescale_to_global
from lightning_mtl.engine.gather import shares as shares
from lightning_mtl.engine.gather import union_over_ranks as union_over_ranks
from lightning_mtl.engine.gather import world_size as world_size
from lightning_mtl.engine.plain import backward as backward
from lightning_mtl.engine.shared import Reach as Reach
from lightning_mtl.engine.shared import discover as discover
from lightning_mtl.engine.shared import distinct as distinct
from lightning_mtl.engine.shared import reached as reached
from lightning_mtl.engine.shared import reached_beside as reached_beside
from lightning_mtl.engine.solver import balanced_loss as balanced_loss
