"""What coding KV for a tier costs where the format itself tells it: by the work that the encoding does."""

from __future__ import annotations

from collections.abc import Iterable

from kvsim.cost.estimator import smooth_maximum, streaming_seconds
from kvsim.cost.rates import Rates
from kvsim.deployment import LayerClass
from kvsim.ops import Work
from kvsim.specs.model import ModelSpec

VECTOR_FLOPS_PER_ELEMENT = 4.0
"""Of quantising or restoring one element: scale, round, shift and pack (as `kvsim.ops.quantize`)."""


def recode_seconds_per_token(
    source: Iterable[LayerClass], target: Iterable[LayerClass], model: ModelSpec, ranks: int, rates: Rates
) -> tuple[float, float]:
    """Seconds of one token on one rank from one storage format to another, and the share of them that moves bytes.

    Reading and writing every byte once, unpacking the source, and the target's own work to encode a token, overlapped
    as in any streaming kernel. Going back is the same with the sides swapped; formats that rotate or project pay for
    turning back what turning costs.
    """
    source, target = tuple(source), tuple(target)
    moved_s = (_stored_bytes(source, model) + _stored_bytes(target, model)) / rates.stream_bytes_per_s
    whole_s = smooth_maximum(
        moved_s, _unpack_seconds(source, rates), _work_seconds(source, model, ranks, rates),
        _work_seconds(target, model, ranks, rates),
    )  # fmt: skip
    return whole_s, min(1.0, moved_s / whole_s) if whole_s else 0.0


def _stored_bytes(classes: tuple[LayerClass, ...], model: ModelSpec) -> float:
    return sum(
        _layers(one) * one.encoding.bytes_per_token(one.group, model.dtype).total_bytes * one.rank_share
        for one in classes
    )


def _unpack_seconds(classes: tuple[LayerClass, ...], rates: Rates) -> float:
    """Restoring every element once, at the rate at which attention unpacks the format."""
    return sum(
        _layers(one)
        * one.encoding.stored_elements_per_token(one.group)
        * one.rank_share
        / rates.unpack_elements_per_s(family)
        for one in classes
        if (family := one.encoding.unpack_family) is not None
    )


def _work_seconds(classes: tuple[LayerClass, ...], model: ModelSpec, ranks: int, rates: Rates) -> float:
    """What a format that is not the model's own does to an element beside moving it, entropy coding included."""
    total = 0.0
    for one in classes:
        if one.encoding.is_native:
            continue
        calls = tuple(one.encoding.append_ops(one.group, model))
        coded = [streaming_seconds(call.work, rates) * call.count for call in calls if call.work.unpack_family]
        total += _layers(one) * sum(coded) / ranks
        flops = sum(float(call.count * call.work.flops) for call in calls) / ranks
        vector = VECTOR_FLOPS_PER_ELEMENT * one.group.kv_elements_per_token * one.rank_share
        total += _layers(one) * streaming_seconds(Work(flops=flops, vector_flops=vector), rates)
    return total


def _layers(layer_class: LayerClass) -> int:
    return sum(layers for _, layers in layer_class.bands)
