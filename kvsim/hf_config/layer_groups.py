"""Attention shape of every layer, gathered into groups of equal layers."""

from __future__ import annotations

from dataclasses import dataclass, replace

from kvsim.hf_config.layer_kinds import window_tokens
from kvsim.hf_config.linear_state import LinearMixer
from kvsim.hf_config.reader import MAX_LAYERS, ConfigReader
from kvsim.specs.model import LayerGroup, LayerKind

MAX_HEADS = 65536


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer projects to and keeps per token."""

    kind: LayerKind
    num_attention_heads: int = 0
    num_kv_heads: int = 0
    k_head_dim: int = 0
    v_head_dim: int = 0
    is_latent: bool = False
    window_tokens: int | None = None
    index_head_dim: int = 0
    index_topk: int | None = None
    state_bytes: int = 0
    shares_kv: bool = False
    keys_are_values: bool = False
    """V is projected with K's matrix (Gemma 4's ``attention_k_eq_v``); both are still cached."""


def layer_shapes(
    reader: ConfigReader,
    kinds: tuple[LayerKind, ...],
    num_attention_heads: int,
    head_dim: int,
    mixer: LinearMixer | None,
) -> tuple[LayerShape, ...]:
    """Shape of each layer.

    Parameters
    ----------
    reader, kinds
        The config and the kind of each layer.
    num_attention_heads, head_dim
        Query heads and the width of one.
    mixer
        State of linear layers; with no linear layer but a mixer, every layer runs both side by side (Falcon-H1).
    """
    by_kind = {kind: _shape(reader, kind, num_attention_heads, head_dim, mixer) for kind in dict.fromkeys(kinds)}
    shapes = [by_kind[kind] for kind in kinds]
    if mixer is not None and LayerKind.LINEAR not in by_kind:
        shapes = [replace(shape, state_bytes=mixer.state_bytes) for shape in shapes]
    num_shared = reader.integer("num_kv_shared_layers", default=0, minimum=0, maximum=MAX_LAYERS)
    if num_shared >= len(kinds):
        reader.fail("num_kv_shared_layers", f"must be less than num_hidden_layers, {len(kinds)} (got {num_shared})")
    first_shared = len(kinds) - num_shared
    shapes[first_shared:] = [replace(shape, shares_kv=True) for shape in shapes[first_shared:]]
    return tuple(_without_indexer(reader, shapes))


def group_layers(shapes: tuple[LayerShape, ...]) -> tuple[LayerGroup, ...]:
    """Gather equal layers, groups in the order of their first layer."""
    members: dict[LayerShape, list[int]] = {}
    for index, shape in enumerate(shapes):
        members.setdefault(shape, []).append(index)
    return tuple(
        LayerGroup(
            kind=shape.kind,
            layers=tuple(layers),
            num_kv_heads=shape.num_kv_heads,
            k_head_dim=shape.k_head_dim,
            v_head_dim=shape.v_head_dim,
            is_latent=shape.is_latent,
            window_tokens=shape.window_tokens,
            index_head_dim=shape.index_head_dim,
            index_topk=shape.index_topk,
            state_bytes=shape.state_bytes,
            shares_kv=shape.shares_kv,
        )
        for shape, layers in members.items()
    )


def _shape(
    reader: ConfigReader, kind: LayerKind, num_heads: int, head_dim: int, mixer: LinearMixer | None
) -> LayerShape:
    state_bytes = mixer.state_bytes if mixer else 0
    if kind is LayerKind.LINEAR:
        return LayerShape(kind, state_bytes=state_bytes)
    if kind is LayerKind.MLP:
        return LayerShape(kind)
    if reader.has("kv_lora_rank"):
        return _latent_shape(reader, kind, num_heads)
    shape = _head_shape(reader, kind, num_heads, head_dim)
    if shape.num_attention_heads % shape.num_kv_heads:
        reader.fail(
            "num_key_value_heads",
            f"{shape.num_kv_heads} does not divide the {shape.num_attention_heads} query heads of {kind} layers",
        )
    return shape


def _latent_shape(reader: ConfigReader, kind: LayerKind, num_heads: int) -> LayerShape:
    """Multi-head latent attention (arXiv 2405.04434): the compressed KV and the shared rotary key."""
    width = reader.integer("kv_lora_rank", maximum=MAX_HEADS) + reader.integer("qk_rope_head_dim", maximum=MAX_HEADS)
    indexed = kind is LayerKind.INDEXED
    return LayerShape(
        kind,
        num_attention_heads=num_heads,
        num_kv_heads=1,
        k_head_dim=width,
        is_latent=True,
        window_tokens=window_tokens(reader, kind),
        index_head_dim=reader.integer("index_head_dim", maximum=MAX_HEADS) if indexed else 0,
        index_topk=reader.integer("index_topk") if indexed else None,
    )


def _head_shape(reader: ConfigReader, kind: LayerKind, num_heads: int, head_dim: int) -> LayerShape:
    if kind is LayerKind.INDEXED:
        reader.fail("layer_types", "indexed attention without kv_lora_rank is not modelled")
    num_kv_heads = _num_kv_heads(reader, num_heads)
    v_head_dim = reader.integer("v_head_dim", default=head_dim, maximum=MAX_HEADS)
    shape = LayerShape(
        kind,
        num_attention_heads=num_heads,
        num_kv_heads=num_kv_heads,
        k_head_dim=head_dim,
        v_head_dim=v_head_dim,
        window_tokens=window_tokens(reader, kind),
    )
    if kind is LayerKind.SLIDING:
        k_head_dim = reader.integer("swa_head_dim", default=head_dim, maximum=MAX_HEADS)
        return replace(
            shape,
            num_attention_heads=reader.integer("swa_num_attention_heads", default=num_heads, maximum=MAX_HEADS),
            num_kv_heads=reader.integer("swa_num_key_value_heads", default=num_kv_heads, maximum=MAX_HEADS),
            k_head_dim=k_head_dim,
            v_head_dim=reader.integer("swa_v_head_dim", default=v_head_dim, maximum=MAX_HEADS),
        )
    global_head_dim = reader.integer("global_head_dim", default=head_dim, maximum=MAX_HEADS)
    if reader.has("global_head_dim"):
        shape = replace(shape, k_head_dim=global_head_dim, v_head_dim=global_head_dim)
    if reader.flag("attention_k_eq_v", default=False):
        num_global = reader.integer("num_global_key_value_heads", default=num_kv_heads, maximum=MAX_HEADS)
        shape = replace(shape, num_kv_heads=num_global, keys_are_values=True)
    return shape


def _num_kv_heads(reader: ConfigReader, num_heads: int) -> int:
    """``num_key_value_heads``; one head where ``multi_query`` says so (Falcon, StarCoder), else one per query head."""
    multi_query = reader.flag("multi_query", default=False) and not reader.flag(
        "new_decoder_architecture", default=False
    )
    if multi_query and not reader.has("num_key_value_heads"):
        return 1
    return reader.integer("num_key_value_heads", "num_kv_heads", "n_head_kv", default=num_heads, maximum=MAX_HEADS)


def _without_indexer(reader: ConfigReader, shapes: list[LayerShape]) -> list[LayerShape]:
    """Layers marked ``shared`` in ``indexer_types`` reuse the top-k of an earlier layer and cache no indexer key."""
    types = reader.strings("indexer_types")
    if types is None:
        return shapes
    if len(types) != len(shapes):
        reader.fail("indexer_types", f"has {len(types)} entries, but num_hidden_layers is {len(shapes)}")
    for name in types:
        if name not in ("full", "shared"):
            reader.fail("indexer_types", f"unknown indexer type {name!r}; known: full, shared")
    return [
        replace(shape, index_head_dim=0) if name == "shared" else shape
        for name, shape in zip(types, shapes, strict=True)
    ]
