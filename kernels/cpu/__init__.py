"""cpu kernels; see ``kernels/README.md``."""
