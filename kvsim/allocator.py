"""KV bytes as an engine's allocator lays them out: a function of the model and the engine, not of the model alone.

vLLM (``vllm/v1/core/kv_cache_utils.py``, ``single_type_kv_cache_manager.py``)
    Every layer that stores KV takes pages from one pool whose pages all have one size. Layers are cut into groups of
    equal count; a page of a group holds one block of each of its layers. Sliding layers give back pages that fall
    wholly out of their window, but reserve room for a whole scheduling step. A chunked layer (Llama 4) is kept whole,
    since the hybrid manager is off for it by default.
llama.cpp (``llama-kv-cache-iswa.cpp``)
    Full layers hold a cell per token of context. Sliding and chunked layers hold their window and one micro-batch,
    padded to 256 cells, unless ``--swa-full``.

hf-mem pull request 70 shows the two rules side by side: gpt-oss-20b at 32 x 8,192 tokens takes 12.00 GiB if sliding
layers count in full, 6.09 GiB if they count by window.
"""

from __future__ import annotations

import math

from kvsim.errors import IncompatibleScenario
from kvsim.specs.engine import EngineKind
from kvsim.specs.model import LayerGroup, LayerKind, ModelSpec

Engine = EngineKind

NATIVE_ELEMENT_BYTES = 2.0
LLAMACPP_PAD_TOKENS = 256
LLAMACPP_UBATCH_TOKENS = 512
GROUP_SIZE_TOLERANCE = 1.5
"""vLLM pads the smaller layer kind up to the larger one while they differ by less than this factor (issue 54104)."""


def kv_heads_per_rank(group: LayerGroup, tensor_parallel_size: int) -> int:
    """KV heads that one tensor-parallel rank stores.

    Heads are split while there are enough, then each is replicated; a latent cache is whole on every rank.

    Raises
    ------
    IncompatibleScenario
        Neither of heads and ranks divides the other.
    """
    heads = group.num_kv_heads
    if group.is_latent or heads == 0 or tensor_parallel_size == 1:
        return heads
    if heads % tensor_parallel_size == 0:
        return heads // tensor_parallel_size
    if tensor_parallel_size % heads == 0:
        return 1
    divisors = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
    msg = (
        f"tensor_parallel_size {tensor_parallel_size} does not fit num_key_value_heads {heads}; "
        f"allowed: {divisors}, or a multiple of {heads}"
    )
    raise IncompatibleScenario(msg)


def layer_bytes_per_token(
    group: LayerGroup, *, element_bytes: float = NATIVE_ELEMENT_BYTES, tensor_parallel_size: int = 1
) -> float:
    """Bytes that one token takes in one layer of the group on one rank, indexer key included."""
    if group.kv_elements_per_token == 0:
        return 0.0
    heads = kv_heads_per_rank(group, tensor_parallel_size)
    return heads * (group.k_head_dim + group.v_head_dim) * element_bytes + group.index_key_bytes


def layer_token_cap(
    group: LayerGroup, engine: Engine, *, max_num_batched_tokens: int, swa_full: bool = False
) -> int | None:
    """Most tokens that one layer of the group ever holds for one sequence; None if it grows without bound.

    vLLM's sliding layers reserve ``window - 1 + max_num_batched_tokens`` (``SlidingWindowSpec``), llama.cpp's
    ``window + n_ubatch`` padded to 256, with n_ubatch 512 or the scheduling budget if that is less.
    """
    if group.kv_elements_per_token == 0:
        return 0
    if group.window_tokens is None:
        return None
    if engine == "llamacpp":
        return None if swa_full else _llamacpp_window_cells(group.window_tokens, max_num_batched_tokens)
    if group.kind is LayerKind.SLIDING:
        return group.window_tokens - 1 + max_num_batched_tokens
    return None


