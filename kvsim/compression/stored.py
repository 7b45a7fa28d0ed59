"""How many bytes a sequence's KV takes, exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvsim.compression.base import KvEncoding, LayerView
from kvsim.compression.encoding.native import Native
from kvsim.compression.selection.base import TokenSelection, acts_on
from kvsim.compression.strategy import Compression
from kvsim.specs.base import DTYPE_BITS, Dtype
from kvsim.specs.model import LayerGroup

if TYPE_CHECKING:
    from kvsim.specs.model import ModelSpec


def stored_bytes(
    compression: Compression,
    model: ModelSpec,
    prompt_tokens: int,
    generated_tokens: int,
    engine_skip_layers: Sequence[int | str] = (),
) -> float:
    """Resident KV bytes of one sequence over all layers, metadata included, before pages round them up.

    Sliding and chunked layers hold at most their window. Linear-attention state and the keys of a model's own
    sparse-attention indexer are not KV and not counted.
    """
    total_bytes = 0.0
    for own in model.kv_groups:
        group = compression.selection.trained_group(own)
        for index in group.layers:
            layer = LayerView(index, model.num_layers, group)
            encoding = compression.encoding_for_layer(index, model, engine_skip_layers)
            if acts_on(group):
                selection = compression.selection.at_layer(layer)
                held = _held_tokens(selection, layer, prompt_tokens, generated_tokens)
                beside = selection.held_bytes_per_token(layer)
                total_bytes += beside * sum(share * tokens for share, tokens in held)
                total_bytes += _scan_bytes(selection, layer, model, prompt_tokens, generated_tokens)
            else:
                context_tokens = prompt_tokens + generated_tokens
                tokens = min(context_tokens, group.window_tokens or context_tokens)
                held = [(1.0, tokens)]
                # An indexer that the strategy brings is its metadata; a model's own is no KV.
                total_bytes += tokens * (group.index_key_bytes - own.index_key_bytes)
            total_bytes += sum(
                share * _layer_bytes(encoding, group, model.dtype, tokens, generated_tokens) for share, tokens in held
            )
            total_bytes += encoding.fixed_bytes_per_sequence(group, model.dtype) if any(n for _, n in held) else 0.0
    return total_bytes


def _layer_bytes(encoding: KvEncoding, group: LayerGroup, native: Dtype, tokens: int, generated_tokens: int) -> float:
    """Bytes of ``tokens`` of which the last may be generated ones."""
    later = min(tokens, generated_tokens) if encoding.stores_prompt_once else 0
    later_bytes = later * Native().bytes_per_token(group, native).total_bytes
    return encoded_bytes(encoding, group, native, tokens - later) + later_bytes


def _held_tokens(
    selection: TokenSelection, layer: LayerView, prompt_tokens: int, generated_tokens: int
) -> list[tuple[float, int]]:
    """(share of KV heads, tokens that each of them holds)."""
    return [(heads.share, heads.resident(generated_tokens)) for heads in selection.head_curves(prompt_tokens, layer)]


def encoded_bytes(encoding: KvEncoding, group: LayerGroup, native: Dtype, tokens: int) -> float:
    """Bytes of ``tokens`` kept tokens in one layer: some native where the format holds a residual window or sinks."""
    newest = min(tokens, encoding.residual_tokens)
    sinks = min(tokens - newest, encoding.sink_tokens)
    native_bytes = encoding.residual_share * Native().bytes_per_token(group, native).total_bytes
    coded_bytes = (tokens - newest - sinks) * encoding.bytes_per_token(group, native).total_bytes
    return newest * native_bytes + sinks * encoding.sink_bytes_per_token(group, native) + coded_bytes


def _scan_bytes(
    selection: TokenSelection, layer: LayerView, model: ModelSpec, prompt_tokens: int, generated_tokens: int
) -> float:
    scanned = selection.scanned_tokens(prompt_tokens, layer)
    if scanned is None:
        return 0.0
    return scanned(generated_tokens) * selection.scan_bytes_per_token(layer.group, DTYPE_BITS[model.dtype] / 8)
