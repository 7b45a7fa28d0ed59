"""Names of the arrays that numeric code passes on."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

FloatArray: TypeAlias = NDArray[np.float32]
"""Keys, values, queries: what caches hold and codecs read back."""
DoubleArray: TypeAlias = NDArray[np.float64]
"""Where a sum or a decomposition needs the digits."""
CodeArray: TypeAlias = NDArray[np.int32]
"""Codes of quantised numbers, from 0 on unless a docstring says otherwise."""
IntArray: TypeAlias = NDArray[np.int64]
"""Indices and positions."""
BoolArray: TypeAlias = NDArray[np.bool_]
