"""The parser's front door: one config mapping in, one ModelSpec out. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvsim.documents import validate
from kvsim.errors import InvalidSpec
from kvsim.hf_config.experts import read_moe
from kvsim.hf_config.layer_groups import MAX_HEADS, LayerShape, group_layers, layer_shapes
from kvsim.hf_config.layer_kinds import layer_kinds
from kvsim.hf_config.linear_state import LinearMixer, read_linear_mixer
from kvsim.hf_config.parameters import ParameterCounts, Widths, count_parameters
from kvsim.hf_config.quantization import read_weight_format
from kvsim.hf_config.reader import MAX_LAYERS, ConfigReader
from kvsim.hf_config.traits import Traits, traits_of
from kvsim.hf_config.vision import rotary_fraction, vision_parameters
from kvsim.specs.base import Dtype
from kvsim.specs.model import LayerKind, LinearShape, MlaShape, ModelSpec

TEXT_CONFIG_KEYS = ("text_config", "llm_config", "language_config", "thinker_config")
"""Where multimodal configs keep their language model."""
DTYPES = {"bfloat16": Dtype.BF16, "float16": Dtype.FP16, "half": Dtype.FP16, "float32": Dtype.BF16, "auto": Dtype.BF16}
"""A float32 checkpoint is served in bf16, as vLLM's ``--dtype auto`` does."""
NON_GATED_ACTIVATIONS = ("relu2",)


def parse_hf_config(config: Mapping[str, Any], *, name: str, source: str) -> ModelSpec:
    """Parse a Hugging Face config.

    Parameters
    ----------
    config
        The decoded ``config.json``; of a multimodal model only the language model counts.
    name, source
        The model's name, and where the config was read; errors begin with the name.

    Raises
    ------
    InvalidSpec
        A key is missing, has a value that is not allowed, or names a layer kind that is not known. The message
        names the key and the value.
    """
    reader = _language_model(config, name)
    model_type = reader.text("model_type", "")
    if reader.flag("is_encoder_decoder", default=False):
        reader.fail("is_encoder_decoder", "is true; kvsim reads decoder-only models")
    traits = traits_of(model_type)
    num_layers = _num_layers(reader)
    num_heads = reader.integer("num_attention_heads", "n_head", "n_heads", maximum=MAX_HEADS)
    kinds = layer_kinds(reader, num_layers, model_type, traits)
    hidden_size = reader.integer("hidden_size", "n_embd", "d_model")
    mixer = _linear_mixer(reader, hidden_size, kinds, model_type)
    shapes = layer_shapes(reader, kinds, num_heads, _head_dim(reader, hidden_size, num_heads), mixer)
    moe = read_moe(reader, num_layers, model_type)
    mla = _mla(reader)
    widths = _widths(reader, hidden_size, traits, num_dense=num_layers - len(moe.layers if moe else ()))
    counts = count_parameters(reader, widths, shapes, traits, mla, moe, mixer)
    document = _document(reader, model_type, num_heads, widths, shapes, counts)
    document |= {"name": name, "source": source, "mla": mla, "moe": moe, "linear": _linear_shape(mixer)}
    return validate(ModelSpec, document, reader.where)


def _language_model(config: Mapping[str, Any], name: str) -> ConfigReader:
    """Reader of the language model inside a possibly multimodal config."""
    if not isinstance(config, Mapping):
        msg = f"{name}: a config must be an object, as in config.json (got {type(config).__name__})"
        raise InvalidSpec(msg)
    for key in TEXT_CONFIG_KEYS:
        inner = config.get(key)
        if isinstance(inner, Mapping):
            nested = inner.get("text_config")
            return ConfigReader(nested if isinstance(nested, Mapping) else inner, name, parent=config)
        if inner is not None:
            ConfigReader(config, name).fail(key, f"must be an object (got {inner!r:.60})")
    return ConfigReader(config, name)


def _num_layers(reader: ConfigReader) -> int:
    """Count the layers; Nemotron 3 gives only their list."""
    listed = len(reader.strings("layers_block_type") or ()) or None
    keys = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
    return reader.integer(*keys, default=listed, maximum=MAX_LAYERS)


