"""Count the parameters and operations of detectors and segmentors: ``python tools/get_flops.py CONFIG [CONFIG ...]``.

Scans are counted, by the convention of the published tables; see ``visionmamba/openmmlab/complexity.py``.
"""

from __future__ import annotations

import argparse
import json

from visionmamba.openmmlab.complexity import complexity
from visionmamba.openmmlab.runner import load_config, one_sentence

_SIZES = {"mmdet": (800, 1280), "mmseg": (512, 2048)}


def main() -> None:
    """Parse the command line and print a line for each config."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", metavar="config", help="paths, or mmdet::... or mmseg::...")
    parser.add_argument(
        "--shape",
        nargs=2,
        type=int,
        metavar=("HEIGHT", "WIDTH"),
        help="800 1280 for detectors, 512 2048 for segmentors",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    results = []
    for name in options.configs:
        with one_sentence(parser, building=True):
            config = load_config(name)
            height, width = options.shape or _SIZES[config.get("default_scope", "mmdet")]
            results.append({"config": name, "input": [3, height, width], **complexity(config, (height, width))})
    if options.json:
        print(json.dumps(results, indent=1))
        return
    for result in results:
        shape = "x".join(map(str, result["input"]))
        print(f"{result['parameters'] / 1e6:8.2f} M {result['flops'] / 1e9:8.1f} G  {shape:>11}  {result['config']}")


if __name__ == "__main__":
    main()
