"""Encodings as points of the rate-distortion plane: bits really written, error really made."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, Literal

import numpy as np

from kvsim.compression import Compression
from kvsim.compression.selector import layer_view
from kvsim.errors import IncompatibleScenario
from kvsim.limit.covariance import CovarianceLimit
from kvsim.limit.rate_distortion import isotropic_bits
from kvsim.quality.store import FittedStrategy, fit_strategy, is_exempt, store_cache
from kvsim.specs.base import Spec
from kvsim.tensors import TENSORS, KvTensors, TensorName
from kvsim.tensors.statistics import head_energy

Applies = Literal["isotropic", "head covariance", "layer covariance", "none", "lossless"]
TOLERANCE_BITS: Final = 1e-9


class EncodingPoint(Spec):
    """One encoding on one set of caches, and how far it is from each limit."""

    strategy: str
    family: str
    bits_per_value: float
    """All that is stored over K and V values of the uncompressed cache: codes, metadata, residual windows, bases.

    Layers that a format exempts are left out, here and in the errors.
    """
    relative_mse: float
    """Error over energy, of every head's K and V by itself, then averaged by number of values."""
    key_relative_mse: float
    value_relative_mse: float | None
    """None where a cache has no values of its own (a shared latent)."""
    gap_isotropic_bits: float | None
    """Bits per value above 4^-R at this error, negative where it lies below; None for a lossless one."""
    gap_head_bits: float | None
    """Bits per value above reverse water-filling over each head's covariance (variances held out)."""
    gap_layer_bits: float | None
    """The same with all heads of a layer taken together."""
    applies: Applies
    """The loosest limit that holds it: what it must be judged by."""


def measure_point(
    compression: Compression,
    caches: Sequence[KvTensors],
    samples: Sequence[KvTensors],
    head_limit: CovarianceLimit,
    layer_limit: CovarianceLimit,
) -> EncodingPoint:
    """Store the caches and read them back.

    Raises
    ------
    IncompatibleScenario
        The strategy drops tokens, so that bits per value of those left say nothing.
    NotRunnable
        Its algorithm does not run on tensors.
    """
    if not compression.keeps_all_tokens:
        part = compression.encoding if compression.encoding.evicts else compression.selection
        msg = f"{compression.name}: {part.kind} drops or skips tokens; limits are about those stored"
        raise IncompatibleScenario(msg)
    return place(compression, fit_strategy(compression, samples), caches, head_limit, layer_limit)


def place(
    compression: Compression,
    strategy: FittedStrategy,
    caches: Sequence[KvTensors],
    head_limit: CovarianceLimit,
    layer_limit: CovarianceLimit,
) -> EncodingPoint:
    """Give the point of a strategy that is fitted already."""
    layers = _encoded_layers(compression, caches[0])
    if not layers:
        msg = f"{compression.name}: keeps all {caches[0].num_layers} layers of this cache native; take more layers"
        raise IncompatibleScenario(msg)
    head_limit, layer_limit = head_limit.within(layers), layer_limit.within(layers)
    stored = [store_cache(strategy, cache) for cache in caches]
    read_back = [one.kv for one in stored]
    bits = sum(one.bits[index] for one in stored for index in layers)
    bits /= sum(_num_values(cache, index) for cache in caches for index in layers)
    errors = {tensor: _relative_errors(caches, read_back, tensor, layers) for tensor in TENSORS}
    error = _weighted_mean([*errors["key"], *errors["value"]])
    gaps = [
        None if error == 0 else bits - limit(error)
        for limit in (isotropic_bits, head_limit.held_out.bits, layer_limit.held_out.bits)
    ]
    return EncodingPoint(
        strategy=compression.name,
        family=compression.family,
        bits_per_value=bits,
        relative_mse=error,
        key_relative_mse=_weighted_mean(errors["key"]),
        value_relative_mse=_weighted_mean(errors["value"]) if errors["value"] else None,
        gap_isotropic_bits=gaps[0],
        gap_head_bits=gaps[1],
        gap_layer_bits=gaps[2],
        applies=_applies(bits, error, head_limit, layer_limit),
    )


def _applies(bits: float, error: float, head: CovarianceLimit, layer: CovarianceLimit) -> Applies:
    if error == 0:
        return "lossless"
    enough = bits + TOLERANCE_BITS
    if enough >= isotropic_bits(error):
        return "isotropic"
    # The lower estimate decides: what lies between both may be above or below the covariance that nobody knows.
    if enough >= head.plug_in.bits(error):
        return "head covariance"
    return "layer covariance" if enough >= layer.plug_in.bits(error) else "none"


def _encoded_layers(compression: Compression, cache: KvTensors) -> frozenset[int]:
    """Layers that the format does not exempt: what it keeps native says nothing of the format."""
    return frozenset(index for index in range(cache.num_layers) if not is_exempt(compression, layer_view(cache, index)))


def _num_values(cache: KvTensors, layer: int) -> int:
    return cache.layers[layer].keys.size + cache.layers[layer].values.size


def _relative_errors(
    before: Sequence[KvTensors], after: Sequence[KvTensors], tensor: TensorName, layers: Iterable[int]
) -> list[tuple[float, int]]:
    """(error over energy, values per token) of every head, tokens of all caches together; none without channels."""
    found: list[tuple[float, int]] = []
    for index in layers:
        pairs = [
            (one.layers[index].tensor(tensor), two.layers[index].tensor(tensor))
            for one, two in zip(before, after, strict=True)
        ]
        width = pairs[0][0].shape[2]
        if not width:
            continue
        energy = sum(head_energy(old) for old, _ in pairs)
        error = sum(head_energy(new.astype(np.float64) - old) for old, new in pairs)
        ratios = np.divide(error, energy, out=np.zeros_like(error), where=energy > 0)
        found += [(float(ratio), width) for ratio in ratios]
    return found


def _weighted_mean(parts: Sequence[tuple[float, int]]) -> float:
    return sum(value * weight for value, weight in parts) / sum(weight for _, weight in parts)
