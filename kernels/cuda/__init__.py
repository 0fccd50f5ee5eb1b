"""cuda kernels; see ``kernels/README.md``."""
