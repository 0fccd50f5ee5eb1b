"""``python -m visionmamba``: the command line, where the ``visionmamba`` script is not on the path."""

from .cli import main

main()
