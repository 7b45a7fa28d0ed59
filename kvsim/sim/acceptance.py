"""How many draft tokens each verification accepts: drawn per request, whatever else is simulated.

Acceptance is independent from position to position (Leviathan et al. 2023, arXiv 2211.17192): draft i is accepted with
the chance of its position if all before it were, and the first refusal ends it. A draw depends on the seed, the request
and the number of the verification alone, so all strategies and engines of a comparison see the same luck.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


class Acceptance:
    """Tokens per verification of every request."""

    def __init__(self, survival: Sequence[float], key: int) -> None:
        """Take the chances that each draft and all before it are accepted, and the key of the random stream."""
        self._rising = np.array(survival, dtype=np.float64)[::-1]
        self._key = key

    def advances(self, request: int, first: int, tokens: int) -> IntArray:
        """Tokens of each verification from number ``first`` on, until ``tokens`` are out; the last is cut to fit."""
        rng = np.random.Generator(np.random.Philox(key=[self._key, request]))
        drafts = len(self._rising)
        # Each verification gives a token at least, so these draws always suffice.
        draws = rng.random(first + tokens)[first:]
        advances = 1 + drafts - np.searchsorted(self._rising, draws, side="right")
        total = np.cumsum(advances)
        count = int(np.searchsorted(total, tokens)) + 1
        kept: IntArray = advances[:count].astype(np.int64)
        kept[-1] -= int(total[count - 1]) - tokens
        return kept
