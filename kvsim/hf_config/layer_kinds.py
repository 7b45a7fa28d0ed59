"""The kind of every layer, in order, from whichever of a config's many conventions is present."""

from __future__ import annotations

from kvsim.hf_config.reader import ConfigReader
from kvsim.hf_config.traits import Traits
from kvsim.specs.model import LayerKind

LAYER_TYPES: dict[str, LayerKind] = {
    "full_attention": LayerKind.FULL,
    "attention": LayerKind.FULL,
    "sliding_attention": LayerKind.SLIDING,
    "chunked_attention": LayerKind.CHUNKED,
    "indexed_attention": LayerKind.INDEXED,
    "deepseek_sparse_attention": LayerKind.INDEXED,
    "linear_attention": LayerKind.LINEAR,
    "mamba": LayerKind.LINEAR,
    "mamba2": LayerKind.LINEAR,
    "mlp": LayerKind.MLP,
    "moe": LayerKind.MLP,
}
"""transformers' ``ALLOWED_LAYER_TYPES`` as far as modelled, with its legacy spellings (configuration_utils.py)."""

HYBRID_LETTERS: dict[str, LayerKind] = {
    "M": LayerKind.LINEAR,
    "*": LayerKind.FULL,
    "-": LayerKind.MLP,
    "E": LayerKind.MLP,
}
"""Nemotron-H's ``hybrid_override_pattern``: Mamba-2, attention, MLP, experts."""

UNMODELLED_KEYS: dict[str, str] = {
    "compress_ratios": "compressed sparse attention (DeepSeek-V4)",
    "block_configs": "layers that differ in shape one by one (Nemotron-NAS)",
    "linear_attn_config": "Kimi linear attention",
    "sparse_attention_config": "block-sparse attention (MiniMax-M3)",
    "conv_L_cache": "short-convolution layers (LFM2)",
}
"""Keys that change what a layer stores in ways kvsim does not model; refused rather than misread."""


def layer_kinds(reader: ConfigReader, num_layers: int, model_type: str, traits: Traits) -> tuple[LayerKind, ...]:
    """Kind of each of ``num_layers`` layers; raise InvalidSpec naming the key where it is unknown or inconsistent."""
    for key, meaning in UNMODELLED_KEYS.items():
        if reader.has(key):
            reader.fail(key, f"means {meaning}, which kvsim does not model yet")
    if 0 in (reader.integers("attn_type_list", maximum=1) or ()):
        reader.fail("attn_type_list", "0 means lightning attention (MiniMax-01), which kvsim does not model yet")
    kinds = (
        _from_names(reader, "layer_types", num_layers)
        or _from_names(reader, "layers_block_type", num_layers)
        or _from_letters(reader, num_layers)
        or _from_hybrid_layers(reader, num_layers)
        or _from_attention_period(reader, num_layers)
        or _from_interval(reader, num_layers)
        or _from_chunks(reader, num_layers, model_type)
        or _from_window(reader, num_layers, traits)
    )
    return tuple(_narrow(reader, kind) for kind in kinds)


def window_tokens(reader: ConfigReader, kind: LayerKind) -> int | None:
    """Window of a sliding or chunk of a chunked layer in tokens, None for other kinds."""
    if kind is LayerKind.SLIDING:
        return reader.integer("sliding_window", "sliding_window_size")
    if kind is LayerKind.CHUNKED:
        return reader.integer("attention_chunk_size")
    return None


def _narrow(reader: ConfigReader, kind: LayerKind) -> LayerKind:
    """Full latent attention with an indexer reads only its top-k; a window as long as the model's limit is full."""
    if kind is LayerKind.FULL and reader.has("kv_lora_rank") and reader.has("index_topk"):
        return LayerKind.INDEXED
    longest = reader.optional_integer("max_position_embeddings", minimum=1)
    if kind is LayerKind.SLIDING and longest is not None and (window_tokens(reader, kind) or 0) >= longest:
        return LayerKind.FULL
    return kind


def _from_names(reader: ConfigReader, key: str, num_layers: int) -> tuple[LayerKind, ...]:
    names = reader.strings(key)
    if names is None:
        return ()
    _check_length(reader, key, len(names), num_layers)
    for name in names:
        if name not in LAYER_TYPES:
            reader.fail(key, f"unknown layer type {name!r}; known: {', '.join(sorted(LAYER_TYPES))}")
    return tuple(LAYER_TYPES[name] for name in names)


