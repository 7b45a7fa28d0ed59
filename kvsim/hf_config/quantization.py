"""Weight quantisation: bits per weight with its scales, and which weights it covers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvsim.hf_config.reader import ConfigReader
from kvsim.specs.base import Dtype

KNOWN_METHODS = (
    "awq",
    "bitsandbytes",
    "compressed-tensors",
    "fbgemm_fp8",
    "fp8",
    "gptq",
    "modelopt",
    "modelopt_fp4",
    "mxfp4",
)
FP4_GROUP_BITS = {"nvfp4": 4 + 8 / 16, "mxfp4": 4 + 8 / 32}
"""One fp8 scale per 16 values (NVFP4), one e8m0 scale per 32 (OCP MX)."""
SCALE_BITS = 16
_ATTENTION_MODULE = re.compile(r"layers\.(?P<layer>\d{1,4}|\*)\.\w*attn(?:\*?$|\.(?:q|qkv|q_a|in)_proj)")
"""A whole attention module, or its query projection, which stands for the module."""


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """How quantised linear weights are stored."""

    dtype: Dtype
    bits: float
    """Per weight, scales and zero points included."""
    experts_only: bool = False
    skipped_attention_share: float = 0.0
    """Share of the layers whose attention weights stay in the model's dtype."""


def read_weight_format(reader: ConfigReader, num_layers: int) -> WeightFormat | None:
    """Format of the linear weights, or None where they are in the model's dtype.

    Scales per tensor, channel or token are left out: 32 bits over thousands of weights.
    """
    quantization = reader.mapping("quantization_config") or reader.mapping("compression_config")
    if quantization is None:
        return None
    inner = ConfigReader(quantization, f"{reader.where}: quantization_config")
    method = inner.text("quant_method", "modelopt" if inner.has("quant_algo") else "")
    skipped = _skipped_attention_share(inner, num_layers)
    if method in ("fp8", "fbgemm_fp8"):
        return WeightFormat(Dtype.FP8, 8 + _block_scale_bits(inner), skipped_attention_share=skipped)
    if method == "mxfp4":
        return WeightFormat(Dtype.FP4, FP4_GROUP_BITS["mxfp4"], experts_only=True)
    if method in ("awq", "gptq"):
        dtype, bits = _integer_format(inner, method)
    elif method == "bitsandbytes":
        dtype, bits = _bitsandbytes(inner)
    elif method == "compressed-tensors":
        dtype, bits = _config_groups(inner)
    elif method in ("modelopt", "modelopt_fp4"):
        dtype, bits = _modelopt(inner)
    else:
        inner.fail("quant_method", f"unknown method {method!r}; known: {', '.join(KNOWN_METHODS)}")
    return WeightFormat(dtype, bits, skipped_attention_share=skipped)


def _block_scale_bits(reader: ConfigReader) -> float:
    """fp32 scale per block, as DeepSeek-V3 stores them."""
    block = reader.integers("weight_block_size")
    if block is None:
        return 0.0
    if len(block) != 2 or 0 in block:
        reader.fail("weight_block_size", f"must be two positive numbers (got {list(block)})")
    return 32 / (block[0] * block[1])


def _integer_dtype(reader: ConfigReader, key: str, bits: int) -> Dtype:
    if not 2 <= bits <= 8:
        reader.fail(key, f"must be from 2 to 8 bits (got {bits})")
    return Dtype.INT8 if bits > 4 else Dtype.INT4


def _integer_format(reader: ConfigReader, method: str) -> tuple[Dtype, float]:
    """AWQ and GPTQ: fp16 scale per group, and a packed zero point (GPTQ stores it even when symmetric)."""
    bits = reader.integer("bits", "w_bit")
    dtype = _integer_dtype(reader, "bits", bits)
    group_size = reader.find("group_size", "q_group_size")[1]
    if group_size in (None, -1):
        return dtype, float(bits)
    group_size = reader.integer("group_size", "q_group_size")
    zero_bits = bits if method == "gptq" or reader.flag("zero_point", default=True) else 0
    return dtype, bits + (SCALE_BITS + zero_bits) / group_size


def _bitsandbytes(reader: ConfigReader) -> tuple[Dtype, float]:
    """NF4: fp32 absmax per 64 weights; double quantisation stores it in 8 bits plus fp32 per 256 (arXiv 2305.14314)."""
    if reader.flag("load_in_8bit", default=False):
        return Dtype.INT8, 8.0
    if not reader.flag("load_in_4bit", default=False):
        reader.fail("load_in_4bit", "bitsandbytes needs load_in_4bit or load_in_8bit")
    double = reader.flag("bnb_4bit_use_double_quant", default=False)
    return Dtype.INT4, 4 + (8 / 64 + 32 / (64 * 256) if double else 32 / 64)


def _config_groups(reader: ConfigReader) -> tuple[Dtype, float]:
    """compressed-tensors: every group of modules must store its weights alike."""
    groups = reader.mapping("config_groups")
    if not groups:
        reader.fail("config_groups", "required, but missing or empty")
    formats = {_group_format(reader, name, group) for name, group in groups.items()}
    if len(formats) > 1:
        reader.fail("config_groups", "groups store weights in different formats, which kvsim does not model")
    return formats.pop()


def _group_format(reader: ConfigReader, name: str, group: Any) -> tuple[Dtype, float]:
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        reader.fail("config_groups", f"group {name!r} has no object 'weights'")
    inner = ConfigReader(weights, f"{reader.where}: config_groups.{name}.weights")
    bits = inner.integer("num_bits", maximum=8)
    kind = inner.text("type", "int")
    group_size = inner.optional_integer("group_size")
    if kind == "float" and bits in (4, 8):
        scale_bits = (16 if bits == 8 else 8) / group_size if group_size else 0.0
        return (Dtype.FP8 if bits == 8 else Dtype.FP4), bits + scale_bits
    if kind != "int":
        inner.fail("type", f"unknown weight type {kind!r} of {bits} bits; known: int, float (4 or 8 bits)")
    dtype = _integer_dtype(inner, "num_bits", bits)
    zero_bits = 0 if inner.flag("symmetric", default=True) else bits
    return dtype, bits + ((SCALE_BITS + zero_bits) / group_size if group_size else 0.0)


def _modelopt(reader: ConfigReader) -> tuple[Dtype, float]:
    algorithm = reader.text("quant_algo", "").upper()
    if algorithm == "NVFP4":
        return Dtype.FP4, FP4_GROUP_BITS["nvfp4"]
    if algorithm != "FP8":
        reader.fail("quant_algo", f"unknown algorithm {algorithm!r}; known: FP8, NVFP4")
    return Dtype.FP8, 8.0


def _skipped_attention_share(reader: ConfigReader, num_layers: int) -> float:
    """Share of layers whose attention stays in the model's dtype, by the modules the config excludes."""
    layers: set[int] = set()
    for key in ("modules_to_not_convert", "ignore", "ignored_layers", "exclude_modules"):
        for pattern in reader.strings(key) or ():
            match = _ATTENTION_MODULE.search(pattern)
            if match is None or "vision" in pattern:
                continue
            if not match["layer"].isdigit():
                return 1.0
            layers.add(int(match["layer"]))
    return len(layers & set(range(num_layers))) / num_layers
