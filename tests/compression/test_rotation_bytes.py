"""Bytes, work and refusals of TurboQuant, QuaRot, RotateKV and KVQuant; figures by hand from their papers' layouts."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsim.compression import parse_compression
from kvsim.compression.base import KvEncoding
from kvsim.compression.encoding.turboquant_paper import TurboQuantPaper
from kvsim.compression.stored import encoded_bytes
from kvsim.errors import InvalidSpec
from kvsim.kernel_catalog import load_compiled_kernels
from kvsim.ops import OpCall
from kvsim.specs.base import Dtype
from kvsim.specs.device import DeviceSpec
from kvsim.specs.model import ModelSpec


def encoding(name: str) -> KvEncoding:
    return parse_compression(name).encoding


# Bytes of K and V of one token, 8 heads of 128 channels (Llama-3.1-8B).
BYTES = {
    "turboquant_mse:4": 8 * 132, "turboquant_mse:3": 8 * 100, "turboquant_mse:2": 8 * 68, "turboquant_mse:1": 8 * 36,
    "turboquant_prod:4": 8 * 134, "turboquant_prod:3": 8 * 102, "turboquant_prod:2": 8 * 70,
    # One bit: keys are QJL's signs with one norm.
    "turboquant_prod:1": 8 * 36,
    # Two parts, two norms each; 32 at 3 bits and 96 at 2 are the paper's example, 2.25 bits by its own formula.
    "turboquant_mse:2.25": 8 * 2 * (12 + 24 + 4), "turboquant_mse:2.5": 8 * 2 * (24 + 16 + 4),
    "turboquant_mse:3.5": 8 * 2 * (32 + 24 + 4),
    "quarot-4": 8 * 2 * (64 + 4), "quarot-3": 8 * 2 * (48 + 4), "quarot-2": 8 * 2 * (32 + 4),
    "rotatekv-2": 8 * 2 * (32 + 4), "rotatekv-4": 8 * 2 * (64 + 4),
    # 11 of 1,024 numbers apart in K and in V, 4 B each; a pointer to those of K; a scale and offset of V.
    "kvquant-4": 8 * 2 * 64 + 2 * 44 + 8, "kvquant-3": 8 * 2 * 48 + 96, "kvquant-2": 8 * 2 * 32 + 96,
}  # fmt: skip


@pytest.mark.parametrize("name", BYTES)
def test_bytes_per_token(name: str, models: dict[str, ModelSpec]) -> None:
    group = models["llama-3.1-8b"].groups[0]
    assert encoding(name).bytes_per_token(group, Dtype.BF16).total_bytes == BYTES[name]


def test_bits_per_element_of_the_published_tables(models: dict[str, ModelSpec]) -> None:
    """KVQuant's nuq4-1%, nuq3-1%, nuq2-1% are 4.33, 3.33 and 2.33 bits in its tables (32 KV heads of 128)."""
    group = models["llama-3.1-8b"].groups[0].model_copy(update={"num_kv_heads": 32})
    for bits in (4, 3, 2):
        stored = encoding(f"kvquant-{bits}").bytes_per_token(group, Dtype.BF16).total_bytes
        assert 8 * stored / 8192 == pytest.approx(bits + 0.33, abs=0.005)


@given(st.integers(8, 64), st.integers(1, 32))
def test_fractional_bits_are_met_exactly(eighths: int, blocks: int) -> None:
    dim, bits = 8 * blocks, eighths / 8
    parts = TurboQuantPaper(algorithm="mse", bits=bits).split(dim)
    assert sum(part.channels for part in parts) == dim
    assert sum(part.channels * part.bits for part in parts) == bits * dim
    assert len(parts) == (1 if bits == int(bits) else 2)


def test_the_papers_example_of_fractional_bits() -> None:
    parts = TurboQuantPaper(algorithm="mse", bits=2.25).split(128)
    assert [tuple(part) for part in parts] == [(32, 3), (96, 2)]
    assert (32 * 3 + 96 * 2) / 128 == 2.25


def test_channel_masks_are_held_once_per_sequence(models: dict[str, ModelSpec]) -> None:
    group = models["llama-3.1-8b"].groups[0]
    assert encoding("turboquant_mse:2.5").fixed_bytes_per_sequence(group, Dtype.BF16) == 8 * 2 * 16
    assert encoding("turboquant_mse:3").fixed_bytes_per_sequence(group, Dtype.BF16) == 0


@pytest.mark.parametrize(("name", "sinks"), [("rotatekv-2", 20), ("kvquant-3", 1), ("kvquant-3(num_sinks=5)", 5)])
def test_sinks_are_native(name: str, sinks: int, models: dict[str, ModelSpec]) -> None:
    group = models["llama-3.1-8b"].groups[0]
    one = encoding(name)
    coded = one.bytes_per_token(group, Dtype.BF16).total_bytes
    assert one.residual_tokens == 0
    assert one.native_tokens == sinks
    assert encoded_bytes(one, group, Dtype.BF16, sinks) == sinks * 4096
    assert encoded_bytes(one, group, Dtype.BF16, 1000) == sinks * 4096 + (1000 - sinks) * coded


def calls(name: str, model: ModelSpec, *, decode: bool) -> dict[str, list[OpCall]]:
    group, one = model.groups[0], encoding(name)
    found: dict[str, list[OpCall]] = {}
    for call in one.decode_ops(group, model) if decode else one.append_ops(group, model):
        found.setdefault(call.name, []).append(call)
    return found