def _from_letters(reader: ConfigReader, num_layers: int) -> tuple[LayerKind, ...]:
    key = "hybrid_override_pattern"
    letters = reader.text(key, "")
    if not letters:
        return ()
    _check_length(reader, key, len(letters), num_layers)
    for letter in letters:
        if letter not in HYBRID_LETTERS:
            reader.fail(key, f"unknown layer letter {letter!r}; known: {' '.join(HYBRID_LETTERS)}")
    return tuple(HYBRID_LETTERS[letter] for letter in letters)


def _from_hybrid_layers(reader: ConfigReader, num_layers: int) -> tuple[LayerKind, ...]:
    """MiMo-V2: 1 is a sliding layer, 0 a full one."""
    flags = reader.integers("hybrid_layer_pattern", maximum=1)
    if flags is None:
        return ()
    _check_length(reader, "hybrid_layer_pattern", len(flags), num_layers)
    return tuple(LayerKind.SLIDING if flag else LayerKind.FULL for flag in flags)


def _from_attention_period(reader: ConfigReader, num_layers: int) -> tuple[LayerKind, ...]:
    """Jamba's period and offset, Bamba's list of attention layers; the rest are state space."""
    indices = reader.integers("attn_layer_indices")
    if indices is not None:
        return tuple(LayerKind.FULL if i in indices else LayerKind.LINEAR for i in range(num_layers))
    period = reader.optional_integer("attn_layer_period", minimum=1)
    if period is None:
        return ()
    offset = reader.integer("attn_layer_offset", default=0, minimum=0)
    return tuple(LayerKind.FULL if i % period == offset else LayerKind.LINEAR for i in range(num_layers))


def _from_interval(reader: ConfigReader, num_layers: int) -> tuple[LayerKind, ...]:
    """Qwen3-Next: every ``full_attention_interval``-th layer is full, the rest Gated DeltaNet."""
    interval = reader.optional_integer("full_attention_interval", minimum=1)
    if interval is None:
        return ()
    return tuple(LayerKind.LINEAR if (i + 1) % interval else LayerKind.FULL for i in range(num_layers))


def _from_chunks(reader: ConfigReader, num_layers: int, model_type: str) -> tuple[LayerKind, ...]:
    """Llama 4: layers with rotary embedding attend within chunks; every fourth has none and attends to all."""
    if not reader.has("attention_chunk_size"):
        return ()
    if not model_type.startswith("llama4"):
        reader.fail("attention_chunk_size", f"needs layer_types to say which layers of a {model_type!r} are chunked")
    rope = reader.integers("no_rope_layers", maximum=1)
    if not rope:
        interval = reader.integer("no_rope_layer_interval", default=4)
        rope = tuple(int((i + 1) % interval != 0) for i in range(num_layers))
    _check_length(reader, "no_rope_layers", len(rope), num_layers)
    return tuple(LayerKind.CHUNKED if flag else LayerKind.FULL for flag in rope)


def _from_window(reader: ConfigReader, num_layers: int, traits: Traits) -> tuple[LayerKind, ...]:
    used = reader.flag("use_sliding_window", default=traits.sliding_by_default)
    if not used or reader.optional_integer("sliding_window", minimum=1) is None:
        return (LayerKind.FULL,) * num_layers
    if not traits.sliding_by_default:
        # transformers' Qwen configs slide the upper layers only.
        first = reader.integer("max_window_layers", minimum=0, maximum=MAX_WINDOW_LAYERS)
        return tuple(LayerKind.SLIDING if i >= first else LayerKind.FULL for i in range(num_layers))
    key, pattern = reader.find("sliding_window_pattern", "_sliding_window_pattern")
    if isinstance(pattern, str):
        if not pattern or set(pattern) - set("LG"):
            reader.fail(key, f"must be a number or letters L (sliding) and G (full) (got {pattern!r})")
        return tuple(
            LayerKind.SLIDING if pattern[i % len(pattern)] == "L" else LayerKind.FULL for i in range(num_layers)
        )
    period = reader.optional_integer(key, minimum=1) or traits.sliding_pattern
    if period is None:
        return (LayerKind.SLIDING,) * num_layers
    return tuple(LayerKind.SLIDING if (i + 1) % period else LayerKind.FULL for i in range(num_layers))


MAX_WINDOW_LAYERS = 10**6


def _check_length(reader: ConfigReader, key: str, length: int, num_layers: int) -> None:
    if length != num_layers:
        reader.fail(key, f"has {length} entries, but num_hidden_layers is {num_layers}")
