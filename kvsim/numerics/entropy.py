"""Entropy of codes, and the frequency tables that static entropy coders use instead of true probabilities."""

from __future__ import annotations

from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

Counts: TypeAlias = NDArray[np.int64]
Codes: TypeAlias = NDArray[np.int32]
Context: TypeAlias = Literal["tensor", "head", "channel"]


def count_rows(rows: Codes, levels: int) -> Counts:
    """Histogram of each row, (R, n) to (R, levels)."""
    shifted = rows.astype(np.int64) + levels * np.arange(len(rows))[:, None]
    return np.bincount(shifted.ravel(), minlength=levels * len(rows)).reshape(len(rows), levels)


def context_rows(codes: Codes, context: Context) -> Codes:
    """Codes of a tensor, (H, n, D), as one row per context: the values that one model describes."""
    heads, tokens, channels = codes.shape
    if context == "tensor":
        return codes.reshape(1, -1)
    if context == "head":
        return codes.reshape(heads, -1)
    return np.ascontiguousarray(codes.transpose(0, 2, 1)).reshape(heads * channels, tokens)


def ideal_bits(counts: Counts) -> float:
    """Bits that an ideal coder needs for rows with these histograms, (R, levels), if it knows them: n times H."""
    totals = counts.sum(axis=-1, keepdims=True)
    used = counts > 0
    ratios = np.divide(totals, counts, out=np.ones(counts.shape), where=used)
    return float(np.sum(counts * np.log2(ratios)))


def empirical_entropy(codes: Codes, levels: int, context: Context = "tensor") -> float:
    """Zeroth-order entropy of codes (H, n, D) in bits per value, given the context that a value lies in.

    Conditioning never adds: channel <= head <= tensor. 0 for no codes.
    """
    if not codes.size:
        return 0.0
    return ideal_bits(count_rows(context_rows(codes, context), levels)) / codes.size


def quantised_frequencies(counts: Counts, total: int) -> Counts:
    """Whole frequencies that sum to ``total``, at least 1 where a count is not 0, near the counts' proportions.

    Raises
    ------
    ValueError
        More symbols are used than ``total``, or none is.
    """
    used = np.flatnonzero(counts)
    if not 0 < len(used) <= total:
        msg = f"{len(used)} symbols do not fit a table of {total}"
        raise ValueError(msg)
    exact = counts[used] * (total / counts[used].sum())
    chosen = np.maximum(1, np.floor(exact)).astype(np.int64)
    while (missing := total - int(chosen.sum())) != 0:
        step = 1 if missing > 0 else -1
        # Loss of code length by one step; a frequency of 1 cannot give any away.
        gain = counts[used] * np.log2((chosen + step).clip(1) / chosen)
        gain[(chosen + step) < 1] = -np.inf
        best = np.argsort(-gain, kind="stable")[: min(abs(missing), max(1, len(used) // 2))]
        best = best[np.isfinite(gain[best])]
        chosen[best] += step
    frequencies = np.zeros(len(counts), dtype=np.int64)
    frequencies[used] = chosen
    return frequencies


def cross_entropy_bits(counts: Counts, frequencies: Counts) -> float:
    """Bits of values with a histogram, coded ideally under ``frequencies``: n times (H + KL divergence)."""
    used = counts > 0
    return float(-np.sum(counts[used] * np.log2(frequencies[used] / frequencies.sum())))
