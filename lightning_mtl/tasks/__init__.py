"""Tasks: a head, a loss, its metrics, and where its target stands in the batch."""

from lightning_mtl.tasks.classification import ClassificationTask as ClassificationTask
from lightning_mtl.tasks.cornet import CorNet as CorNet
from lightning_mtl.tasks.losses_per_task import losses_per_task as losses_per_task
from lightning_mtl.tasks.multilabel import LabelTask as LabelTask
from lightning_mtl.tasks.multilabel import MultiLabelTask as MultiLabelTask
from lightning_mtl.tasks.reconstruction import ReconstructionTask as ReconstructionTask
from lightning_mtl.tasks.registry import TaskRegistry as TaskRegistry
from lightning_mtl.tasks.regression import RegressionTask as RegressionTask
from lightning_mtl.tasks.task import Task as Task
