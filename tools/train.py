"""Train a classifier by a recipe; see visionmamba/training.

    python tools/train.py configs/classification/vmamba_tiny.yaml data=/data/imagenet out=runs/vmamba_tiny
    torchrun --nproc-per-node 8 tools/train.py RECIPE data=/data/imagenet parallel=fsdp precision=bf16

Run the same command again to go on from the last checkpoint. SIGTERM and Ctrl-C save first; the exit status is then 143
or 130. A second Ctrl-C stops at once.
"""

from __future__ import annotations

import sys

import visionmamba  # noqa: F401  (registers the models)
from visionmamba.training.run import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], __doc__))
