"""Pure functions on small tensors: no module, no autograd, no process group.

The solvers work on a gram of a few tasks as a float64 NumPy array on the CPU, where a step of theirs takes a
microsecond; as torch operations the same steps take several times as long, on a GPU many times.

A gram in float64 is as exact as the rows behind it. What decides whether something is zero or met takes their
``resolution``, the relative rounding of their numbers: by default that of float64.
"""

from lightning_mtl.linalg.adam import adam_step as adam_step
from lightning_mtl.linalg.cagrad import cagrad_dual as cagrad_dual
from lightning_mtl.linalg.dual_cone import cancelling as cancelling
from lightning_mtl.linalg.dual_cone import nonnegative_qp as nonnegative_qp
from lightning_mtl.linalg.dual_cone import project_on_dual_cone as project_on_dual_cone
from lightning_mtl.linalg.fair import fair_weights as fair_weights
from lightning_mtl.linalg.gram import cancels as cancels
from lightning_mtl.linalg.gram import combination as combination
from lightning_mtl.linalg.gram import conflict as conflict
from lightning_mtl.linalg.gram import cosines as cosines
from lightning_mtl.linalg.gram import cross_gram as cross_gram
from lightning_mtl.linalg.gram import gram as gram
from lightning_mtl.linalg.gram import gram_of_parts as gram_of_parts
from lightning_mtl.linalg.gram import to_longest as to_longest
from lightning_mtl.linalg.logs import log_losses as log_losses
from lightning_mtl.linalg.logs import log_weights as log_weights
from lightning_mtl.linalg.logs import one_or_nan as one_or_nan
from lightning_mtl.linalg.onto_simplex import onto_simplex as onto_simplex
from lightning_mtl.linalg.orders import random_orders as random_orders
from lightning_mtl.linalg.simplex import min_norm as min_norm
from lightning_mtl.linalg.simplex import project_on_simplex as project_on_simplex
from lightning_mtl.linalg.simplex import proportions as proportions
from lightning_mtl.linalg.simplex import simplex_qp as simplex_qp
from lightning_mtl.linalg.unit import divided as divided
from lightning_mtl.linalg.unit import equal_angles as equal_angles
from lightning_mtl.linalg.unit import factor as factor
from lightning_mtl.linalg.unit import solve_symmetric as solve_symmetric
from lightning_mtl.linalg.unit import unit_gram as unit_gram
