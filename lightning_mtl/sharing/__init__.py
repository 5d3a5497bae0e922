"""Soft sharing: one encoder per task, and a constraint that holds their parameters together.

Everywhere ``W`` is one parameter of each of ``T`` encoders, stacked: ``[T, ...]``. Three constraints say in what the
tasks are alike: ``"mean"`` (all near their mean), ``"joint_features"`` (few inputs, the same for all) and
``"trace_norm"`` (few directions, in which all lie).

The weight of a layer counts its inputs in dimension 1, or 2 of the stack: the columns of a linear layer, the input
channels of a convolution. "joint_features" drops inputs; the other two see each task's parameter as one long vector.

Either the optimizer follows the gradient of :func:`penalty_of`, added to the loss, or :class:`ProximalStep` applies
the constraint after each of its steps; the second gives exact zeros.
"""

from lightning_mtl.sharing.encoders import Encoders as Encoders
from lightning_mtl.sharing.encoders import OwnFeatures as OwnFeatures
from lightning_mtl.sharing.encoders import matching as matching
from lightning_mtl.sharing.encoders import penalty_of as penalty_of
from lightning_mtl.sharing.proximal_step import ProximalStep as ProximalStep
from lightning_mtl.sharing.soft import CONSTRAINTS as CONSTRAINTS
from lightning_mtl.sharing.soft import Constraint as Constraint
from lightning_mtl.sharing.soft import joint_feature_penalty as joint_feature_penalty
from lightning_mtl.sharing.soft import joint_feature_prox as joint_feature_prox
from lightning_mtl.sharing.soft import mean_penalty as mean_penalty
from lightning_mtl.sharing.soft import mean_prox as mean_prox
from lightning_mtl.sharing.soft import trace_norm_penalty as trace_norm_penalty
from lightning_mtl.sharing.soft import trace_norm_prox as trace_norm_prox
