"""Balancers: from the losses or gradients of ``T`` tasks to ``T`` weights. One method per file.

>>> from lightning_mtl.balancers import available, load
>>> load("fixed", num_tasks=2, weights=[1.0, 0.1])
Fixed()
"""

from lightning_mtl.balancers.aligned import Aligned as Aligned
from lightning_mtl.balancers.base import Balancer as Balancer
from lightning_mtl.balancers.base import GramBalancer as GramBalancer
from lightning_mtl.balancers.base import LossBalancer as LossBalancer
from lightning_mtl.balancers.base import RowBalancer as RowBalancer
from lightning_mtl.balancers.cagrad import CAGrad as CAGrad
from lightning_mtl.balancers.chain import Chain as Chain
from lightning_mtl.balancers.clip_update import ClipUpdate as ClipUpdate
from lightning_mtl.balancers.config import ConFIG as ConFIG
from lightning_mtl.balancers.cosmos import COSMOS as COSMOS
from lightning_mtl.balancers.db_mtl import DBMTL as DBMTL
from lightning_mtl.balancers.db_mtl_average import DBMTLAverage as DBMTLAverage
from lightning_mtl.balancers.dtp import DTP as DTP
from lightning_mtl.balancers.dualproj import DualProj as DualProj
from lightning_mtl.balancers.dwa import DWA as DWA
from lightning_mtl.balancers.excess_mtl import ExcessMTL as ExcessMTL
from lightning_mtl.balancers.fairgrad import FairGrad as FairGrad
from lightning_mtl.balancers.famo import FAMO as FAMO
from lightning_mtl.balancers.fixed import Fixed as Fixed
from lightning_mtl.balancers.geometric_mean import GeometricMean as GeometricMean
from lightning_mtl.balancers.graddrop import GradDrop as GradDrop
from lightning_mtl.balancers.gradnorm import GradNorm as GradNorm
from lightning_mtl.balancers.gradvac import GradVac as GradVac
from lightning_mtl.balancers.imtl import IMTL as IMTL
from lightning_mtl.balancers.imtl_g import IMTLG as IMTLG
from lightning_mtl.balancers.imtl_l import IMTLL as IMTLL
from lightning_mtl.balancers.krum import Krum as Krum
from lightning_mtl.balancers.log_sum import LogSum as LogSum
from lightning_mtl.balancers.metabalance import MetaBalance as MetaBalance
from lightning_mtl.balancers.mgda import MGDA as MGDA
from lightning_mtl.balancers.moco import MoCo as MoCo
from lightning_mtl.balancers.modo import MoDo as MoDo
from lightning_mtl.balancers.moving_average import MovingAverage as MovingAverage
from lightning_mtl.balancers.nash import Nash as Nash
from lightning_mtl.balancers.pbi import PBI as PBI
from lightning_mtl.balancers.pcd import PCD as PCD
from lightning_mtl.balancers.pcgrad import PCGrad as PCGrad
from lightning_mtl.balancers.registry import BalancerSpec as BalancerSpec
from lightning_mtl.balancers.registry import available as available
from lightning_mtl.balancers.registry import load as load
from lightning_mtl.balancers.registry import resolve as resolve
from lightning_mtl.balancers.rlw import RLW as RLW
from lightning_mtl.balancers.sdmgrad import SDMGrad as SDMGrad
from lightning_mtl.balancers.stch import STCH as STCH
from lightning_mtl.balancers.trimmed_mean import TrimmedMean as TrimmedMean
from lightning_mtl.balancers.uncertainty import Uncertainty as Uncertainty
from lightning_mtl.balancers.upgrad import UPGrad as UPGrad
