"""How compressible a cache is: spectrum of its response profiles, rates, and compressors beside each other."""

from __future__ import annotations
