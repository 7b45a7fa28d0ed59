"""The least that an operation must move and compute: what no device does faster than its datasheet's rates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvsim.calibration.facts import DeviceFacts

FloatArray = npt.NDArray[np.float64]
Shape = Mapping[str, FloatArray]

KV_BYTES: Mapping[str, float] = {"bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "int8": 1.0, "nvfp4": 0.5, "int4": 0.5}
WEIGHT_BYTES: Mapping[str, float] = {
    "bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "fp8_block": 1.0, "int8": 1.0, "int8_wo": 1.0, "sq": 1.0, "nvfp4": 0.5,
    "int4_wo": 0.5,
}  # fmt: skip
"""Bytes of an element without its scales."""
FASTEST_NATIVE: Mapping[str, str] = {
    "fp8_block": "fp8", "nvfp4": "fp4", "int8_wo": "int8", "int4_wo": "int8", "sq": "int8",
}  # fmt: skip
"""Native dtype that a kernel of this name could use at best: what it is named for need not be what it multiplies in."""
LATENT_DIM, ROPE_DIM = 512, 64
"""MLA of DeepSeek-V3: what the mla tables are measured with."""
NOPE_DIM = 128


@dataclass(frozen=True)
class LeastWork:
    """Lower bounds, one per row.

    Attributes
    ----------
    moved_bytes : array or None
        Memory traffic, or per-rank link traffic of a collective; None where the format's bytes are not known.
    bytes_per_s : float or None
        Datasheet rate that moves them; None where the device has none.
    working_set_bytes : array
        What a repeated call finds in cache if it fits; infinite for a collective.
    flops_per_s : float
        The fastest datasheet rate that the key's dtypes could run at.
    """

    moved_bytes: FloatArray | None
    bytes_per_s: float | None
    working_set_bytes: FloatArray
    flops: FloatArray
    flops_per_s: float

    def seconds(self) -> FloatArray:
        """Roofline: no call is shorter, unless from cache."""
        computed_s = self.flops / self.flops_per_s
        if self.moved_bytes is None or not self.bytes_per_s:
            return computed_s
        return np.maximum(computed_s, self.moved_bytes / self.bytes_per_s)


def least_work(operation: str, shape: Shape, key: Mapping[str, str], facts: DeviceFacts) -> LeastWork:
    """Bound the work of rows of one key from below."""
    moved, flops = _WORK[operation](shape, key)
    rates = [facts.flops_per_s.get(FASTEST_NATIVE.get(key[name], key[name]), 0.0) for name in ("dtype", "kv_dtype")]
    infinite = np.full(len(flops), np.inf)
    is_link = operation == "all_reduce"
    return LeastWork(
        moved_bytes=moved,
        bytes_per_s=facts.link_bytes_per_s if is_link else facts.bandwidth_bytes_per_s,
        working_set_bytes=infinite if is_link or moved is None else moved,
        flops=flops,
        flops_per_s=max(*rates, facts.half_flops_per_s),
    )


_Work = tuple[FloatArray | None, FloatArray]


def _decode_attention(shape: Shape, key: Mapping[str, str]) -> _Work:
    context, window = shape["context_tokens"], shape["window_tokens"]
    read = np.where(window > 0, np.minimum(window, context), context)
    elements = 2.0 * shape["batch"] * read * shape["num_kv_heads"] * shape["head_dim"]
    flops = 4.0 * shape["batch"] * read * shape["num_heads"] * shape["head_dim"]
    return _scaled(elements, KV_BYTES.get(key["kv_dtype"])), flops


def _prefill_attention(shape: Shape, key: Mapping[str, str]) -> _Work:
    pairs = query_key_pairs(shape["prompt_tokens"], shape["context_tokens"], shape["window_tokens"])
    flops = 4.0 * shape["batch"] * pairs * shape["num_heads"] * shape["head_dim"]
    # Queries in and outputs out, one byte each at the least; K and V besides are small or cached.
    moved = 2.0 * shape["batch"] * shape["prompt_tokens"] * shape["num_heads"] * shape["head_dim"]
    return moved, flops


def query_key_pairs(prompt: FloatArray, context: FloatArray, window: FloatArray) -> FloatArray:
    """Pairs that causal attention computes: token i of the prompt sees ``context - prompt + i``, at most the window."""
    cached = context - prompt
    whole = prompt * cached + prompt * (prompt + 1.0) / 2.0
    # The first tokens see fewer than a window; the others see all of it.
    short = np.clip(window - cached, 0.0, prompt)
    limited = short * cached + short * (short + 1.0) / 2.0 + (prompt - short) * window
    return np.where((window > 0) & (window < context), limited, whole)


def _mla_decode(shape: Shape, key: Mapping[str, str]) -> _Work:
    tokens = shape["batch"] * shape["context_tokens"]
    width = LATENT_DIM + ROPE_DIM
    flops = 2.0 * tokens * shape["num_heads"] * (width + LATENT_DIM)
    return _scaled(tokens * width, KV_BYTES.get(key["kv_dtype"])), flops


def _mla_prefill(shape: Shape, key: Mapping[str, str]) -> _Work:
    pairs = query_key_pairs(shape["prompt_tokens"], shape["context_tokens"], np.zeros(len(shape["batch"])))
    flops = 2.0 * shape["batch"] * pairs * shape["num_heads"] * (NOPE_DIM + ROPE_DIM + NOPE_DIM)
    return 2.0 * shape["batch"] * shape["prompt_tokens"] * shape["num_heads"] * NOPE_DIM, flops


def _gemm(shape: Shape, key: Mapping[str, str]) -> _Work:
    weights = shape["n"] * shape["k"]
    return _scaled(weights, WEIGHT_BYTES.get(key["dtype"])), 2.0 * shape["m"] * weights


def _all_reduce(shape: Shape, key: Mapping[str, str]) -> _Work:
    # Where the switch adds up, a rank sends its message and receives the sum; nothing moves less.
    return shape["message_bytes"] * 1.0, np.zeros(len(shape["message_bytes"]))


def _kernel(shape: Shape, key: Mapping[str, str]) -> _Work:
    return shape["read_bytes"] * 1.0, shape["flops"] * 1.0


def _scaled(elements: FloatArray, element_bytes: float | None) -> FloatArray | None:
    return None if element_bytes is None else elements * element_bytes


_WORK = {
    "decode_attention": _decode_attention, "prefill_attention": _prefill_attention, "mla_decode": _mla_decode,
    "mla_prefill": _mla_prefill, "gemm": _gemm, "all_reduce": _all_reduce, "kernel": _kernel,
}  # fmt: skip
