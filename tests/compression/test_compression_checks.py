"""Pairs that cannot go together are refused with the reason."""

from __future__ import annotations

import pytest

from kvsim.compression import Compression, parse_compression
from kvsim.compression.encoding.fp8 import Fp8
from kvsim.specs.base import Dtype
from kvsim.specs.device import DeviceSpec
from kvsim.specs.model import ModelSpec


def test_fp8_compute_needs_native_fp8(
    models: dict[str, ModelSpec], half_device: DeviceSpec, fp8_device: DeviceSpec
) -> None:
    model = models["llama-3.1-8b"]
    compute = parse_compression("fp8(attention_compute_dtype=fp8)")
    reason = compute.check(model, half_device)
    assert reason is not None
    assert "without-fp8" in reason
    assert "auto or bf16" in reason
    assert compute.check(model, fp8_device) is None
    assert parse_compression("fp8").check(model, half_device) is None


def test_fp8_attention_dtype(models: dict[str, ModelSpec], half_device: DeviceSpec, fp8_device: DeviceSpec) -> None:
    model = models["llama-3.1-8b"]
    assert Fp8().attention_dtype(model, fp8_device) is Dtype.FP8
    assert Fp8().attention_dtype(model, half_device) is Dtype.BF16
    assert Fp8(dtype="e5m2").attention_dtype(model, fp8_device) is Dtype.BF16
    assert Fp8(attention_compute_dtype="bf16").attention_dtype(model, fp8_device) is Dtype.BF16
    assert parse_compression("kivi-2").encoding.attention_dtype(model, fp8_device) is Dtype.BF16


def test_e5m2_has_no_fp8_attention(models: dict[str, ModelSpec], fp8_device: DeviceSpec) -> None:
    reason = parse_compression("fp8_e5m2(attention_compute_dtype=fp8)").check(models["llama-3.1-8b"], fp8_device)
    assert reason is not None
    assert "e4m3" in reason


def test_fp8_per_token_head_needs_native_fp8(models: dict[str, ModelSpec], half_device: DeviceSpec) -> None:
    reason = parse_compression("fp8_per_token_head").check(models["llama-3.1-8b"], half_device)
    assert reason is not None
    assert "int8_per_token_head" in reason


@pytest.mark.parametrize(
    "name", ["int8_per_token_head", "kivi-2", "turboquant_4bit_nc", "low_rank", "snapkv", "h2o", "quest", "pyramidkv"]
)
def test_latent_models_refuse_per_head_methods(name: str, models: dict[str, ModelSpec], fp8_device: DeviceSpec) -> None:
    reason = parse_compression(name).check(models["mla"], fp8_device)
    assert reason is not None
    assert "MLA" in reason
    assert "mla" in reason


@pytest.mark.parametrize("name", ["native", "fp8", "nvfp4", "mxfp4"])
def test_latent_models_take_per_element_formats(
    name: str, models: dict[str, ModelSpec], fp8_device: DeviceSpec
) -> None:
    assert parse_compression(name).check(models["mla"], fp8_device) is None


def test_sparse_attention_has_an_fp8_layout_only(models: dict[str, ModelSpec], fp8_device: DeviceSpec) -> None:
    assert parse_compression("fp8").check(models["sparse-mla"], fp8_device) is None
    for name in ("nvfp4", "mxfp4"):
        reason = parse_compression(name).check(models["sparse-mla"], fp8_device)
        assert reason is not None
        assert "not published" in reason
    group = models["sparse-mla"].groups[0].model_copy(update={"k_head_dim": 320})
    odd = models["sparse-mla"].model_copy(update={"groups": (group,)})
    reason = parse_compression("fp8").check(odd, fp8_device)
    assert reason is not None
    assert "320" in reason


def test_shapes_that_a_method_cannot_cut(models: dict[str, ModelSpec], fp8_device: DeviceSpec) -> None:
    odd = models["odd-heads"]
    rotated = parse_compression("turboquant_3bit_nc").check(odd, fp8_device)
    assert rotated is not None
    assert "power of two" in rotated
    assert parse_compression("turboquant_k8v4").check(odd, fp8_device) is None
    shared_basis = parse_compression("low_rank").check(odd, fp8_device)
    assert shared_basis is not None
    assert "6 KV heads" in shared_basis


def test_selections_need_a_full_attention_layer(models: dict[str, ModelSpec], fp8_device: DeviceSpec) -> None:
    for name in ("sliding", "linear", "shared"):
        assert parse_compression("snapkv").check(models[name], fp8_device) is None
    assert Compression().check(models["mla"], fp8_device) is None


def test_check_reports_the_first_reason(models: dict[str, ModelSpec], fp8_device: DeviceSpec) -> None:
    reason = parse_compression("snapkv+kivi-2").check(models["mla"], fp8_device)
    assert reason is not None
    assert reason.startswith("snapkv")


def test_ggml_blocks_must_divide_the_head(models: dict[str, ModelSpec], fp8_device: DeviceSpec) -> None:
    group = models["llama-3.1-8b"].groups[0].model_copy(update={"k_head_dim": 80})
    odd = models["llama-3.1-8b"].model_copy(update={"groups": (group,)})
    reason = parse_compression("q8_0").check(odd, fp8_device)
    assert reason is not None
    assert "-ctk q8_0" in reason
    assert "the 80 of a head" in reason
    assert parse_compression("q8_0(key_type=f16)").check(odd, fp8_device) is None
    latent = parse_compression("q8_0").check(models["mla"], fp8_device)
    assert latent is not None
    assert "MLA" in latent
