"""What coding KV for a tier costs: coders by published figures, KV encodings by the work that they do."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from kvsim.cost.estimator import smooth_maximum, streaming_seconds
from kvsim.cost.priors import Prior, PriorTable
from kvsim.cost.rates import Rates
from kvsim.data_files import data_dir
from kvsim.deployment import LayerClass
from kvsim.documents import load_yaml, validate
from kvsim.ops import Work
from kvsim.specs.base import Spec
from kvsim.specs.model import ModelSpec

VECTOR_FLOPS_PER_ELEMENT = 4.0
"""Of quantising or restoring one element: scale, round, shift and pack (as `kvsim.ops.quantize`)."""


class CoderPriors(Spec):
    """Published figures of one coder; rates are bytes of the 16-bit cache per second of one device."""

    lossy: bool
    ratio: Prior
    encode_bytes_per_s: PriorTable
    decode_bytes_per_s: PriorTable


class KvCoders(Spec):
    """All coders by name."""

    schema_version: int
    name: str
    coders: dict[str, CoderPriors]


@lru_cache(maxsize=1)
def load_coders() -> KvCoders:
    """Read ``calibration/priors/kv_coders.yaml``."""
    path = data_dir("calibration/priors") / "kv_coders.yaml"
    return validate(KvCoders, load_yaml(path), path.name)


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
    """What a format that is not the model's own does to an element beside moving it."""
    total = 0.0
    for one in classes:
        if one.encoding.is_native:
            continue
        calls = one.encoding.append_ops(one.group, model)
        flops = sum(float(call.count * call.work.flops) for call in calls) / ranks
        vector = VECTOR_FLOPS_PER_ELEMENT * one.group.kv_elements_per_token * one.rank_share
        total += _layers(one) * streaming_seconds(Work(flops=flops, vector_flops=vector), rates)
    return total


def _layers(layer_class: LayerClass) -> int:
    return sum(layers for _, layers in layer_class.bands)
