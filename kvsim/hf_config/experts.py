"""Mixture of experts: which layers have experts, how many, how wide."""

from __future__ import annotations

from kvsim.hf_config.reader import MAX_LAYERS, ConfigReader
from kvsim.specs.model import MoeShape

NUM_EXPERTS_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
TOP_K_KEYS = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_top_k", "moe_topk")


def read_moe(reader: ConfigReader, num_layers: int, model_type: str) -> MoeShape | None:
    """Expert layers of the model, or None for a dense one; raise InvalidSpec naming the key at fault."""
    num_experts = reader.optional_integer(*NUM_EXPERTS_KEYS, maximum=65536)
    if not num_experts:
        return None
    top_k = reader.integer(*TOP_K_KEYS, maximum=65536)
    if top_k > num_experts:
        reader.fail(reader.find(*TOP_K_KEYS)[0], f"{top_k} exceeds the {num_experts} experts")
    layers = _expert_layers(reader, num_layers)
    if not layers:
        return None
    width = reader.integer("moe_intermediate_size", "expert_intermediate_size", "intermediate_size")
    return MoeShape(
        layers=layers,
        num_experts=num_experts,
        num_experts_per_tok=top_k,
        moe_intermediate_size=width,
        shared_intermediate_size=_shared_width(reader, width, model_type),
    )


def _shared_width(reader: ConfigReader, width: int, model_type: str) -> int:
    """Total width of the MLP that every token passes beside its experts."""
    if model_type.startswith("llama4"):
        return width
    if reader.flag("enable_moe_block", default=False):
        # Gemma 4 runs its dense MLP beside the experts.
        return reader.integer("intermediate_size")
    num_shared = reader.optional_integer("n_shared_experts", "num_shared_experts", maximum=1024)
    for key in (
        "shared_expert_intermediate_size",
        "moe_shared_expert_intermediate_size",
        "share_expert_dim",
        "shared_intermediate_size",
    ):
        shared = reader.optional_integer(key)
        if shared is not None:
            return shared * (1 if num_shared is None else num_shared)
    return (num_shared or 0) * width


def _expert_layers(reader: ConfigReader, num_layers: int) -> tuple[int, ...]:
    every = range(num_layers)
    named = reader.text("hybrid_override_pattern", "") or reader.strings("layers_block_type") or ()
    if set(named) & {"E", "moe"}:
        return tuple(i for i in every if named[i] in ("E", "moe"))
    explicit = _listed_layers(reader, num_layers)
    if explicit is not None:
        return explicit
    step = reader.optional_integer("interleave_moe_layer_step", minimum=1)
    if step is not None:
        return tuple(range(step - 1, num_layers, step))
    period = reader.optional_integer("expert_layer_period", minimum=1)
    if period is not None:
        offset = reader.integer("expert_layer_offset", default=0, minimum=0)
        return tuple(i for i in every if i % period == offset)
    dense = reader.integers("mlp_only_layers") or ()
    sparse_step = reader.integer("decoder_sparse_step", default=1)
    first = reader.integer("first_k_dense_replace", default=0, minimum=0, maximum=MAX_LAYERS)
    freq = reader.integer("moe_layer_freq", default=1)
    return tuple(i for i in every if i >= first and i % freq == 0 and i not in dense and (i + 1) % sparse_step == 0)


def _listed_layers(reader: ConfigReader, num_layers: int) -> tuple[int, ...] | None:
    """Layers named one by one: ``mlp_layer_types``, ``moe_layers``, or ``moe_layer_freq`` as a list of flags."""
    types = reader.strings("mlp_layer_types")
    if types is not None:
        if len(types) != num_layers or set(types) - {"dense", "sparse"}:
            reader.fail("mlp_layer_types", f"must be {num_layers} entries of 'dense' or 'sparse'")
        return tuple(i for i, name in enumerate(types) if name == "sparse")
    if reader.has("moe_layers"):
        listed = reader.integers("moe_layers", maximum=num_layers - 1) or ()
        return tuple(sorted(set(listed)))
    if isinstance(reader.find("moe_layer_freq")[1], list):
        flags = reader.integers("moe_layer_freq", maximum=1) or ()
        if len(flags) != num_layers:
            reader.fail("moe_layer_freq", f"has {len(flags)} entries, but num_hidden_layers is {num_layers}")
        return tuple(i for i, flag in enumerate(flags) if flag)
    return None
