"""Token counts drawn from a length distribution."""

from __future__ import annotations

import math

import numpy as np

from kvsim.errors import InvalidSpec
from kvsim.requests import IntArray
from kvsim.specs.workload import ConstantLengths, Lengths, LogNormalLengths, QuantileLengths, UniformLengths
from kvsim.traces.rows import MAX_REQUEST_TOKENS


def largest_tokens(lengths: Lengths) -> int:
    """Largest count that a distribution can give."""
    if isinstance(lengths, ConstantLengths):
        return lengths.tokens
    if isinstance(lengths, QuantileLengths):
        return lengths.quantiles[-1][1]
    return lengths.max_tokens


def draw_lengths(lengths: Lengths, count: int, rng: np.random.Generator, field: str) -> IntArray:
    """Draw ``count`` whole numbers of 1 or more; shape (count,).

    Quantiles are sampled by inverse transform: uniform draws, linear interpolation, rounding to the nearest.

    Raises
    ------
    InvalidSpec
        The distribution reaches beyond MAX_REQUEST_TOKENS; ``field`` names it.
    """
    if (largest := largest_tokens(lengths)) > MAX_REQUEST_TOKENS:
        msg = f"workload: {field}: {largest} is not allowed; at most {MAX_REQUEST_TOKENS}"
        raise InvalidSpec(msg)
    if isinstance(lengths, ConstantLengths):
        return np.full(count, lengths.tokens, dtype=np.int64)
    if isinstance(lengths, UniformLengths):
        tokens: IntArray = rng.integers(lengths.min_tokens, lengths.max_tokens, size=count, endpoint=True)
        return tokens
    if isinstance(lengths, LogNormalLengths):
        return _lognormal(lengths, rng.standard_normal(count))
    probabilities, levels = np.array(lengths.quantiles, dtype=np.float64).T
    drawn: IntArray = np.rint(np.interp(rng.random(count), probabilities, levels)).astype(np.int64)
    return drawn


def _lognormal(lengths: LogNormalLengths, normal: np.typing.NDArray[np.float64]) -> IntArray:
    logs = math.log(lengths.median_tokens) + lengths.sigma * normal
    # Clipping the logarithm first keeps exp() from overflowing at a large sigma.
    tokens = np.exp(np.minimum(logs, math.log(lengths.max_tokens) + 1.0))
    return np.clip(np.rint(tokens), lengths.min_tokens, lengths.max_tokens).astype(np.int64)