def resident_tokens(
    group: LayerGroup, tokens: int, engine: Engine, *, block_size: int = 16, swa_full: bool = False
) -> int:
    """Token slots that one layer of the group holds for a decoding sequence of ``tokens``.

    vLLM: whole blocks, less those wholly out of a sliding window (``max(0, tokens - window + 1) // block_size``).
    llama.cpp: the cells allocated for a context of ``tokens``.
    """
    if group.kv_elements_per_token == 0:
        return 0
    if engine == "llamacpp":
        if group.window_tokens is None or swa_full:
            return tokens
        unpadded = min(tokens, group.window_tokens + LLAMACPP_UBATCH_TOKENS)
        return _padded(unpadded, LLAMACPP_PAD_TOKENS)
    held = _padded(tokens, block_size)
    if group.kind is LayerKind.SLIDING and group.window_tokens is not None:
        held -= max(0, tokens - group.window_tokens + 1) // block_size * block_size
    return held


def kv_bytes_per_token(
    model: ModelSpec,
    engine: Engine,
    *,
    element_bytes: float = NATIVE_ELEMENT_BYTES,
    tensor_parallel_size: int = 1,
) -> int:
    """Bytes that a sequence gains per token on one rank.

    vLLM: over every layer that stores KV, sliding ones too, as while no window is full. llama.cpp: over the layers
    without a window only, since windowed ones are allocated once (:func:`window_bytes_per_sequence`).
    """
    return math.ceil(
        sum(
            group.num_layers
            * layer_bytes_per_token(group, element_bytes=element_bytes, tensor_parallel_size=tensor_parallel_size)
            for group in model.kv_groups
            if engine != "llamacpp" or group.window_tokens is None
        )
    )


def window_bytes_per_sequence(
    model: ModelSpec,
    engine: Engine,
    *,
    max_num_batched_tokens: int,
    element_bytes: float = NATIVE_ELEMENT_BYTES,
    tensor_parallel_size: int = 1,
) -> int:
    """Most bytes that the layers with a bounded cache ever hold for one sequence on one rank."""
    total = 0.0
    for group in model.kv_groups:
        cap = layer_token_cap(group, engine, max_num_batched_tokens=max_num_batched_tokens)
        per_token = layer_bytes_per_token(group, element_bytes=element_bytes, tensor_parallel_size=tensor_parallel_size)
        total += group.num_layers * per_token * (cap or 0)
    return math.ceil(total)


def sequence_kv_bytes(
    model: ModelSpec,
    engine: Engine,
    tokens: int,
    *,
    block_size: int = 16,
    element_bytes: float = NATIVE_ELEMENT_BYTES,
    tensor_parallel_size: int = 1,
) -> int:
    """KV bytes that a decoding sequence of ``tokens`` holds on one rank, states of linear layers apart."""
    return math.ceil(
        sum(
            group.num_layers
            * layer_bytes_per_token(group, element_bytes=element_bytes, tensor_parallel_size=tensor_parallel_size)
            * resident_tokens(group, tokens, engine, block_size=block_size)
            for group in model.kv_groups
        )
    )


def state_bytes_per_sequence(model: ModelSpec, *, tensor_parallel_size: int = 1) -> int:
    """Bytes of linear-attention and state-space state per sequence on one rank, whatever the sequence's length."""
    return sum(group.num_layers * math.ceil(group.state_bytes / tensor_parallel_size) for group in model.groups)


