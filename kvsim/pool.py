"""The KV pool in blocks: what a block costs, what a prompt holds while it is processed, how long a sequence may be."""

from __future__ import annotations

import math
from collections import defaultdict

from kvsim.allocator import padded_layer_shares, pool_bytes_per_token
from kvsim.compression.base import LayerView
from kvsim.cost.layer_bytes import (
    draft_bytes_per_token,
    layer_bytes_per_token,
    prefill_bytes_per_token,
    residual_bytes,
)
from kvsim.deployment import Deployment, LayerClass
from kvsim.specs.model import LayerKind, ModelSpec

_PROBE_TOKENS = 2**40
"""A length no prompt reaches: whatever a layer still holds of it is its cap."""


def prefill_growths(deployment: Deployment) -> tuple[tuple[tuple[int | None, int], ...], int]:
    """((most tokens held or None, bytes of a block), ...) while a prompt is processed, and fixed bytes per sequence.

    Layers with the same cap share one block table entry. Bytes are those of one rank of the largest stage.
    """
    per_token: defaultdict[int | None, float] = defaultdict(float)
    padding = _page_padding(deployment)
    fixed = deployment.state_bytes_per_sequence * padding.get((LayerKind.LINEAR, None), 1.0)
    for layer_class in deployment.layer_classes:
        share = padding.get((layer_class.group.kind, layer_class.group.window_tokens), 1.0)
        for view, layers in layer_class.bands:
            cap = _prefill_cap(layer_class, view)
            per_token[cap] += share * layers * prefill_bytes_per_token(layer_class, view, deployment.model)
            if not layer_class.encoding.stores_prompt_once:
                fixed += layers * residual_bytes(layer_class, view, deployment.model)
            fixed += layers * _scratch_bytes(layer_class, view, deployment.model)
    per_token[None] += draft_bytes_per_token(deployment)
    block_size = deployment.engine.block_size
    share = deployment.parallelism.stage_share(deployment.model.num_layers)
    growths = tuple(
        (cap, math.ceil(size_bytes * share * block_size))
        for cap, size_bytes in sorted(per_token.items(), key=lambda item: (item[0] is not None, item[0] or 0))
        if size_bytes > 0
    )
    return growths, math.ceil(fixed * share)


def _scratch_bytes(layer_class: LayerClass, view: LayerView, model: ModelSpec) -> float:
    """Bytes of tokens that a selection holds beside the prompt's while it scores them, in one layer on one rank."""
    if layer_class.selection is None:
        return 0.0
    tokens = layer_class.selection.prefill_scratch_tokens(view)
    return tokens * layer_bytes_per_token(layer_class, view, model) if tokens else 0.0


def _page_padding(deployment: Deployment) -> dict[tuple[LayerKind, int | None], float]:
    """Layers paid for each layer, by kind and window: vLLM allocates hybrid models in groups of equal count."""
    if deployment.engine.kind != "vllm":
        return {}
    return padded_layer_shares(deployment.model, tensor_parallel_size=deployment.tensor_parallel_size)


def logged_tokens(deployment: Deployment, pool_bytes: float) -> int:
    """Tokens that vLLM logs as ``GPU KV cache size``: blocks over the number of layer groups.

    Of a model with one kind of layer these are the tokens that fit. Of a hybrid one they are those of a sequence that
    keeps every layer whole, so more fit than the log says.
    """
    block_size = deployment.engine.block_size
    size = block_bytes(deployment)
    if _page_padding(deployment):
        size = block_size * pool_bytes_per_token(
            deployment.model,
            deployment.engine.kind,
            element_bytes=_stored_element_bytes(deployment),
            tensor_parallel_size=deployment.tensor_parallel_size,
        )
    return int(pool_bytes // size) * block_size


def _stored_element_bytes(deployment: Deployment) -> float:
    """Bytes of one stored element, scales included, in the layer that stores most."""
    return max(
        one.encoding.bytes_per_token(one.group, deployment.model.dtype).total_bytes / one.group.kv_elements_per_token
        for one in deployment.layer_classes
    )


def _prefill_cap(layer_class: LayerClass, view: LayerView) -> int | None:
    held = layer_class.prefill_resident_tokens(_PROBE_TOKENS, view)
    return None if held == _PROBE_TOKENS else held


def block_bytes(deployment: Deployment) -> int:
    """Bytes of one block of a sequence that grows in every layer, on one rank: the engine's page over all layers."""
    growths, _ = prefill_growths(deployment)
    return sum(size for _, size in growths)


def prompt_bytes(deployment: Deployment, tokens: int) -> int:
    """Bytes held on one rank once ``tokens`` of a prompt are in."""
    growths, fixed = prefill_growths(deployment)
    return _held_bytes(growths, fixed, tokens, deployment.engine.block_size)


def longest_prompt(deployment: Deployment, pool_bytes: int, limit_tokens: int) -> int:
    """Most tokens of one sequence that the pool holds uncompressed by selection, at most ``limit_tokens``.

    Where a sequence may be stored at several levels, it must fit at each.
    """
    return min(_longest_prompt(variant, pool_bytes, limit_tokens) for variant in deployment.variants)


def _longest_prompt(deployment: Deployment, pool_bytes: int, limit_tokens: int) -> int:
    growths, fixed = prefill_growths(deployment)
    block_size = deployment.engine.block_size
    if _held_bytes(growths, fixed, limit_tokens, block_size) <= pool_bytes:
        return limit_tokens
    low, high = 0, limit_tokens
    while low < high:
        middle = (low + high + 1) // 2
        if _held_bytes(growths, fixed, middle, block_size) <= pool_bytes:
            low = middle
        else:
            high = middle - 1
    return low


def longest_sequence(deployment: Deployment, pool_bytes: int, limit_tokens: int) -> int:
    """Most tokens that one sequence may have; in llama.cpp a slot's part of the context, elsewhere the whole pool's."""
    engine = deployment.engine
    if engine.kind != "llamacpp":
        return longest_prompt(deployment, pool_bytes, limit_tokens)
    return longest_prompt(deployment, pool_bytes // engine.max_num_seqs, limit_tokens)


def _held_bytes(growths: tuple[tuple[int | None, int], ...], fixed_bytes: int, tokens: int, block_size: int) -> int:
    return fixed_bytes + sum(
        -(-(tokens if cap is None else min(tokens, cap)) // block_size) * size for cap, size in growths
    )
