"""Export a model to a file: `visionmamba export` as a script.

python tools/export.py vmamba_tiny_s1l8 --format onnx --size 224x224 --checkpoint FILE --check
"""

from __future__ import annotations

import sys

from visionmamba.cli import main

if __name__ == "__main__":
    main(["export", *sys.argv[1:]])
