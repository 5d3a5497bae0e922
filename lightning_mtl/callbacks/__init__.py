"""Callbacks: what a balancer did, as scalars, a heatmap and a final table."""

from lightning_mtl.callbacks.balance_monitor import BalanceMonitor as BalanceMonitor
from lightning_mtl.callbacks.conflict_heatmap import ConflictHeatmap as ConflictHeatmap
from lightning_mtl.callbacks.final_table import FinalTable as FinalTable
