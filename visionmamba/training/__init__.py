"""Training classifiers on timm's data, augmentation, optimiser and scheduler parts, so that a killed run goes on.

A run is a function of its recipe: every random number is drawn from the seed and the place in the run (epoch, image,
step), never from what happened before. Resuming therefore needs the weights, the optimiser and the step's number only,
and gives bit for bit what an uninterrupted run gives; so do several processes, up to the order of sums.
"""

from .config import ConfigError, TrainConfig, load_config
from .data import DataError
from .engine import Interrupted, Trainer, TrainingError

__all__ = ["ConfigError", "DataError", "Interrupted", "TrainConfig", "Trainer", "TrainingError", "load_config"]
