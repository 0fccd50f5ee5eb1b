"""Mamba vision backbones for timm, on one selective-scan core.

Importing this package registers every model: ``timm.create_model("vmamba_tiny_s1l8")`` works afterwards.
"""

from . import models
from .analysis import register_flop_handlers
from .cuda_graph import graph, graph_training
from .ops import backend

register_flop_handlers()

__version__ = "0.1.0"

__all__ = ["__version__", "backend", "graph", "graph_training", "models"]
