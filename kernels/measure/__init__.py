"""Time every kernel on a GPU: ``python -m kernels.measure --out DIR``. See docs/measuring.md."""
