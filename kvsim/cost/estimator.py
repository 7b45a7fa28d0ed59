"""Seconds of one operation from its work and a device's rates: the datasheet estimator.

A kernel takes a launch floor plus the smooth maximum of what it moves, computes and unpacks. The floor is what makes
efficiency depend on size: at batch 1 and 4k context a decode attention launch reaches about a third of peak.
"""

from __future__ import annotations

import numpy as np

from kvsim.cost.rates import Rates
from kvsim.cost.shapes import Gemm
from kvsim.ops import Numeric, Work
from kvsim.specs.base import Dtype

SMOOTHNESS = 6.0
"""Exponent of the smooth maximum; FA3 fp8 on H100 and H200 together fit 6.3 (warp-specialised kernels overlap well)."""


def smooth_maximum(*terms_s: float) -> float:
    """p-norm of the terms: the largest one, and a little more where two are close."""
    largest = max(terms_s)
    if largest <= 0.0:
        return 0.0
    return float(largest * sum((term / largest) ** SMOOTHNESS for term in terms_s) ** (1.0 / SMOOTHNESS))


def gemm_seconds(gemm: Gemm, rows: Numeric, rates: Rates, *, weight_bits: float, compute: Dtype) -> Numeric:
    """All repetitions of a GEMM: launch + max(weights and activations moved, FLOPs)."""
    activation_bytes = 2.0 * rows * (gemm.k + gemm.n) * max(1, gemm.experts_per_token)
    moved_s = (gemm.weights_touched(rows) * weight_bits / 8.0 + activation_bytes) / rates.weight_bytes_per_s
    computed_s = gemm.flops(rows) / rates.matmul_flops_per_s(compute)
    return gemm.count * (rates.gemm_launch_s + np.maximum(moved_s, computed_s))


def streaming_seconds(work: Work, rates: Rates) -> float:
    """Time of a memory-bound kernel's work without its launch floor: quantise, score, compact, rotate."""
    moved_s = (float(work.bytes_read) + float(work.bytes_written)) / rates.stream_bytes_per_s
    computed_s = float(work.flops) / rates.matmul_flops_per_s(work.dtype)
    vector_s = float(work.vector_flops) / rates.vector_flops_per_s
    return smooth_maximum(moved_s, computed_s, vector_s)


def attention_seconds_per_token(
    *,
    stored_bytes: float,
    elements: float,
    flops: float,
    extra_flops: float,
    family: str | None,
    group_size: float,
    compute: Dtype,
    rates: Rates,
) -> tuple[float, float]:
    """Marginal time of one attended token in one layer of decode attention: (whole, part due to unpacking).

    ``stored_bytes``, ``elements`` and ``flops`` are those of one token on one rank. Elements are unpacked once per KV
    head, or once per query head (``group_size`` times) where the shipped kernel does not share them.
    """
    moved_s = stored_bytes / rates.stream_bytes_per_s
    computed_s = flops / rates.matmul_flops_per_s(compute)
    plain_s = smooth_maximum(moved_s, computed_s)
    if family is None:
        whole_s = smooth_maximum(moved_s, computed_s + extra_flops / rates.matmul_flops_per_s(Dtype.BF16))
        return whole_s, whole_s - plain_s
    repeats = group_size if rates.unpack_prior(family).per_query_head else 1.0
    unpack_s = elements * repeats / rates.unpack_elements_per_s(family)
    whole_s = smooth_maximum(moved_s, computed_s, unpack_s)
    return whole_s, whole_s - plain_s


def all_reduce_seconds(size_bytes: Numeric, ranks: int, rates: Rates) -> Numeric:
    """Ring all-reduce: latency + 2·(n-1)/n of the message over one direction of the link."""
    if ranks == 1 or rates.link_bytes_per_s is None:
        return size_bytes * 0.0
    return rates.all_reduce_latency_s + 2.0 * (ranks - 1) / ranks * size_bytes / rates.link_bytes_per_s
