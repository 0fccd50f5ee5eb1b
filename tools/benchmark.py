"""Measure models: `visionmamba bench` as a script.

python tools/benchmark.py 'vmamba_*' --peers --mode infer,train --batch 1,128 --precision bf16 --out FOLDER
"""

from __future__ import annotations

import sys

from visionmamba.cli import main

if __name__ == "__main__":
    main(["bench", *sys.argv[1:]])