def test_work_of_turboquant(models: dict[str, ModelSpec]) -> None:
    """Dense: 2·D² a vector; Hadamard: D·log2 D; QJL another 2·D² a key and query, and 2·D per key and query head."""
    model = models["llama-3.1-8b"]
    dense, fast = (calls(name, model, decode=True)["rotate_query_and_output"]
                   for name in ("turboquant_mse", "turboquant_mse(rotation=hadamard)"))  # fmt: skip
    assert sum(call.work.flops for call in dense) == 2 * 32 * 2 * 128**2
    assert sum(call.work.vector_flops for call in fast) == 2 * 32 * 128 * 7
    assert sum(call.work.flops for call in calls("turboquant_mse", model, decode=False)["rotate_kv"]) == 16 * 2 * 128**2
    prod = calls("turboquant_prod", model, decode=False)
    assert sum(call.work.flops for call in prod["sketch_residual"]) == 8 * 2 * 128**2
    assert sum(call.work.flops for call in calls("turboquant_prod", model, decode=True)["sketch_query"]) == 64 * 128**2
    group = model.groups[0]
    assert encoding("turboquant_prod").attention_flops_per_token(group, model) == 2 * 128 * 32
    assert encoding("turboquant_mse").attention_flops_per_token(group, model) == 0
    split = calls("turboquant_mse:2.25", model, decode=True)["rotate_query_and_output"]
    assert sum(call.work.flops for call in split) == 2 * 32 * 2 * (32**2 + 96**2)


def test_work_of_quarot_and_of_keys_before_rope(models: dict[str, ModelSpec]) -> None:
    model = models["llama-3.1-8b"]
    group = model.groups[0]
    (rotate,) = calls("quarot-4", model, decode=True)["rotate_query"]
    assert rotate.work.vector_flops == 32 * 128 * 7
    assert calls("rotatekv-2", model, decode=True) == calls("kvquant-3", model, decode=True) == {}
    assert encoding("kvquant-3").attention_flops_per_token(group, model) == 3 * 1024
    assert encoding("rotatekv-2").attention_flops_per_token(group, model) == 3 * 1024 + 1024 * math.log2(512)


@pytest.mark.parametrize(
    ("name", "model_name", "reason"),
    [
        ("turboquant_mse", "mla", "latent vector"),
        ("turboquant_mse(rotation=hadamard)", "odd-heads", "power of two, not 80 channels; use rotation=dense"),
        ("turboquant_mse:2.25(rotation=hadamard)", "llama-3.1-8b", "power of two, not 96 channels"),
        ("quarot-4", "odd-heads", "power of two"),
        ("rotatekv-2", "odd-heads", "power of two"),
        ("kvquant-3", "mla", "latent vector"),
    ],
)
def test_refusals(
    name: str, model_name: str, reason: str, models: dict[str, ModelSpec], fp8_device: DeviceSpec
) -> None:
    assert reason in (encoding(name).check(models[model_name], fp8_device) or "")


def test_a_dense_rotation_takes_any_width(models: dict[str, ModelSpec], fp8_device: DeviceSpec) -> None:
    assert encoding("turboquant_mse:2.5").check(models["odd-heads"], fp8_device) is None
    assert encoding("rotatekv-2").heads_together(6) == 2  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        ("turboquant_mse_4", "turboquant_mse"), ("turboquant_mse_3", "turboquant_mse:3"),
        ("turboquant_prod_2", "turboquant_prod:2"), ("TurboQuant-Prod:3", "turboquant_prod:3"),
        ("turboquant_mse:3.50", "turboquant_mse:3.5"), ("nuq3-1%", "kvquant-3"), ("quarot", "quarot-4"),
        ("rotatekv", "rotatekv-2"), ("snapkv:0.5+turboquant_prod:3", "snapkv+turboquant_prod:3"),
    ],
)  # fmt: skip
def test_spellings(written: str, canonical: str) -> None:
    compression = parse_compression(written)
    assert compression.name == canonical
    assert parse_compression(canonical) == compression


@pytest.mark.parametrize(
    ("written", "match"),
    [
        ("turboquant_mse:x", "number of bits"), ("turboquant_mse:0", "greater than or equal"),
        ("turboquant_mse:2.3", "multiple of 0.125"), ("turboquant_mse:9", "less than or equal"),
        ("turboquant_mse:inf", "bits"), ("turboquant_mse:nan", "bits"), ("turboquant_mse_3:2", "already means"),
        ("kvquant-3(outlier_share=0.5)", "outlier_share"), ("quarot-4(clip_ratio=0)", "clip_ratio"),
    ],
)  # fmt: skip
def test_wrong_parameters_say_what_is_allowed(written: str, match: str) -> None:
    with pytest.raises(InvalidSpec, match=match):
        parse_compression(written)


def test_our_kernels_of_the_paper_are_of_strategies_and_read_their_bytes(models: dict[str, ModelSpec]) -> None:
    """Entries of the kernel catalogue whose strategy is not stated have a format that is the name of one."""
    group = models["llama-3.1-8b"].groups[0]
    entries = [entry for entry in load_compiled_kernels() if (entry.kv_format or "").startswith("turboquant_")]
    paper = [entry for entry in entries if entry.strategy is None and entry.operation == "decode_attention"]
    assert len(paper) == 6
    for entry in paper:
        bytes_per_token = encoding(entry.kv_format or "").bytes_per_token(group, Dtype.BF16).total_bytes
        assert entry.read_bytes_per_unit == pytest.approx(bytes_per_token / 8, abs=0.02)
