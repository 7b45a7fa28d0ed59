"""Linear-attention and state-space mixers: bytes of state per sequence, and parameters of one layer."""

from __future__ import annotations

from dataclasses import dataclass

from kvsim.hf_config.reader import ConfigReader

_STATE_DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "auto": 2}
CONV_STATE_BYTES = 2


@dataclass(frozen=True, slots=True)
class LinearMixer:
    """One layer's state in bytes per sequence, and its parameters."""

    state_bytes: int
    num_parameters: int


def read_linear_mixer(reader: ConfigReader, hidden_size: int) -> LinearMixer:
    """Read the mixer that the config's keys describe; raise InvalidSpec where none of the known sets is there."""
    if reader.has("linear_num_value_heads"):
        return _gated_delta_net(reader, hidden_size)
    if reader.has("mamba_num_heads", "mamba_n_heads"):
        return _mamba2(reader, hidden_size)
    if not reader.has("mamba_d_state"):
        reader.fail(
            "linear_num_value_heads",
            "missing, though some layers are linear attention or state space; known key sets: linear_num_value_heads "
            "(Gated DeltaNet), mamba_num_heads or mamba_n_heads (Mamba-2), mamba_d_state (Mamba)",
        )
    return _mamba1(reader, hidden_size)


def _state_element_bytes(reader: ConfigReader) -> int:
    key, value = reader.find("mamba_ssm_cache_dtype", "mamba_ssm_dtype")
    if value is None:
        return 2
    if not isinstance(value, str) or value not in _STATE_DTYPE_BYTES:
        reader.fail(key, f"unknown state dtype {value!r}; known: {', '.join(_STATE_DTYPE_BYTES)}")
    return _STATE_DTYPE_BYTES[value]


def _gated_delta_net(reader: ConfigReader, hidden_size: int) -> LinearMixer:
    """Gated DeltaNet of Qwen3-Next and Qwen3.5 (arXiv 2412.06464): one key dim by value dim state per value head."""
    num_key_heads = reader.integer("linear_num_key_heads", maximum=65536)
    num_value_heads = reader.integer("linear_num_value_heads", maximum=65536)
    key_head_dim = reader.integer("linear_key_head_dim", maximum=65536)
    value_head_dim = reader.integer("linear_value_head_dim", maximum=65536)
    kernel = reader.integer("linear_conv_kernel_dim", maximum=1024)
    key_dim, value_dim = num_key_heads * key_head_dim, num_value_heads * value_head_dim
    conv_dim = 2 * key_dim + value_dim
    state_bytes = num_value_heads * key_head_dim * value_head_dim * _state_element_bytes(reader)
    projections = hidden_size * (2 * key_dim + 2 * value_dim + 2 * num_value_heads) + value_dim * hidden_size
    small = conv_dim * kernel + 2 * num_value_heads + value_head_dim
    return LinearMixer(state_bytes + conv_dim * (kernel - 1) * CONV_STATE_BYTES, projections + small)


def _mamba2(reader: ConfigReader, hidden_size: int) -> LinearMixer:
    """Mamba-2 (arXiv 2405.21060) as in Nemotron-H, Bamba, Granite 4 and Falcon-H1."""
    num_heads = reader.integer("mamba_num_heads", "mamba_n_heads", maximum=65536)
    head_dim = reader.optional_integer("mamba_head_dim", "mamba_d_head", minimum=1, maximum=65536)
    expand = reader.integer("expand", "mamba_expand", default=2, maximum=64)
    inner = reader.optional_integer("mamba_d_ssm", minimum=1) or num_heads * (
        head_dim or expand * hidden_size // num_heads
    )
    num_groups = reader.integer("n_groups", "mamba_n_groups", maximum=65536)
    state_size = reader.integer("ssm_state_size", "mamba_d_state", maximum=65536)
    kernel = reader.integer("conv_kernel", "mamba_d_conv", maximum=1024)
    conv_dim = inner + 2 * num_groups * state_size
    state_bytes = inner * state_size * _state_element_bytes(reader) + conv_dim * (kernel - 1) * CONV_STATE_BYTES
    projections = hidden_size * (inner + conv_dim + num_heads) + inner * hidden_size
    return LinearMixer(state_bytes, projections + conv_dim * (kernel + 1) + 3 * num_heads + inner)


def _mamba1(reader: ConfigReader, hidden_size: int) -> LinearMixer:
    """Mamba (arXiv 2312.00752) as in Jamba."""
    inner = reader.integer("mamba_expand", default=2, maximum=64) * hidden_size
    state_size = reader.integer("mamba_d_state", maximum=65536)
    kernel = reader.integer("mamba_d_conv", maximum=1024)
    rank = _dt_rank(reader, hidden_size)
    state_bytes = inner * state_size * _state_element_bytes(reader) + inner * (kernel - 1) * CONV_STATE_BYTES
    projections = 3 * hidden_size * inner + inner * (rank + 2 * state_size) + rank * inner
    small = inner * (kernel + 3) + inner * state_size + rank + 2 * state_size
    return LinearMixer(state_bytes, projections + small)


def _dt_rank(reader: ConfigReader, hidden_size: int) -> int:
    if reader.find("mamba_dt_rank")[1] in (None, "auto"):
        return -(-hidden_size // 16)
    return reader.integer("mamba_dt_rank")
