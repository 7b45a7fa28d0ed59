"""What sequences of several KV formats cost in one batch, beyond the sum of what each format's costs alone.

A step calls decode attention once per format present and layer, and so it does what encodes the new token: a kernel
reads one format. Prices of one format alone include those launches, so formats that two levels share in a layer are
counted twice in their sum; that part is taken off here. Nothing is said of kernels that would run side by side.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from kvsim.compression.base import LayerView
from kvsim.cost.estimator import smooth_maximum, streaming_seconds
from kvsim.cost.projection import attention_kernels
from kvsim.cost.rates import Rates
from kvsim.cost.step import NO_ATTENTION, StepModel, group_layers
from kvsim.cost.tables import StepTables
from kvsim.deployment import Deployment, LayerClass
from kvsim.ops import OpCall
from kvsim.specs.model import LayerKind
from kvsim.units import seconds_to_ticks


@dataclass(frozen=True)
class LayerAt:
    """One layer under one level: its class, and what a batch launches for it whatever its size, in seconds."""

    layer_class: LayerClass
    attention_s: float
    append_s: float
    format_s: float
    """Work per step that the format needs beside attention (rotate the query)."""
    selection_s: float


@dataclass(frozen=True)
class MixedPrices:
    """Ticks by which a batch of several levels costs less than its levels alone; the index is a bit mask of levels."""

    shared_attention: list[int]
    shared_compression: list[int]
    append_launch: list[int]
    """What encoding launches for prompts of these levels."""


def mixed_prices(steps: Sequence[StepModel], tables: Sequence[StepTables]) -> MixedPrices:
    """Price every set of levels."""
    stacks = Counter(zip(*(_layers(step) for step in steps), strict=True))
    attention, compression, append = [0], [0], [0]
    for mask in range(1, 1 << len(steps)):
        present = [level for level in range(len(steps)) if mask >> level & 1]
        attention_s = _other_layers_shared(steps, present)
        append_s = format_s = selection_s = 0.0
        for stack, layers in stacks.items():
            ours = [stack[level] for level in present]
            attention_s += layers * _repeated((one.layer_class.encoding, one.attention_s) for one in ours)
            append_s += layers * _repeated((one.layer_class.encoding, one.append_s) for one in ours)
            format_s += layers * _repeated((one.layer_class.encoding, one.format_s) for one in ours)
            selection_s += layers * _repeated((one.layer_class.selection, one.selection_s) for one in ours)
        attention.append(seconds_to_ticks(attention_s))
        compression.append(seconds_to_ticks(append_s + format_s + selection_s))
        append.append(sum(tables[level].append_launch for level in present) - seconds_to_ticks(append_s))
    return MixedPrices(attention, compression, append)


def _repeated(launches: Iterable[tuple[Hashable, float]]) -> float:
    """Seconds beyond one launch per kind, the longest of its launches."""
    total, longest = 0.0, defaultdict[Hashable, float](float)
    for kind, seconds in launches:
        total += seconds
        longest[kind] = max(longest[kind], seconds)
    return total - sum(longest.values())


def _other_layers_shared(steps: Sequence[StepModel], present: Sequence[int]) -> float:
    """Layers that attend to another layer's cache: one launch per encoding present."""
    model = steps[0].deployment.model
    attending = sum(group.num_layers for group in model.groups if group.kind not in NO_ATTENTION)
    others = attending - sum(group_layers(layer_class) for layer_class in steps[0].deployment.layer_classes)
    encodings = {steps[level].deployment.compression.stored for level in present}
    return others * steps[0].rates.attention_launch_s * (len(present) - len(encodings))


def _layers(step: StepModel) -> Iterator[LayerAt]:
    """Every layer with a cache, in an order that is the same at all levels."""
    deployment, edge = step.deployment, step.rates.edge
    model = deployment.model
    floors = dict(
        zip(
            deployment.layer_classes,
            (kernels.floor.launch_s(edge) if kernels.floor else None for kernels in attention_kernels(deployment)),
            strict=True,
        )
    )
    skipped = deployment.engine.kv_cache_dtype_skip_layers
    for group in model.kv_groups:
        for index in group.layers:
            encoding = deployment.compression.encoding_for_layer(index, model, skipped)
            view = LayerView(index, model.num_layers, group)
            selection = deployment.compression.selection.at_layer(view) if group.kind is LayerKind.FULL else None
            found = next(c for c in floors if c.group is group and c.encoding == encoding and c.selection == selection)
            floor = floors[found]
            selecting = found.selection.decode_ops(view, model) if found.selection is not None else ()
            yield LayerAt(
                layer_class=found,
                attention_s=step.rates.attention_launch_s if floor is None else floor,
                append_s=_launch_seconds(encoding.append_ops(group, model), step.rates),
                format_s=_launch_seconds(encoding.decode_ops(group, model), step.rates),
                selection_s=_launch_seconds(selecting, step.rates),
            )


def _launch_seconds(ops: Iterable[OpCall], rates: Rates) -> float:
    return sum(call.count * call.work.launches for call in ops) * rates.elementwise_launch_s


# --- encoding a cache again -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reencoding:
    """Encoding a sequence's cache at another level: one fused kernel per layer whose format changes.

    A token costs the smooth maximum of its bytes (old read, new written) and its arithmetic (old unpacked, new
    encoded). It is done in place, block by block.
    """

    launch_ticks: int
    """Once for all sequences that are encoded again together."""
    per_token_s: tuple[tuple[int | None, float], ...]
    """(most tokens held or None, seconds per token) of layers alike."""

    def ticks(self, tokens: int) -> int:
        """One sequence of ``tokens`` cached tokens."""
        return seconds_to_ticks(
            sum(seconds * (tokens if cap is None else min(tokens, cap)) for cap, seconds in self.per_token_s)
        )


def reencoding(source: StepModel, target: StepModel) -> Reencoding:
    """Price going from one level's format to another's."""
    per_token: defaultdict[int | None, float] = defaultdict(float)
    launched = 0
    for old, new in zip(_layers(source), _layers(target), strict=True):
        if old.layer_class.encoding != new.layer_class.encoding:
            launched += 1
            per_token[new.layer_class.decode_cap] += _token_seconds(old.layer_class, new.layer_class, target)
    launch_s = launched * target.rates.elementwise_launch_s
    return Reencoding(seconds_to_ticks(launch_s), tuple(per_token.items()))


def _token_seconds(old: LayerClass, new: LayerClass, step: StepModel) -> float:
    rates, deployment = step.rates, step.deployment
    unpack_s, family = 0.0, old.encoding.unpack_family
    if family is not None:
        elements = old.encoding.stored_elements_per_token(old.group) * old.rank_share
        unpack_s = elements / rates.unpack_elements_per_s(family)
    moved = (_stored_bytes(old, deployment) + _stored_bytes(new, deployment)) * new.rank_share
    # Its bytes are in ``moved`` already; only the arithmetic of encoding remains.
    computed = [replace(call.work, bytes_read=0.0, bytes_written=0.0) for call in _encode(new, deployment)]
    encode_s = sum(streaming_seconds(work, rates) for work in computed) / deployment.tensor_parallel_size
    return smooth_maximum(moved / rates.stream_bytes_per_s, unpack_s + encode_s)


def _encode(layer_class: LayerClass, deployment: Deployment) -> Iterable[OpCall]:
    return layer_class.encoding.append_ops(layer_class.group, deployment.model)


def _stored_bytes(layer_class: LayerClass, deployment: Deployment) -> float:
    return layer_class.encoding.bytes_per_token(layer_class.group, deployment.model.dtype).total_bytes
