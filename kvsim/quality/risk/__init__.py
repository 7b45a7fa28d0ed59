"""How compressible a cache is: spectrum of its response profiles, rates, compressors beside each other, `kvsim risk`."""

from __future__ import annotations
