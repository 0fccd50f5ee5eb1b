"""Convert a checkpoint: from the authors' layout to this project's, back, or to a folder for the Hugging Face Hub.

python tools/convert_checkpoint.py vim_tiny_patch16_224 vim_t_midclstok_76p1acc.pth vim_tiny.safetensors
python tools/convert_checkpoint.py vim_tiny_patch16_224 vim_tiny.safetensors authors.pth --to official
python tools/convert_checkpoint.py vim_tiny_patch16_224 vim_tiny.safetensors hub/vim_tiny --to hub
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from visionmamba.cli._arguments import parse_size
from visionmamba.cli._common import CommandError, check_model_name, one_line
from visionmamba.conversion import write_hub_folder, write_official, write_ours
from visionmamba.zoo import model_names

WRITERS = {"ours": write_ours, "official": write_official, "hub": write_hub_folder}


def main(arguments: list[str]) -> int:
    """Convert; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the model's timm name")
    parser.add_argument("checkpoint", type=Path, help="the weights, in any layout of the model's family")
    parser.add_argument("out", type=Path, help="file to write; a folder with --to hub")
    parser.add_argument("--to", choices=WRITERS, default="ours", help="layout to write (default: ours)")
    parser.add_argument("--img-size", help="HxW that the checkpoint was trained at, where it is not the model's size")
    given = parser.parse_args(arguments)
    try:
        check_model_name(given.model, model_names())
        img_size = parse_size(given.img_size, "--img-size") if given.img_size else None
        WRITERS[given.to](given.model, given.checkpoint, given.out, img_size)
    except (CommandError, RuntimeError, ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    print(f"wrote {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
