"""Decode attention as the simulator adds it up: launch + per_sequence x batch + per_token x attended tokens.

Fitted kernels are not of that form; here they are projected onto it, and the error of doing so is stated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

import numpy as np
import numpy.typing as npt

from kvsim.cost.kernels import (
    AttentionShape,
    FloatArray,
    Kernel,
    attention_kernel,
    attention_shape,
    kept_by_deployment,
)
from kvsim.cost.priors import Edge
from kvsim.deployment import Deployment, LayerClass
from kvsim.specs.base import DTYPE_BITS

SHORTEST_TOKENS = 128
FLOOR_TOKENS = 16
"""Context so short that its tokens cost next to nothing."""
LONG_TOKENS = 32_768
"""Beyond this context each doubling weighs half: few requests are that long."""
COLD_CACHES = 2.0
"""KV of so many times the cache's size is surely read from memory when a measurement repeats a call."""
BAND_QUANTILES = (0.1, 0.9)


@dataclass(frozen=True)
class DecodePrice:
    """Affine price of one layer's decode attention on one rank, in seconds.

    Attributes
    ----------
    median_error, p90_error : float
        Projection against the fitted kernel over the grid, as fractions of the kernel's time.
    log_low, log_high : float
        Band as logarithms of time over the price: the kernel's own and the projection's, added as independent errors.
    """

    launch_s: float
    per_sequence_s: float
    per_token_s: float
    median_error: float
    p90_error: float
    log_low: float
    log_high: float

    def factor(self, edge: Edge) -> float:
        """What an edge multiplies the price by."""
        if edge is Edge.CENTRAL:
            return 1.0
        return math.exp(self.log_low if edge is Edge.OPTIMISTIC else self.log_high)


@dataclass(frozen=True)
class DecodeKernel:
    """A layer class's decode attention where a fitted kernel prices it."""

    kernel: Kernel
    price: DecodePrice
    stored_bytes: float
    """KV of one token in one layer on one rank, in the kernel's format."""
    bandwidth_bytes_per_s: float

    def launch_s(self, edge: Edge) -> float:
        """Floor of one call."""
        return self.price.launch_s * self.price.factor(edge)

    def per_sequence_s(self, edge: Edge) -> float:
        """What each sequence of the batch adds, whatever its length."""
        return self.price.per_sequence_s * self.price.factor(edge)

    def per_token_s(self, edge: Edge) -> float:
        """What each attended token adds: never less than its bytes at the datasheet's bandwidth."""
        return max(self.price.per_token_s * self.price.factor(edge), self.stored_bytes / self.bandwidth_bytes_per_s)

    def stream_bytes_per_s(self, edge: Edge) -> float:
        """Rate at which it reads its cache."""
        return self.stored_bytes / self.per_token_s(edge)


@dataclass(frozen=True)
class ClassKernels:
    """Fitted attention kernels of one layer class, for its own format and for the model's; None where there is none."""

    shape: AttentionShape | None = None
    decode: DecodeKernel | None = None
    native_decode: DecodeKernel | None = None
    prefill: Kernel | None = None
    native_prefill: Kernel | None = None

    @property
    def floor(self) -> DecodeKernel | None:
        """Kernel whose launches the class pays: its own, or where its format has none the one for the model's."""
        return self.decode or self.native_decode


NO_KERNELS = ClassKernels()


@kept_by_deployment
def attention_kernels(deployment: Deployment) -> tuple[ClassKernels, ...]:
    """Kernels of every layer class, in their order."""
    if deployment.calibration is None:
        return (NO_KERNELS,) * len(deployment.layer_classes)
    return tuple(_class_kernels(deployment, layer_class) for layer_class in deployment.layer_classes)


