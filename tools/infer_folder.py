"""Predict an image or a folder of images: ``python tools/infer_folder.py CONFIG CHECKPOINT IMAGES OUT``.

Draws boxes and masks, or label maps, into ``OUT/pictures``; lists detections in ``OUT/predictions.json`` and saves
label maps in ``OUT/labels``. Images that cannot be read are named; the exit status is then 1.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from visionmamba.openmmlab.pictures import predict_folder
from visionmamba.openmmlab.runner import add_config_arguments, checked_checkpoint, load_config, one_sentence


def main() -> int:
    """Parse the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    parser.add_argument("checkpoint", help="weights of the detector or segmentor")
    parser.add_argument("images", type=Path, help="an image, or a folder")
    parser.add_argument("out", type=Path, help="folder for the results")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--score-thr", type=float, default=0.3, help="least score of a detection (0.3)")
    options = parser.parse_args()
    failed = 0
    with one_sentence(parser, building=True):
        config = load_config(options.config, options.cfg_options)
        checkpoint = checked_checkpoint(options.checkpoint)
    with one_sentence(parser):
        results = predict_folder(config, checkpoint, options.images, options.out, options.device, options.score_thr)
        for path, problem in results:
            failed += problem is not None
            print(f"{path}: {problem or 'done'}", file=sys.stderr if problem else sys.stdout)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
