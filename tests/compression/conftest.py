"""Models and devices built by hand, so that these tests need no config parser and no device files."""

from __future__ import annotations

from datetime import date

import pytest

from kvsim.specs.base import Dtype
from kvsim.specs.device import (
    BandwidthFact,
    BytesFact,
    DeviceSpec,
    FlopsFact,
    NativeDtypesFact,
    Source,
)
from kvsim.specs.model import LayerGroup, LayerKind, ModelSpec


def _model(name: str, groups: tuple[LayerGroup, ...], num_attention_heads: int) -> ModelSpec:
    return ModelSpec(
        name=name, source="built by hand", architecture="Test", hidden_size=4096,
        num_attention_heads=num_attention_heads, vocab_size=128_256, intermediate_size=14_336,
        max_position_embeddings=131_072, groups=groups, num_parameters=8_000_000_000,
        num_active_parameters=8_000_000_000, num_embedding_parameters=1_000_000_000,
    )  # fmt: skip


def _group(kind: LayerKind, layers: range, heads: int, dim: int, **more: int | bool) -> LayerGroup:
    return LayerGroup.model_validate(
        {"kind": kind, "layers": tuple(layers), "num_kv_heads": heads, "k_head_dim": dim, "v_head_dim": dim, **more}
    )


def _full(name: str, layers: int, heads: int, query_heads: int, dim: int = 128) -> ModelSpec:
    return _model(name, (_group(LayerKind.FULL, range(layers), heads, dim),), query_heads)


_MODELS: dict[str, ModelSpec] = {
    # Published shapes: hub configs of Llama-3.1-8B, Llama-3.3-70B and Qwen3-30B-A3B.
    "llama-3.1-8b": _full("llama-3.1-8b", 32, 8, 32),
    "llama-3.3-70b": _full("llama-3.3-70b", 80, 8, 64),
    "qwen3-30b-a3b": _full("qwen3-30b-a3b", 48, 4, 32),
    "odd-heads": _full("odd-heads", 6, 6, 12, dim=80),
    "sliding": _model(
        "sliding",
        (
            _group(LayerKind.FULL, range(1, 12, 2), 8, 64),
            _group(LayerKind.SLIDING, range(0, 12, 2), 8, 64, window_tokens=128),
        ),
        32,
    ),
    "linear": _model(
        "linear",
        (
            _group(LayerKind.FULL, range(3, 12, 4), 2, 256),
            LayerGroup(kind=LayerKind.LINEAR, layers=tuple(i for i in range(12) if i % 4 != 3), state_bytes=1_048_576),
        ),
        16,
    ),
    "shared": _model(
        "shared",
        (
            _group(LayerKind.FULL, range(6), 4, 128),
            _group(LayerKind.FULL, range(6, 10), 4, 128, shares_kv=True),
        ),
        16,
    ),
    "mla": _model("mla", (_group(LayerKind.FULL, range(8), 1, 576, v_head_dim=0, is_latent=True),), 128),
    "sparse-mla": _model(
        "sparse-mla",
        (
            _group(
                LayerKind.INDEXED, range(8), 1, 576, v_head_dim=0, is_latent=True, index_head_dim=128, index_topk=2048
            ),
        ),
        128,
    ),
}


def _device(name: str, native: tuple[Dtype, ...]) -> DeviceSpec:
    return DeviceSpec(
        name=name, title=name, vendor="test", kind="gpu", architecture="test", confidence="high",
        memory_capacity=BytesFact(value=80 * 2**30, source="made-up"), memory_kind="HBM",
        memory_bandwidth=BandwidthFact(value=2e12, source="made-up"),
        dense_flops=(FlopsFact(dtype=Dtype.BF16, value=3e14, source="made-up"),),
        native_dtypes=NativeDtypesFact(value=native, source="made-up"),
        sources={"made-up": Source(title="test device", as_of=date(2026, 1, 1))},
    )  # fmt: skip


@pytest.fixture(scope="session")
def models() -> dict[str, ModelSpec]:
    return _MODELS


@pytest.fixture(scope="session")
def fp8_device() -> DeviceSpec:
    """Like an H100: native fp8."""
    return _device("with-fp8", (Dtype.BF16, Dtype.FP8, Dtype.INT8))


@pytest.fixture(scope="session")
def half_device() -> DeviceSpec:
    """Like an A100: no native fp8."""
    return _device("without-fp8", (Dtype.BF16, Dtype.INT8))
