"""Train a detector: ``python tools/det_train.py CONFIG [--amp] [--resume] [--cfg-options NAME=VALUE ...]``.

On several GPUs: ``torchrun --nproc-per-node 8 tools/det_train.py ... --launcher pytorch``.
"""

from visionmamba.openmmlab.runner import train_main

if __name__ == "__main__":
    train_main(__doc__)