def _class_kernels(deployment: Deployment, layer_class: LayerClass) -> ClassKernels:
    shape = attention_shape(deployment, layer_class)
    if shape is None:
        return NO_KERNELS
    is_native = layer_class.encoding.kind == "native"
    native_decode = _decode_kernel(deployment, layer_class, shape, native=True)
    native_prefill = attention_kernel(deployment, "prefill", layer_class, native=True)
    return ClassKernels(
        shape=shape,
        decode=native_decode if is_native else _decode_kernel(deployment, layer_class, shape, native=False),
        native_decode=native_decode,
        prefill=native_prefill if is_native else attention_kernel(deployment, "prefill", layer_class),
        native_prefill=native_prefill,
    )


def _decode_kernel(
    deployment: Deployment, layer_class: LayerClass, shape: AttentionShape, *, native: bool
) -> DecodeKernel | None:
    kernel = attention_kernel(deployment, "decode", layer_class, native=native)
    if kernel is None:
        return None
    group, dtype = layer_class.group, deployment.model.dtype
    if native:
        stored = group.kv_elements_per_token * DTYPE_BITS[dtype] / 8
    else:
        stored = layer_class.encoding.read_bytes_per_token(group, dtype)
    stored *= layer_class.rank_share
    price = decode_price(kernel, shape, serving_range(deployment, layer_class, stored))
    return DecodeKernel(kernel, price, stored, deployment.device.bandwidth_bytes_per_s)


@dataclass(frozen=True)
class ServingRange:
    """What decode steps of a deployment can look like, rounded up to powers of two so that many share it."""

    max_batch: int
    max_context_tokens: int
    max_cached_tokens: int
    """Tokens that memory could hold."""
    layer_bytes_per_token: float
    """KV of one token in one layer on one rank."""
    cache_bytes: float


def serving_range(deployment: Deployment, layer_class: LayerClass, layer_bytes_per_token: float) -> ServingRange:
    """Range of a deployment for one layer class, whose tokens take so many bytes in a layer on one rank."""
    model, engine, device = deployment.model, deployment.engine, deployment.device
    layers = sum(size for _, size in layer_class.bands)
    return ServingRange(
        max_batch=power_of_two(engine.max_num_seqs),
        max_context_tokens=power_of_two(engine.max_model_len or model.max_position_embeddings),
        max_cached_tokens=power_of_two(device.capacity_bytes / layers / layer_bytes_per_token),
        layer_bytes_per_token=layer_bytes_per_token,
        cache_bytes=float(device.cache.value) if device.cache else 0.0,
    )


def power_of_two(count: float) -> int:
    """Round up to a power of two."""
    return 1 << (max(1, math.ceil(count)) - 1).bit_length()


@lru_cache(maxsize=512)
def decode_price(kernel: Kernel, shape: AttentionShape, serving: ServingRange) -> DecodePrice:
    """Project a kernel: least squares of relative error over batches and contexts, no coefficient below zero."""
    batch, context, weight = _grid(shape, serving)
    seconds = _engine_seconds(kernel, shape, serving, batch, context)
    terms = np.stack([np.ones(len(batch)), batch, batch * context], 1)
    launch_s, per_sequence_s, per_token_s = _non_negative_fit(terms / seconds[:, None], weight)
    ratio = seconds / (launch_s + per_sequence_s * batch + per_token_s * batch * context)
    low, high = kernel.predictor.band(shape.columns(batch=batch, context_tokens=context))
    missed = _weighted_quantiles(np.abs(1.0 / ratio - 1.0), weight, (0.5, 0.9))
    below, above = _weighted_quantiles(np.log(ratio), weight, BAND_QUANTILES)
    return DecodePrice(
        launch_s=launch_s,
        per_sequence_s=per_sequence_s,
        per_token_s=per_token_s,
        median_error=missed[0],
        p90_error=missed[1],
        log_low=-float(np.hypot(np.average(np.log(low), weights=weight), min(below, 0.0))),
        log_high=float(np.hypot(np.average(np.log(high), weights=weight), max(above, 0.0))),
    )


