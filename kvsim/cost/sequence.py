"""What one sequence adds to a decode step, and to the pool, over its life."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from kvsim.compression.base import LayerView, TokenCurve, growing
from kvsim.cost.estimator import attention_seconds_per_token, smooth_maximum, streaming_seconds
from kvsim.cost.layer_bytes import (
    draft_bytes_per_token,
    head_length_bytes,
    index_key_bytes,
    layer_bytes_per_token,
    native_bytes_per_token,
    page_table_bytes,
    residual_bytes,
    scan_bytes,
)
from kvsim.cost.profile import (
    Growth,
    Segment,
    SequenceProfile,
    after_cuts,
    clip,
    merge_priced,
    split_at_start,
    whole_ticks,
)
from kvsim.cost.projection import ClassKernels, attention_kernels
from kvsim.cost.rates import Rates
from kvsim.deployment import Deployment, LayerClass
from kvsim.ops import OpCall
from kvsim.specs.base import DTYPE_BITS
from kvsim.specs.model import LayerKind
from kvsim.units import seconds_to_ticks


@dataclass(frozen=True, slots=True)
class _TokenPrice:
    """Femtoseconds per token and step of one layer, whole and due to unpacking."""

    whole: int
    unpack: int


class SequenceModel:
    """Prices sequences of one deployment on one rank."""

    def __init__(self, deployment: Deployment, rates: Rates) -> None:
        self._deployment = deployment
        self._rates = rates
        self._profiles: dict[int, SequenceProfile] = {}
        parallel, layers = deployment.parallelism, deployment.model.num_layers
        self._stretch = parallel.turn_stretch(layers)
        self._context_share = self._stretch * parallel.context_share
        self._stage_share = parallel.stage_share(layers)

    @cached_property
    def is_affine(self) -> bool:
        """Whether every token costs the same for ever, so that a sequence needs no breakpoints."""
        return all(
            layer_class.selection is not None
            and layer_class.selection.kind == "keep_all"
            and layer_class.encoding.native_tokens == 0
            and not layer_class.encoding.stores_prompt_once
            for layer_class in self._deployment.layer_classes
        )

    @cached_property
    def _affine_price(self) -> tuple[int, int]:
        """Femtoseconds per token and step over all layers: (whole, due to unpacking)."""
        whole = unpack = 0
        for layer_class, (encoded, _) in zip(self._deployment.layer_classes, self._prices, strict=True):
            layers = sum(size for _, size in layer_class.bands)
            whole += layers * encoded.whole
            unpack += layers * encoded.unpack
        return whole, unpack

    @property
    def token_ticks(self) -> int:
        """Ticks per attended token and step where every token costs the same."""
        return max(1, whole_ticks(self._affine_price[0]))

    @property
    def unpack_share(self) -> float:
        """Part of ``token_ticks`` that is due to the compression."""
        whole, unpack = self._affine_price
        return unpack / whole if whole else 0.0

    def profile(self, prompt_tokens: int) -> SequenceProfile:
        """The life of a sequence with ``prompt_tokens`` processed before its first decode step."""
        found = self._profiles.get(prompt_tokens)
        if found is None:
            found = self._profiles[prompt_tokens] = self._build(prompt_tokens)
        return found

    def _build(self, prompt_tokens: int) -> SequenceProfile:
        priced: defaultdict[TokenCurve, list[int]] = defaultdict(lambda: [0, 0])
        growths: defaultdict[TokenCurve, float] = defaultdict(float)
        fixed_bytes = float(self._deployment.state_bytes_per_sequence)
        compress_s = 0.0
        for layer_class, prices in zip(self._deployment.layer_classes, self._prices, strict=True):
            for view, layers in layer_class.bands:
                token_bytes = layer_bytes_per_token(layer_class, view, self._deployment.model)
                token_bytes += page_table_bytes(layer_class, self._deployment.engine.block_size)
                for heads in layer_class.head_curves(prompt_tokens, view):
                    self._add_attended(priced, heads.attended, layer_class, prices, heads.share * layers)
                    self._add_resident(growths, heads.resident, layer_class, heads.share * layers, token_bytes)
                fixed_bytes += layers * residual_bytes(layer_class, view, self._deployment.model)
                fixed_bytes += layers * head_length_bytes(layer_class)
                self._add_scanned(priced, prompt_tokens, layer_class, view, layers)
                self._add_cuts(priced, prompt_tokens, layer_class, view, layers)
                compress_s += layers * self._compress_seconds(prompt_tokens, layer_class, view)
        growths[growing(prompt_tokens)] += draft_bytes_per_token(self._deployment)
        affine = (self._affine_segments(prompt_tokens), None) if self.is_affine else None
        segments, repeat = affine or merge_priced(priced)
        return SequenceProfile(
            segments=segments,
            growths=self._blocks(growths),
            fixed_bytes=math.ceil(fixed_bytes * self._stage_share),
            compress_ticks=seconds_to_ticks(compress_s * self._stretch),
            repeat=repeat,
        )

    def _affine_segments(self, prompt_tokens: int) -> tuple[Segment, ...]:
        """The one segment of a cache where every token costs the same, rounded as the simulator rounds it."""
        price = self.token_ticks
        ticks = price * (prompt_tokens + 1)
        return (Segment(0, ticks, price, round(ticks * self.unpack_share), round(price * self.unpack_share)),)

    def _add_resident(
        self,
        growths: defaultdict[TokenCurve, float],
        resident: TokenCurve,
        layer_class: LayerClass,
        layers: float,
        token_bytes: float,
    ) -> None:
        if layer_class.encoding.stores_prompt_once:
            resident, since = split_at_start(resident)
            growths[since] += layers * native_bytes_per_token(layer_class, self._deployment.model)
        growths[resident] += layers * token_bytes

    def _add_attended(
        self,
        priced: defaultdict[TokenCurve, list[int]],
        attended: TokenCurve,
        layer_class: LayerClass,
        prices: tuple[_TokenPrice, _TokenPrice],
        layers: float,
    ) -> None:
        encoded, native = prices
        if layer_class.encoding.stores_prompt_once:
            attended, since = split_at_start(attended)
            _add(priced, since, layers * native.whole, layers * native.unpack)
        _add(priced, attended, layers * encoded.whole, layers * encoded.unpack)
        window = layer_class.encoding.native_tokens
        if window:
            # So many tokens are native: swap their price.
            recent = clip(attended, window)
            _add(priced, recent, layers * (native.whole - encoded.whole), layers * (native.unpack - encoded.unpack))

    def _add_scanned(
        self,
        priced: defaultdict[TokenCurve, list[int]],
        prompt_tokens: int,
        layer_class: LayerClass,
        view: LayerView,
        layers: int,
    ) -> None:
        if layer_class.group.kind is LayerKind.INDEXED:
            _add(priced, growing(prompt_tokens), layers * self._index_price(layer_class), 0)
        if layer_class.selection is None:
            return
        scanned = layer_class.selection.scanned_tokens(prompt_tokens, view)
        if scanned is not None:
            scan = layers * self._scan_price(layer_class, view)
            _add(priced, scanned, scan, scan)

    def _add_cuts(
        self,
        priced: defaultdict[TokenCurve, list[int]],
        prompt_tokens: int,
        layer_class: LayerClass,
        view: LayerView,
        layers: int,
    ) -> None:
        """Charge each cut of the cache to the step that it ends. Every sequence launches its own."""
        selection = layer_class.selection
        cuts = None if selection is None else selection.decode_cuts(prompt_tokens, view)
        if selection is None or cuts is None:
            return
        ops = selection.cut_ops(prompt_tokens, view, self._deployment.model)
        seconds = ops_seconds(ops, self._deployment.tensor_parallel_size, self._rates)
        price = layers * _femto(seconds * self._stretch)
        _add(priced, cuts, price, price)

    def _compress_seconds(self, prompt_tokens: int, layer_class: LayerClass, view: LayerView) -> float:
        model = self._deployment.model
        ops = list(layer_class.encoding.prefill_ops(prompt_tokens, layer_class.group, model))
        if layer_class.selection is not None:
            ops += layer_class.selection.prefill_ops(prompt_tokens, view, model)
        return ops_seconds(ops, self._deployment.tensor_parallel_size, self._rates)

    def _blocks(self, growths: dict[TokenCurve, float]) -> tuple[Growth, ...]:
        block_size = self._deployment.engine.block_size
        return tuple(
            Growth(after_cuts(curve), math.ceil(bytes_per_token * self._stage_share * block_size))
            for curve, bytes_per_token in growths.items()
            if bytes_per_token > 0
        )

    @cached_property
    def _prices(self) -> tuple[tuple[_TokenPrice, _TokenPrice], ...]:
        """(encoded, native) of each layer class; without a native window only the first is ever used."""
        prices = []
        for layer_class, kernels in zip(self.classes, attention_kernels(self._deployment), strict=True):
            encoded = self._token_price(layer_class, kernels, native=False)
            encoding = layer_class.encoding
            has_window = encoding.native_tokens > 0 or encoding.stores_prompt_once
            prices.append((encoded, self._token_price(layer_class, kernels, native=True) if has_window else encoded))
        return tuple(prices)

    @property
    def classes(self) -> tuple[LayerClass, ...]:
        """Layer classes of the deployment."""
        return self._deployment.layer_classes

    def _token_price(self, layer_class: LayerClass, kernels: ClassKernels, *, native: bool) -> _TokenPrice:
        edge = self._rates.edge
        if kernels.native_decode is not None and (native or layer_class.encoding.kind == "native"):
            whole_s, unpack_s = kernels.native_decode.per_token_s(edge), 0.0
        else:
            whole_s, unpack_s = self._estimated_seconds(layer_class, kernels, native=native)
            if kernels.decode is not None and not native:
                # What a fitted kernel takes beyond moving its bytes is unpacking.
                moved_s, whole_s = whole_s - unpack_s, kernels.decode.per_token_s(edge)
                unpack_s = max(0.0, whole_s - moved_s)
        tables = page_table_bytes(layer_class, self._deployment.engine.block_size)
        score_s = tables / self._rates.stream_bytes_per_s
        if layer_class.selection is not None:
            flops = layer_class.selection.decode_score_flops_per_token(layer_class.group, self._deployment.model)
            score_s += flops / self._deployment.tensor_parallel_size / self._rates.vector_flops_per_s
            work = layer_class.selection.decode_score_work(layer_class.group, self._deployment.model)
            if work is not None:
                score_s += streaming_seconds(work, self._rates) / self._deployment.tensor_parallel_size
        share = self._context_share
        return _TokenPrice(_femto((whole_s + score_s) * share), _femto((unpack_s + score_s) * share))

    def _estimated_seconds(
        self, layer_class: LayerClass, kernels: ClassKernels, *, native: bool
    ) -> tuple[float, float]:
        """Seconds of one attended token by the priors: (whole, due to unpacking).

        Bytes move at the rate that the fitted kernel for the model's own format reaches, where there is one.
        """
        group, model, encoding = layer_class.group, self._deployment.model, layer_class.encoding
        native_bytes = group.kv_elements_per_token * DTYPE_BITS[model.dtype] / 8
        stored = native_bytes if native else encoding.read_bytes_per_token(group, model.dtype)
        elements = group.kv_elements_per_token if native else encoding.stored_elements_per_token(group)
        heads = model.num_attention_heads / self._deployment.tensor_parallel_size
        value_dim = model.mla.kv_lora_rank if group.is_latent and model.mla else group.v_head_dim or group.k_head_dim
        extra = 0.0 if native else encoding.attention_flops_per_token(group, model)
        rates = self._rates
        if kernels.native_decode is not None:
            rates = replace(rates, stream_bytes_per_s=kernels.native_decode.stream_bytes_per_s(rates.edge))
        return attention_seconds_per_token(
            stored_bytes=stored * layer_class.rank_share,
            elements=elements * layer_class.rank_share,
            flops=2.0 * heads * (group.k_head_dim + value_dim),
            extra_flops=extra / self._deployment.tensor_parallel_size,
            family=None if native else encoding.unpack_family,
            group_size=heads / layer_class.kv_heads_per_rank,
            compute=model.dtype if native else encoding.attention_dtype(model, self._deployment.device),
            rates=rates,
        )

    def _scan_price(self, layer_class: LayerClass, view: LayerView) -> int:
        moved_s = scan_bytes(layer_class, view, self._deployment.model) / self._rates.stream_bytes_per_s
        if layer_class.selection is None:
            return _femto(moved_s * self._context_share)
        flops = layer_class.selection.scan_flops_per_token(layer_class.group, self._deployment.model)
        scored_s = flops / self._deployment.tensor_parallel_size / self._rates.vector_flops_per_s
        return _femto(smooth_maximum(moved_s, scored_s) * self._context_share)

    def _index_price(self, layer_class: LayerClass) -> int:
        return _femto(index_key_bytes(layer_class) / self._rates.stream_bytes_per_s * self._context_share)


def ops_seconds(ops: Iterable[OpCall], tensor_parallel_size: int, rates: Rates) -> float:
    """Time of a sequence of kernels on one rank: launches in full, work shared by the ranks."""
    return sum(
        call.count
        * (call.work.launches * rates.elementwise_launch_s + streaming_seconds(call.work, rates) / tensor_parallel_size)
        for call in ops
    )


def _femto(seconds: float) -> int:
    return round(seconds * 1e15)


def _add(priced: defaultdict[TokenCurve, list[int]], curve: TokenCurve, whole: float, unpack: float) -> None:
    entry = priced[curve]
    entry[0] += round(whole)
    entry[1] += round(unpack)
