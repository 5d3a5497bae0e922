"""Pure functions on small tensors: no module, no autograd, no process group."""

from lightning_mtl.linalg.adam import adam_step as adam_step
from lightning_mtl.linalg.gram import conflict as conflict
from lightning_mtl.linalg.gram import cosines as cosines
from lightning_mtl.linalg.gram import gram as gram
from lightning_mtl.linalg.gram import gram_of_parts as gram_of_parts
from lightning_mtl.linalg.logs import log_losses as log_losses
from lightning_mtl.linalg.logs import one_or_nan as one_or_nan