def _grid(shape: AttentionShape, serving: ServingRange) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Batches and contexts by powers of two, as far as memory holds them: (batch, attended tokens, weight)."""
    longest = max(serving.max_context_tokens, SHORTEST_TOKENS)
    batches = 2.0 ** np.arange(np.log2(serving.max_batch) + 1)
    shortest = min(SHORTEST_TOKENS, max(1, shape.window_tokens // 8)) if shape.window_tokens else SHORTEST_TOKENS
    contexts = shortest * 2.0 ** np.arange(np.log2(longest / shortest) + 1)
    batch, context = (axis.ravel() for axis in np.meshgrid(batches, contexts, indexing="ij"))
    fits = batch * context <= max(serving.max_cached_tokens, 4 * SHORTEST_TOKENS)
    batch, context = batch[fits], context[fits]
    weight = np.minimum(1.0, LONG_TOKENS / context)
    if shape.window_tokens:
        context = np.minimum(context, float(shape.window_tokens))
    return batch, context, weight


def _engine_seconds(
    kernel: Kernel, shape: AttentionShape, serving: ServingRange, batch: FloatArray, context: FloatArray
) -> FloatArray:
    """Seconds with KV read from memory.

    Timings repeat one call, so that a small cache is found in the L2; in an engine, weights and other layers pass
    between two calls of a layer. There the time is the floor measured at a short context, and every further token at
    the rate of a cache that is surely in memory; never less than was measured.
    """
    measured_s = kernel.predictor.seconds(shape.columns(batch=batch, context_tokens=context))
    if not serving.cache_bytes:
        return measured_s
    cold_tokens = COLD_CACHES * serving.cache_bytes / serving.layer_bytes_per_token
    is_warm = batch * context < cold_tokens
    if not is_warm.any():
        return measured_s
    batch, context = batch[is_warm], context[is_warm]
    # A window has nothing beyond it: the rate of surely cold tokens is that of the kernel without one.
    open_shape = AttentionShape(shape.num_heads, shape.num_kv_heads, shape.head_dim, 0, shape.is_latent)
    far = cold_tokens / batch
    floor_s, near_s, far_s = (
        kernel.predictor.seconds(open_shape.columns(batch=batch, context_tokens=tokens))
        for tokens in (np.minimum(context, FLOOR_TOKENS), 2.0 * far, 4.0 * far)
    )
    per_token_s = np.maximum(far_s - near_s, 0.0) / (2.0 * far)
    cold_s = floor_s + per_token_s * np.maximum(context - FLOOR_TOKENS, 0.0)
    result = measured_s.copy()
    result[is_warm] = np.maximum(measured_s[is_warm], cold_s)
    return result


def _non_negative_fit(terms: FloatArray, weight: FloatArray) -> tuple[float, float, float]:
    """Weighted least squares of ``terms @ x = 1`` with x >= 0: the best of all subsets of terms."""
    root = np.sqrt(weight)
    scale = np.linalg.norm(terms * root[:, None], axis=0)
    scaled = terms * root[:, None] / scale
    best, best_error = np.zeros(3), np.inf
    for count in (1, 2, 3):
        for chosen in combinations(range(3), count):
            found, *_ = np.linalg.lstsq(scaled[:, chosen], root, rcond=None)
            error = float(np.sum((scaled[:, chosen] @ found - root) ** 2))
            if (found >= 0.0).all() and error < best_error:
                best, best_error = np.zeros(3), error
                best[list(chosen)] = found
    launch, per_sequence, per_token = (best / scale).tolist()
    return launch, per_sequence, per_token


def _weighted_quantiles(values: FloatArray, weight: FloatArray, levels: tuple[float, ...]) -> list[float]:
    order = np.argsort(values)
    share: npt.NDArray[np.float64] = np.cumsum(weight[order]) / weight.sum()
    last = len(order) - 1
    return [float(values[order[min(last, int(np.searchsorted(share, level)))]]) for level in levels]