def _document(
    reader: ConfigReader,
    model_type: str,
    num_heads: int,
    widths: Widths,
    shapes: tuple[LayerShape, ...],
    counts: ParameterCounts,
) -> dict[str, Any]:
    """ModelSpec's fields apart from its names and optional shapes."""
    dtype = _dtype(reader)
    weights = read_weight_format(reader, len(shapes))
    names = reader.inherited("architectures")
    return {
        "architecture": names[0] if isinstance(names, list) and names and isinstance(names[0], str) else model_type,
        "hidden_size": widths.hidden_size,
        "num_attention_heads": num_heads,
        "vocab_size": widths.vocab_size,
        "intermediate_size": widths.intermediate_size,
        "gated_mlp": widths.gated_mlp,
        "tie_word_embeddings": widths.tied,
        "max_position_embeddings": widths.max_position_embeddings,
        "dtype": dtype,
        "weight_dtype": weights.dtype if weights else dtype,
        "weight_bits": counts.weight_bits(weights),
        "groups": group_layers(shapes),
        "num_parameters": counts.total,
        "num_active_parameters": counts.active,
        "num_embedding_parameters": counts.embedding,
        "num_encoder_parameters": vision_parameters(reader),
        "rotary_fraction": rotary_fraction(reader),
    }


def _head_dim(reader: ConfigReader, hidden_size: int, num_heads: int) -> int:
    """Explicit ``head_dim`` wins over hidden size / heads (Qwen3, Gemma, Mistral-Nemo)."""
    explicit = reader.optional_integer("head_dim", "attention_head_dim", "kv_channels", minimum=1, maximum=MAX_HEADS)
    if explicit is not None:
        return explicit
    if hidden_size % num_heads and not reader.has("kv_lora_rank"):
        reader.fail(
            "num_attention_heads", f"{num_heads} does not divide hidden_size {hidden_size}, and head_dim is absent"
        )
    return hidden_size // num_heads or 1


def _widths(reader: ConfigReader, hidden_size: int, traits: Traits, *, num_dense: int) -> Widths:
    tied = reader.inherited("tie_word_embeddings")
    if tied is not None and not isinstance(tied, bool):
        reader.fail("tie_word_embeddings", f"must be true or false (got {tied!r:.60})")
    activation = reader.text("mlp_hidden_act", "")
    return Widths(
        hidden_size=hidden_size,
        expert_input_size=reader.integer("moe_latent_size", default=hidden_size),
        intermediate_size=_intermediate_size(reader, hidden_size, traits) if num_dense else 0,
        vocab_size=reader.integer("vocab_size"),
        max_position_embeddings=reader.integer(
            "max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length"
        ),
        tied=traits.tied if tied is None else tied,
        gated_mlp=traits.gated_mlp and activation not in NON_GATED_ACTIVATIONS,
    )


def _intermediate_size(reader: ConfigReader, hidden_size: int, traits: Traits) -> int:
    """Width of the dense MLP; the older non-gated models leave it out and mean four times hidden size."""
    keys = ("intermediate_size_mlp", "intermediate_size", "ffn_hidden_size", "n_inner", "ffn_dim")
    if traits.gated_mlp:
        return reader.integer(*keys)
    return reader.integer(*keys, default=4 * hidden_size)


def _mla(reader: ConfigReader) -> MlaShape | None:
    if not reader.has("kv_lora_rank"):
        return None
    return MlaShape(
        q_lora_rank=reader.optional_integer("q_lora_rank", minimum=1),
        kv_lora_rank=reader.integer("kv_lora_rank"),
        qk_nope_head_dim=reader.integer("qk_nope_head_dim", maximum=MAX_HEADS),
        qk_rope_head_dim=reader.integer("qk_rope_head_dim", maximum=MAX_HEADS),
        v_head_dim=reader.integer("v_head_dim", maximum=MAX_HEADS),
    )


def _linear_mixer(
    reader: ConfigReader, hidden_size: int, kinds: tuple[LayerKind, ...], model_type: str
) -> LinearMixer | None:
    if LayerKind.LINEAR in kinds or model_type == "falcon_h1":
        return read_linear_mixer(reader, hidden_size)
    return None


def _linear_shape(mixer: LinearMixer | None) -> LinearShape | None:
    return LinearShape(parameters_per_layer=mixer.num_parameters) if mixer else None


def _dtype(reader: ConfigReader) -> Dtype:
    """Activation dtype; configs without one (gpt-oss) are bf16."""
    for key in ("dtype", "torch_dtype"):
        value = reader.inherited(key)
        if value is None:
            continue
        spelled = value.removeprefix("torch.") if isinstance(value, str) else ""
        if spelled not in DTYPES:
            reader.fail(key, f"unknown dtype {value!r:.60}; known: {', '.join(DTYPES)}")
        return DTYPES[spelled]
    return Dtype.BF16
