"""triton kernels; see ``kernels/README.md``."""
