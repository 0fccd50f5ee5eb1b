"""The line of ideas that leads to Mamba: HiPPO's memories, their discretisation, S4 and S4D."""

from .discretize import discretize
from .hippo import HiPPO, hippo_matrices, nplr
from .s4 import S4, S4D, S4DMixer

__all__ = ["S4", "S4D", "HiPPO", "S4DMixer", "discretize", "hippo_matrices", "nplr"]
