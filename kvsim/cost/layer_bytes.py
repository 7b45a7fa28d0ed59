"""Bytes that tokens take in the KV cache, per layer and for who drafts, on one rank."""

from __future__ import annotations

from kvsim.compression.base import KvEncoding, LayerView
from kvsim.deployment import Deployment, LayerClass
from kvsim.specs.base import DTYPE_BITS
from kvsim.specs.model import ModelSpec

TABLE_ENTRY_BYTES = 4.0
"""int32, for a page and for a head's token count (kernels/decode_attention/ragged_heads)."""


def scan_bytes(layer_class: LayerClass, view: LayerView, model: ModelSpec) -> float:
    """Page metadata of one token in one layer on one rank; none where the selection does not scan the layer."""
    if layer_class.selection is None or layer_class.selection.scanned_tokens(1, view) is None:
        return 0.0
    element_bytes = DTYPE_BITS[model.dtype] / 8
    return layer_class.selection.scan_bytes_per_token(layer_class.group, element_bytes) * layer_class.rank_share


def layer_bytes_per_token(layer_class: LayerClass, view: LayerView, model: ModelSpec) -> float:
    """Bytes of one resident token in one layer on one rank: encoded KV, metadata of the selection, indexer key."""
    return _bytes_per_token(layer_class.encoding, layer_class, view, model)


def prefill_bytes_per_token(layer_class: LayerClass, view: LayerView, model: ModelSpec) -> float:
    """The same of a token of a prompt that is still being processed."""
    return _bytes_per_token(layer_class.prefill_encoding, layer_class, view, model)


def native_bytes_per_token(layer_class: LayerClass, model: ModelSpec) -> float:
    """Bytes of one token in the native dtype in one layer on one rank."""
    return layer_class.group.kv_elements_per_token * DTYPE_BITS[model.dtype] / 8 * layer_class.rank_share


def _bytes_per_token(encoding: KvEncoding, layer_class: LayerClass, view: LayerView, model: ModelSpec) -> float:
    stored = encoding.bytes_per_token(layer_class.group, model.dtype).total_bytes
    # What a later cut scores tokens by belongs to no head: every rank holds it.
    held = 0.0 if layer_class.selection is None else layer_class.selection.held_bytes_per_token(view)
    return stored * layer_class.rank_share + scan_bytes(layer_class, view, model) + held + index_key_bytes(layer_class)


def page_table_bytes(layer_class: LayerClass, block_size: int) -> float:
    """Block-table entries per token and layer on one rank, where each KV head has pages of its own; held and read.

    Tables of ordinary pages, one for all layers and heads, are the engine's bookkeeping and not counted.
    """
    if not layer_class.has_pages_per_head or layer_class.group.shares_kv:
        return 0.0
    return TABLE_ENTRY_BYTES * layer_class.kv_heads_per_rank / block_size


def head_length_bytes(layer_class: LayerClass) -> float:
    """Token counts per KV head of one layer and sequence on one rank, where heads have pages of their own."""
    if not layer_class.has_pages_per_head or layer_class.group.shares_kv:
        return 0.0
    return TABLE_ENTRY_BYTES * layer_class.kv_heads_per_rank


def draft_bytes_per_token(deployment: Deployment) -> float:
    """Bytes on one rank that a token takes in the KV cache of who drafts: a draft model's, or a head's one layer."""
    config = deployment.engine.speculative_config
    if config is None or not config.num_speculative_tokens or config.method == "ngram":
        return 0.0
    drafter = deployment.draft or deployment
    cached = [(c, view, layers) for c in drafter.layer_classes for view, layers in c.bands]
    whole = sum(layers * layer_bytes_per_token(c, view, drafter.model) for c, view, layers in cached)
    return whole if deployment.draft is not None else whole / max(1, sum(layers for _, _, layers in cached))


def draft_weight_bytes(deployment: Deployment) -> float:
    """Weights of who drafts on one rank: a draft model's, or one layer of the model's own."""
    config = deployment.engine.speculative_config
    if config is None or not config.num_speculative_tokens or config.method == "ngram":
        return 0.0
    if deployment.draft is not None:
        return deployment.draft.model.weight_bytes / deployment.tensor_parallel_size
    return deployment.model.layer_weight_bytes / deployment.tensor_parallel_size


def residual_bytes(layer_class: LayerClass, view: LayerView, model: ModelSpec) -> float:
    """Bytes beside the encoded tokens, one layer of one sequence on one rank: a native window, a basis, queries."""
    group, encoding = layer_class.group, layer_class.encoding
    window = encoding.residual_tokens * encoding.residual_share
    native = window * group.kv_elements_per_token * DTYPE_BITS[model.dtype] / 8
    native += encoding.sink_tokens * encoding.sink_bytes_per_token(group, model.dtype)
    if layer_class.selection is not None:
        native += layer_class.selection.buffer_bytes(view, model)
    return (native + encoding.fixed_bytes_per_sequence(group, model.dtype)) * layer_class.rank_share


def index_key_bytes(layer_class: LayerClass) -> float:
    """Indexer key of one token in one layer: fp8 values and one fp32 scale (vLLM's DSA cache), replicated."""
    dim = layer_class.group.index_head_dim
    return dim + 4.0 if dim else 0.0
