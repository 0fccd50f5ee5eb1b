"""Evaluate a detector: ``python tools/det_test.py CONFIG CHECKPOINT [--show-dir DIR] [--cfg-options NAME=VALUE ...]``.

On several GPUs: ``torchrun --nproc-per-node 8 tools/det_test.py ... --launcher pytorch``.
"""

from visionmamba.openmmlab.runner import test_main

if __name__ == "__main__":
    test_main(__doc__)
