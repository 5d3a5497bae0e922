"""Where Lightning begins: a mixin for the LightningModule that exists, and a module in which everything is declared."""

from lightning_mtl.module.balanced import Balanced as Balanced
from lightning_mtl.module.checkpoints import to_plain_checkpoint as to_plain_checkpoint
from lightning_mtl.module.multi_task import MultiTaskModule as MultiTaskModule
