"""Draw samples of a config's data set, after augmentation: ``python tools/browse.py CONFIG OUT``."""

from __future__ import annotations

import argparse
from pathlib import Path

from visionmamba.openmmlab.pictures import browse
from visionmamba.openmmlab.runner import add_config_arguments, load_config, one_sentence


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_config_arguments(parser)
    parser.add_argument("out", type=Path, help="folder for the pictures")
    parser.add_argument("--split", choices=["train", "val", "test"], default="train")
    parser.add_argument("--count", type=int, default=20, help="how many (20)")
    options = parser.parse_args()
    with one_sentence(parser, building=True):
        paths = browse(load_config(options.config, options.cfg_options), options.out, options.split, options.count)
    print(f"{len(paths)} pictures in {options.out}")


if __name__ == "__main__":
    main()
