"""A scenario with every name replaced by what it stands for, checked for pairs that cannot go together."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvsim.compression import Compression
from kvsim.compression.base import HeadCurves, KvEncoding, LayerView, growing
from kvsim.compression.encoding.native import Native
from kvsim.compression.selection.base import TokenSelection
from kvsim.parallelism import Parallelism
from kvsim.specs.device import DeviceSpec
from kvsim.specs.engine import EngineSpec, SamplingSpec
from kvsim.specs.model import LayerGroup, LayerKind, ModelSpec
from kvsim.specs.price import Price

if TYPE_CHECKING:
    from kvsim.adaptive import Adaptive
    from kvsim.calibration.engine_fits import EngineFit
    from kvsim.calibration.sets import CalibrationSet
    from kvsim.cost.priors import Priors


@dataclass(frozen=True)
class LayerClass:
    """Layers that share an attention shape, an encoding and a selection."""

    group: LayerGroup
    encoding: KvEncoding
    bands: tuple[tuple[LayerView, int], ...]
    """One layer of each band that the selection treats alike, and how many layers the band has."""
    selection: TokenSelection | None
    """The token selection, on full-attention layers; None where the layer's own kind decides what it reads."""
    prefill_cap: int | None
    """Most tokens that one layer holds while a prompt is processed, by its kind and the engine's allocator; None is
    unbounded."""
    decode_cap: int | None
    """The same once the sequence decodes."""
    kv_heads_per_rank: int

    @property
    def rank_share(self) -> float:
        """KV of one tensor-parallel rank as a share of the whole layer's."""
        if self.encoding.is_replicated:
            return 1.0
        return self.kv_heads_per_rank / self.group.num_kv_heads

    @property
    def prefill_encoding(self) -> KvEncoding:
        """How tokens are stored while the prompt is processed: native where the method waits for its end."""
        return Native() if self.encoding.stores_prompt_once else self.encoding

    @property
    def has_pages_per_head(self) -> bool:
        """Whether each KV head has pages of its own, because heads keep different numbers of tokens."""
        return self.selection is not None and self.selection.granularity == "ragged" and self.selection.evicts

    def head_curves(self, prompt_tokens: int, view: LayerView) -> tuple[HeadCurves, ...]:
        """Tokens held, and read by a decode step, over generated tokens, for each kind of KV head."""
        if self.selection is not None:
            return self.selection.head_curves(prompt_tokens, view)
        resident = growing(prompt_tokens, self.decode_cap)
        return (HeadCurves(1.0, resident, growing(prompt_tokens, _attention_cap(self.group))),)

    def prefill_resident_tokens(self, processed_tokens: int, view: LayerView) -> int:
        """Tokens held once ``processed_tokens`` of the prompt are in."""
        if self.selection is not None:
            return self.selection.prefill_resident_tokens(processed_tokens, view)
        return processed_tokens if self.prefill_cap is None else min(processed_tokens, self.prefill_cap)


def layer_bands(views: tuple[LayerView, ...], selection: TokenSelection | None) -> tuple[tuple[LayerView, int], ...]:
    """Group layers that a selection treats alike: (first layer of the band, layers in it)."""
    bands = [selection.layer_band(view) if selection is not None else 0 for view in views]
    sizes = Counter(bands)
    return tuple((views[bands.index(band)], size) for band, size in sizes.items())


def _attention_cap(group: LayerGroup) -> int | None:
    """Most tokens one step can read: the window, or an indexer's top-k.

    Chunked attention reads between one token and a whole chunk; the whole chunk is used, an upper bound.
    """
    if group.kind is LayerKind.INDEXED:
        return group.index_topk
    return group.window_tokens


@dataclass(frozen=True)
class Deployment:
    """Everything the cost model and the simulator need; no names left to look up."""

    model: ModelSpec
    device: DeviceSpec
    engine: EngineSpec
    compression: Compression
    parallelism: Parallelism
    """How the devices of one replica share the model."""
    replicas: int
    layer_classes: tuple[LayerClass, ...]
    state_bytes_per_sequence: int
    """Per tensor-parallel rank, over all layers: linear-attention state."""
    priors: Priors
    price: Price | None
    prefix_caching: bool
    notes: tuple[str, ...]
    sampling: SamplingSpec
    """The scenario's sampling parameters, and the model's where it states none."""
    calibration: CalibrationSet | None = None
    """Fitted kernels; None where the scenario wants none or its set has none for the device."""
    tier_classes: tuple[tuple[LayerClass, ...] | None, ...] = ()
    """Per tier that stores a KV encoding of its own: the layers as it stores them; None for any other tier."""
    engine_fit: EngineFit | None = None
    """What engines reach on a device without fitted kernels; None where there is no such fit, or none is wanted."""
    draft: Deployment | None = None
    """The draft model of speculative decoding on the same ranks, with its own KV cache in its own dtype."""
    adaptive: Adaptive | None = None
    """What chooses among ``levels`` during the run; None where one compression serves every request."""
    levels: tuple[Deployment, ...] = ()
    """The deployment at each level of ``adaptive``, most precise first; the rest of this value is that of the first."""

    @property
    def variants(self) -> tuple[Deployment, ...]:
        """Every deployment of one compression that this one may serve requests with."""
        return self.levels or (self,)

    @property
    def tensor_parallel_size(self) -> int:
        """Ranks that share each layer."""
        return self.parallelism.tensor

    @property
    def num_devices(self) -> int:
        """Devices of all replicas."""
        return self.parallelism.num_devices * self.replicas

    @property
    def lanes(self) -> int:
        """Parts that a replica's running sequences are dealt to."""
        return self.parallelism.lanes

    @property
    def max_running(self) -> int:
        """Most sequences that a replica runs: ``max_num_seqs`` of each data parallel rank."""
        return self.engine.max_num_seqs * self.parallelism.data

    @property
    def step_tokens(self) -> int:
        """Token budget of one turn: ``max_num_batched_tokens`` of each lane."""
        return self.engine.max_num_batched_tokens * self.lanes
