"""Spellings: vLLM's, kvpress's and the papers'."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsim.compression import STRATEGIES, Compression, describe_strategy, parse_compression
from kvsim.errors import InvalidSpec, KvsimError, UnknownName


def test_at_least_twenty_named_strategies_each_described_and_canonical() -> None:
    assert len(STRATEGIES) >= 20
    assert len(set(STRATEGIES)) == len(STRATEGIES)
    for name in STRATEGIES:
        assert parse_compression(name).name == name
        line = describe_strategy(name)
        assert line
        assert "\n" not in line


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        ("auto", "native"), ("bf16", "native"), ("bfloat16", "native"), ("float16", "native"), ("native", "native"),
        ("fp8_e4m3", "fp8"), ("FP8", "fp8"), ("kivi_2", "kivi-2"), ("KIVI-4", "kivi-4"), ("palu", "low_rank"),
        ("SnapKVPress", "snapkv"), ("StreamingLLMPress", "streaming_llm"), ("PyramidKVPress", "pyramidkv"),
        ("no_press", "native"), ("fp8+snapkv", "snapkv+fp8"), ("snapkv + fp8", "snapkv+fp8"),
        ("snapkv:0.5", "snapkv"), ("snapkv:0.25", "snapkv:0.25"), ("snapkv:1024", "snapkv:1024"),
        ("h2o:0", "h2o:0.0"), ("streaming_llm:2048", "streaming_llm"), ("streaming_llm:512", "streaming_llm:512"),
        ("quest:1024", "quest"), ("quest:2048+fp8", "quest:2048+fp8"), ("keep_all+native", "native"),
        ("snapkv(budget_tokens=256)", "snapkv:256"), ("snapkv:0.3(window_size=32)", "snapkv:0.3(window_size=32)"),
        ("streaming_llm(num_sink_tokens=8,window_length=100)", "streaming_llm(num_sink_tokens=8,window_length=100)"),
        ("kivi-2(residual_length=64)", "kivi-2(residual_length=64)"), ("Q8_0", "q8_0"), ("q4-0", "q4_0"),
        ("q8_0(value_type=q4_0)", "q8_0/q4_0"), ("q4_0(value_type=q8_0)", "q8_0(key_type=q4_0)"),
        ("q4_0(hadamard=false)", "q4_0(hadamard=false)"), ("fp8_attn_head", "fp8_per_head"),
        ("fp8(scale=calibrated,granularity=head)", "fp8_per_head"), ("fp8(scale=calibrated)", "fp8(scale=calibrated)"),
        ("kv_adaquant:4/2", "kv_adaquant"), ("kv_adaquant:8/4", "kv_adaquant:8/4"),
        ("kv_adaquant(key_bits=8)", "kv_adaquant:8/2"), ("kv-adaquant:2 / 4", "kv_adaquant:2/4"),
    ],
)  # fmt: skip
def test_spellings(written: str, canonical: str) -> None:
    compression = parse_compression(written)
    assert compression.name == canonical
    assert parse_compression(canonical) == compression


@pytest.mark.parametrize(
    ("written", "suggestion"),
    [("snapvk", "snapkv"), ("fp9", "fp8"), ("kivi-3", "kivi-4"), ("turboquant", "turboquant_"), ("snapkv+fp9", "fp8")],
)
def test_unknown_names_come_with_suggestions(written: str, suggestion: str) -> None:
    with pytest.raises(UnknownName, match=suggestion) as caught:
        parse_compression(written)
    assert caught.value.kind == "strategy"


@pytest.mark.parametrize("written", ["", "+", "snapkv+", "snapkv(", "(x=1)"])
def test_malformed_names_are_unknown(written: str) -> None:
    with pytest.raises(UnknownName):
        parse_compression(written)


@pytest.mark.parametrize(
    ("written", "match"),
    [
        ("fp8+kivi-2", "2 encodings"), ("snapkv+h2o", "2 token selections"), ("fp8:2", "takes no value"),
        ("snapkv:1.5", "less than 1"), ("snapkv:-0.1", "greater than or equal"), ("snapkv:nan", "compression_ratio"),
        ("snapkv:32", "smaller than window_size"), ("snapkv(foo=1)", "foo: unknown key"),
        ("snapkv(window_size)", "field=value"), ("quest:1000", "use 992 or 1008"),
        ("streaming_llm:half", "whole number"), ("streaming_llm:4", "leaves no window"),
        ("streaming_llm:64(num_sink_tokens=2)", "window_length by name"),
        ("snapkv(compression_ratio=0.5,budget_tokens=99)", "exactly one"), ("kivi-2(bits=3)", "bits"),
        ("kivi-2(residual_length=100)", "multiple of group_size"), ("kv_adaquant:4", "such as kv_adaquant:4/2"),
        ("kv_adaquant:9/2", "key_bits"), ("kv_adaquant(key_groups=channel,residual_length=9)", "multiple of group_si"),
        ("q8_0(value_type=q6_k)", "value_type"), ("fp8(granularity=head)", "use scale calibrated"),
        ("low_rank(retained_fraction=0)", "greater than 0"),
    ],
)  # fmt: skip
def test_wrong_parameters_say_what_is_allowed(written: str, match: str) -> None:
    with pytest.raises(InvalidSpec, match=match):
        parse_compression(written)


def test_a_selection_without_a_size_is_refused() -> None:
    with pytest.raises(ValueError, match="exactly one of compression_ratio and budget_tokens"):
        Compression.model_validate({"selection": {"kind": "snapkv"}})


def test_description_names_both_halves() -> None:
    line = describe_strategy("snapkv:0.3+kivi-2")
    assert "2404.14469" in line
    assert "2402.02750" in line


@given(st.text(max_size=40))
def test_any_text_gives_a_strategy_or_a_user_error(text: str) -> None:
    with contextlib.suppress(KvsimError):
        parse_compression(text)


@given(
    selection=st.sampled_from(["", "snapkv", "h2o", "pyramidkv"]),
    size=st.one_of(st.integers(64, 10**6), st.floats(0, 1, exclude_max=True)),
    encoding=st.sampled_from(["native", "fp8_e5m2", "kivi-2(residual_length=32)", "low_rank(group_size=2)", "nvfp4"]),
)
def test_names_round_trip(selection: str, size: float, encoding: str) -> None:
    compression = parse_compression(f"{selection}:{size}+{encoding}" if selection else encoding)
    assert parse_compression(compression.name) == compression
    assert Compression.model_validate_json(compression.model_dump_json()) == compression
