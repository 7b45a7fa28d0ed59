"""Seconds of one operation from its work and a device's rates: the datasheet estimator.

A kernel takes a launch floor plus the smooth maximum of what it moves, computes and unpacks. The floor is what makes
efficiency depend on size: at batch 1 and 4k context a decode attention launch reaches about a third of peak.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvsim.cost.rates import Rates
from kvsim.cost.shapes import Gemm
from kvsim.ops import Numeric, Work
from kvsim.specs.base import Dtype

SMOOTHNESS = 6.0
"""Exponent of the smooth maximum; FA3 fp8 on H100 and H200 together fit 6.3 (warp-specialised kernels overlap well)."""
GEMM_SMOOTHNESS = 3.0
"""The same for linear layers, which overlap less well at their ridge: among 2, 3, 4, 6 and the plain maximum, 3 has the
least error over aiconfigurator's bf16 GEMM tables of H100 (6.2 %) and is never worse than 4 on A100, B200 and L40S."""


def smooth_maximum(*terms_s: float) -> float:
    """p-norm of the terms: the largest one, and a little more where two are close."""
    largest = max(terms_s)
    if largest <= 0.0:
        return 0.0
    return float(largest * sum((term / largest) ** SMOOTHNESS for term in terms_s) ** (1.0 / SMOOTHNESS))


@dataclass(frozen=True, slots=True)
class PricedGemm:
    """A matrix product at a device's rates: seconds for any number of rows."""

    gemm: Gemm
    launch_s: float
    weights_s: float
    """Reading one k x n matrix."""
    activations_s_per_row: float
    compute_s_per_row: float
    skew: float = 1.0
    """Work of the fullest rank over the mean, where experts lie on different ranks."""
    tile_s: float = 0.0
    """Least time that one expert touched computes for; 0 for a dense product."""

    def seconds(self, rows: Numeric) -> Numeric:
        """All repetitions: launch + smooth maximum of weights and activations moved, and FLOPs."""
        touched = _at_most(self.gemm.matrices_touched(rows) * self.skew, self.gemm.local_experts)
        moved_s = self.weights_s * touched + rows * self.activations_s_per_row
        computed_s = rows * self.compute_s_per_row
        if self.tile_s:
            # Every expert touched computes whole tiles of rows.
            computed_s = _larger(computed_s, touched * self.tile_s)
        busy_s = (moved_s**GEMM_SMOOTHNESS + computed_s**GEMM_SMOOTHNESS) ** (1.0 / GEMM_SMOOTHNESS)
        return self.gemm.count * (self.launch_s + busy_s)


def price_gemm(gemm: Gemm, rates: Rates, *, weight_bits: float, compute: Dtype) -> PricedGemm:
    """Price a product whose weights take ``weight_bits`` each and that multiplies in ``compute``."""
    visits = gemm.visits_per_row
    bandwidth, launch_s, tile_s = rates.weight_bytes_per_s, rates.gemm_launch_s, 0.0
    skew = rates.expert_imbalance if gemm.is_spread else 1.0
    if gemm.num_experts:
        bandwidth, launch_s = rates.grouped_bytes_per_s, rates.grouped_launch_s
        tile_s = 2.0 * rates.grouped_tile_rows * gemm.k * gemm.n / rates.matmul_flops_per_s(compute)
    return PricedGemm(
        gemm=gemm,
        launch_s=launch_s,
        weights_s=gemm.k * gemm.n * weight_bits / 8.0 / bandwidth,
        activations_s_per_row=2.0 * (gemm.k + gemm.n) * visits * skew / bandwidth,
        compute_s_per_row=float(gemm.flops(1.0)) * skew / rates.matmul_flops_per_s(compute),
        skew=skew,
        tile_s=tile_s,
    )


def _at_most(count: Numeric, limit: int) -> Numeric:
    if not limit:
        return count
    return np.minimum(count, limit) if isinstance(count, np.ndarray) else min(count, float(limit))


def _larger(left: Numeric, right: Numeric) -> Numeric:
    return np.maximum(left, right) if isinstance(left, np.ndarray) else max(left, float(right))


def streaming_seconds(work: Work, rates: Rates) -> float:
    """Time of a memory-bound kernel's work without its launch floor: quantise, score, compact, rotate."""
    moved_s = (float(work.bytes_read) + float(work.bytes_written)) / rates.stream_bytes_per_s
    computed_s = float(work.flops) / rates.matmul_flops_per_s(work.dtype)
    vector_s = float(work.vector_flops) / rates.vector_flops_per_s
    if work.unpack_family is not None:
        vector_s += float(work.decoded_elements) / rates.unpack_elements_per_s(work.unpack_family)
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


def query_key_pairs(chunk_tokens: Numeric, context_tokens: int, window_tokens: int | None) -> Numeric:
    """Keys that the queries of a chunk see in all: causally, and within the window."""
    pairs = chunk_tokens * context_tokens + chunk_tokens * (chunk_tokens + 1) / 2
    if window_tokens is None:
        return pairs
    reach = chunk_tokens + context_tokens - window_tokens
    beyond = np.maximum(reach, 0.0) if isinstance(reach, np.ndarray) else max(reach, 0.0)
    before = max(0, context_tokens - window_tokens)
    return pairs - beyond * (beyond + 1) / 2 + before * (before + 1) / 2


def prefill_attention_seconds(queries: Numeric, pairs: Numeric, flops_per_pair: float, rates: Rates) -> Numeric:
    """One layer's attention over a chunk: launch + FLOPs at the plateau, for some keys more than are read.

    Every query costs as much as half of ``attention_half_tokens`` keys extra: a causal prompt of n tokens then runs at
    n / (n + half) of the plateau, and a window of w like a prompt of 2w, which has w keys per query on average
    (aiconfigurator, H100, window 128: median +24 % on vLLM's FA3, -41 % on TensorRT-LLM).
    """
    charged = pairs + queries * rates.attention_half_tokens / 2.0
    return rates.attention_launch_s + flops_per_pair * charged / rates.attention_flops_per_s
