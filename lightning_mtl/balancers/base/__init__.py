"""What balancers are made of: one base and three families, by what a method needs to see."""

from lightning_mtl.balancers.base.balancer import ALL as ALL
from lightning_mtl.balancers.base.balancer import Balancer as Balancer
from lightning_mtl.balancers.base.balancer import Tasks as Tasks
from lightning_mtl.balancers.base.balancer import in_numpy as in_numpy
from lightning_mtl.balancers.base.gram import GramBalancer as GramBalancer
from lightning_mtl.balancers.base.learned import LearnedBalancer as LearnedBalancer
from lightning_mtl.balancers.base.loss import LossBalancer as LossBalancer
from lightning_mtl.balancers.base.rows import RowBalancer as RowBalancer
