"""Triton kernels for compressed KV caches, each beside a plain torch reference and its cases.

Each name in `KERNELS` is a subpackage with ``reference.py`` (torch, fp32), ``kernel.py`` (Triton), ``cases.py``
(shapes, tolerances, inputs) and ``README.md`` (layout in bytes, the maths). Importing this package imports neither
torch nor triton, and nothing here imports kvsim. Imports inside are relative, because an installed copy has another
name.
"""

KERNELS = ("decode_attention",)
"""Every kernel of this package, by the name of its subpackage."""