def pool_bytes_per_token(
    model: ModelSpec,
    engine: Engine,
    *,
    element_bytes: float = NATIVE_ELEMENT_BYTES,
    tensor_parallel_size: int = 1,
) -> int:
    """Bytes of pool on one rank behind each token of vLLM's log line ``GPU KV cache size: N tokens``.

    vLLM divides the number of blocks by the number of layer groups, so layers of every kind count with the largest
    page, and the padding of an incomplete group counts too: gpt-oss-120b 73,728 B (5.38 GiB, 78,384 tokens; hf-mem
    issue 60), Gemma 4 31B 983,040 B (24.54 GiB, 26,800 tokens; hf-mem pull request 61). llama.cpp has no pool:
    :func:`kv_bytes_per_token`. Releases after the 0.15 line log maximum concurrency times ``max_model_len`` instead.
    """
    exact = kv_bytes_per_token(model, engine, element_bytes=element_bytes, tensor_parallel_size=tensor_parallel_size)
    layers_by_type = _layers_by_cache_type(model, element_bytes, tensor_parallel_size)
    if engine != "vllm" or len(layers_by_type) <= 1:
        return exact
    counts = list(layers_by_type.values())
    group_size = _group_size(counts)
    num_groups = sum(math.ceil(count / group_size) for count in counts)
    largest = max(
        layer_bytes_per_token(group, element_bytes=element_bytes, tensor_parallel_size=tensor_parallel_size)
        for group in model.kv_groups
    )
    return math.ceil(num_groups * group_size * largest)


def padded_layer_shares(
    model: ModelSpec, *, tensor_parallel_size: int = 1
) -> dict[tuple[LayerKind, int | None], float]:
    """Layers that vLLM allocates for each that a kind has, by kind and window: padding of the last group.

    A group whose layers run out takes whole pages all the same: Gemma 3 27B has 52 sliding layers in 6 groups of 10,
    so each pays for 60 / 52 layers. One kind of layer alone is one group, without padding.
    """
    by_type = _layers_by_cache_type(model, NATIVE_ELEMENT_BYTES, tensor_parallel_size)
    if len(by_type) <= 1:
        return {}
    group_size = _group_size(list(by_type.values()))
    shares: dict[tuple[LayerKind, int | None], float] = {}
    for group in model.groups:
        key = _cache_type(group, model, NATIVE_ELEMENT_BYTES, tensor_parallel_size)
        if key is not None:
            count = by_type[key]
            shares[group.kind, group.window_tokens] = math.ceil(count / group_size) * group_size / count
    return shares


def _group_size(counts: list[int]) -> int:
    """Layers of one group: the larger kind's where kinds are near in number, else the smaller's."""
    return max(counts) if max(counts) < GROUP_SIZE_TOLERANCE * min(counts) else min(counts)


def _layers_by_cache_type(
    model: ModelSpec, element_bytes: float, tensor_parallel_size: int
) -> dict[tuple[str, float, int | None], int]:
    """Layers per cache type as vLLM tells them apart: manager, bytes per token, window."""
    counts: dict[tuple[str, float, int | None], int] = {}
    for group in model.groups:
        key = _cache_type(group, model, element_bytes, tensor_parallel_size)
        if key is not None:
            counts[key] = counts.get(key, 0) + group.num_layers
    return counts


def _cache_type(
    group: LayerGroup, model: ModelSpec, element_bytes: float, tensor_parallel_size: int
) -> tuple[str, float, int | None] | None:
    """Manager, bytes per token and window of a group's layers; None where they store nothing."""
    per_token = layer_bytes_per_token(group, element_bytes=element_bytes, tensor_parallel_size=tensor_parallel_size)
    if group.kind is LayerKind.LINEAR and group.state_bytes:
        return "state", 0.0, None
    if per_token == 0:
        return None
    if group.kind is LayerKind.SLIDING:
        return "sliding", per_token, group.window_tokens
    # Latent layers of unlike size (indexer or none) are one type: all are full attention.
    return "full", 0.0 if any(one.is_latent for one in model.groups) else per_token, None


def _llamacpp_window_cells(window_tokens: int, max_num_batched_tokens: int) -> int:
    return _padded(window_tokens + min(LLAMACPP_UBATCH_TOKENS, max_num_batched_tokens), LLAMACPP_PAD_TOKENS)


def _padded(tokens: int, multiple: int) -> int:
    return -(-tokens // multiple) * multiple
