"""Evaluate a classifier on a split with its published preprocessing.

    python tools/validate.py model=vmamba_tiny_s1l8 checkpoint=FILE data=/data/imagenet [precision=bf16] [RECIPE]

Prints JSON: top-1 and top-5 accuracy in per cent, the loss and the number of images. All keys of a training recipe are
taken; without a checkpoint the published weights are fetched.
"""

from __future__ import annotations

import sys

import visionmamba  # noqa: F401  (registers the models)
from visionmamba.training.run import validate

if __name__ == "__main__":
    sys.exit(validate(sys.argv[1:], __doc__))
