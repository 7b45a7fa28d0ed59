from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsim.calibration import quarantine as q
from kvsim.calibration.facts import DeviceFacts, device_facts
from kvsim.calibration.least_work import least_work, query_key_pairs
from kvsim.calibration.sources import aiconfigurator
from kvsim.calibration.timings import KEY_COLUMNS, SHAPE_COLUMNS, Excluded, Timings
from kvsim.device_catalog import load_device
from kvsim.errors import CalibrationError

KEY = {"device": "h100-sxm", "kernel": "vllm/flash_attn_fa3", "version": "0.24.0", "dtype": "bf16", "kv_dtype": "bf16"}
DECODE = {"batch": 64, "context_tokens": 8192, "num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "window_tokens": 0}
DECODE_BYTES = 2 * 64 * 8192 * 8 * 128 * 2
PREFILL = {
    "batch": 1, "prompt_tokens": 8192, "context_tokens": 8192, "num_heads": 32, "num_kv_heads": 8, "head_dim": 128,
    "window_tokens": 0,
}  # fmt: skip
GEMM = {"m": 8192, "n": 8192, "k": 8192}


def facts(device: str = "h100-sxm") -> DeviceFacts:
    return device_facts(load_device(device).spec)


def table(operation: str, *rows: dict[str, Any], key: dict[str, Any] | None = None) -> Timings:
    """Rows of one operation; each has its shape and ``seconds``, and what differs from KEY."""
    kv = {"kv_dtype": ""} if operation in ("gemm", "all_reduce") else {}
    whole = [KEY | kv | {"operation": operation} | (key or {}) | row for row in rows]
    return Timings(operation, pl.DataFrame(whole).select(*KEY_COLUMNS, *SHAPE_COLUMNS[operation], "seconds"))


def judge(timings: Timings) -> dict[str, int]:
    """Quarantine a table of one device and give counts by reason; every row stays or is counted."""
    result = q.quarantine(timings, facts(str(timings.frame["device"][0])))
    counts = {one.reason: one.count for one in result.excluded}
    assert len(result.frame) + sum(counts.values()) == len(timings.frame)
    assert result.frame.columns == timings.frame.columns
    return counts


def at_bandwidth(share: float, moved_bytes: float, device: str = "h100-sxm") -> float:
    return moved_bytes / (share * facts(device).bandwidth_bytes_per_s)


# Rows that no device could have given.


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"seconds": float("nan")}, q.BAD_SECONDS),
        ({"seconds": float("inf")}, q.BAD_SECONDS),
        ({"seconds": 0.0}, q.BAD_SECONDS),
        ({"seconds": -1e-3}, q.BAD_SECONDS),
        ({"seconds": None}, q.BAD_SECONDS),
        ({"kernel": None}, q.MISSING_VALUE),
        ({"batch": None}, q.MISSING_VALUE),
        ({"batch": 0}, q.IMPOSSIBLE_SHAPE),
        ({"window_tokens": -1}, q.IMPOSSIBLE_SHAPE),
        ({"num_heads": 4}, q.IMPOSSIBLE_SHAPE),
    ],
)
def test_bad_rows_are_counted_and_the_good_one_stays(row: dict[str, Any], reason: str) -> None:
    good = DECODE | {"seconds": 1e-3}
    frame = table("decode_attention", good, good | row).frame
    kept, excluded = q.exclude_bad_rows(frame, "decode_attention")
    assert kept["seconds"].to_list() == [1e-3]
    assert [(one.reason, one.count) for one in excluded] == [(reason, 1)]


def test_a_prompt_longer_than_what_it_reads_is_no_shape() -> None:
    frame = table("prefill_attention", PREFILL | {"context_tokens": 100, "seconds": 1e-3}).frame
    _, excluded = q.exclude_bad_rows(frame, "prefill_attention")
    assert [one.reason for one in excluded] == [q.IMPOSSIBLE_SHAPE]


def test_an_exclusion_shows_its_first_row() -> None:
    frame = pl.DataFrame({"m": [1, 2, 3]})
    kept, excluded = q.exclude(frame, pl.col("m") > 1, "large", ("m",))
    assert kept["m"].to_list() == [1]
    assert excluded == (Excluded("large", 2, "m=2"),)
    assert q.exclude(frame, pl.col("m") > 9, "large") == (frame, ())


# Above the datasheet.


@pytest.mark.parametrize(
    ("share", "counts"), [(1.04, {}), (1.06, {q.ABOVE_BANDWIDTH: 1}), (2.0, {q.ABOVE_BANDWIDTH: 1})]
)
def test_a_cold_row_above_peak_bandwidth_by_more_than_the_margin(share: float, counts: dict[str, int]) -> None:
    assert judge(table("decode_attention", DECODE | {"seconds": at_bandwidth(share, DECODE_BYTES)})) == counts


def test_a_row_from_cache_may_be_faster_than_memory() -> None:
    row = DECODE | {"batch": 1, "context_tokens": 4096}
    moved = 2 * 4096 * 8 * 128 * 2
    assert moved < facts().cache_bytes
    assert judge(table("decode_attention", row | {"seconds": at_bandwidth(1.6, moved)})) == {}


def test_a_window_caps_the_bytes() -> None:
    row = DECODE | {"window_tokens": 128, "seconds": at_bandwidth(1.3, DECODE_BYTES)}
    assert judge(table("decode_attention", row)) == {}


def test_an_fp8_cache_is_half_as_many_bytes() -> None:
    row = DECODE | {"seconds": at_bandwidth(1.5, DECODE_BYTES)}
    assert judge(table("decode_attention", row, key={"kv_dtype": "fp8"})) == {}


def test_a_format_of_unknown_bytes_is_judged_by_its_arithmetic_alone() -> None:
    key = {"kv_dtype": "turboquant_4bit", "kernel": "kvsim/best"}
    assert judge(table("decode_attention", DECODE | {"seconds": at_bandwidth(3.0, DECODE_BYTES)}, key=key)) == {}
    assert judge(table("decode_attention", DECODE | {"seconds": 1e-9}, key=key)) == {q.ABOVE_FLOPS: 1}


GEMM_FLOPS = 2.0 * 8192**3


@pytest.mark.parametrize(
    ("dtype", "peak", "share", "counts"),
    [
        ("bf16", "bf16", 1.04, {}),
        ("bf16", "bf16", 1.06, {q.ABOVE_FLOPS: 1}),
        ("fp8_block", "fp8", 1.04, {}),
        ("fp8_block", "fp8", 1.06, {q.ABOVE_FLOPS: 1}),
        # A weight-only kernel that multiplies in int8 all the same is no fault (SGLang 0.5.6 on H100: 119 % of bf16).
        ("int8_wo", "bf16", 1.2, {}),
        ("int8_wo", "int8", 1.06, {q.ABOVE_FLOPS: 1}),
    ],
)
def test_gemm_above_the_peak_of_the_fastest_dtype_it_could_use(
    dtype: str, peak: str, share: float, counts: dict[str, int]
) -> None:
    seconds = GEMM_FLOPS / (share * facts().flops_per_s[peak])
    assert judge(table("gemm", GEMM | {"seconds": seconds}, key={"dtype": dtype})) == counts


def test_attention_over_an_fp8_cache_may_multiply_in_fp8() -> None:
    flops = 4.0 * 8192 * 8193 / 2 * 32 * 128
    row = PREFILL | {"seconds": flops / (1.3 * facts().flops_per_s["bf16"])}
    assert judge(table("prefill_attention", row, key={"kv_dtype": "fp8"})) == {}
    assert judge(table("prefill_attention", row)) == {q.ABOVE_FLOPS: 1}


def test_all_reduce_above_the_link() -> None:
    link = facts().link_bytes_per_s
    assert link is not None
    rows = [{"ranks": 8, "message_bytes": 1 << 28, "seconds": (1 << 28) / (share * link)} for share in (0.9, 1.2)]
    assert judge(table("all_reduce", *rows)) == {q.ABOVE_BANDWIDTH: 1}


def test_without_a_link_in_the_datasheet_all_reduce_is_not_judged() -> None:
    assert facts("arc-pro-b60").link_bytes_per_s is None
    row = {"ranks": 4, "message_bytes": 1 << 29, "seconds": 0.044}
    key = {"device": "arc-pro-b60", "kernel": "oneccl/all_reduce"}
    assert judge(table("all_reduce", row, key=key)) == {}


# Known faults.


KNOWN = [
    (q.KEYS_ONLY, "decode_attention", {"kernel": "trtllm/torch_flow", "version": "1.0.0", "device": "a100-sxm-80gb"}),
    (q.KEYS_ONLY, "decode_attention", {"kernel": "trtllm/torch_flow", "version": "1.3.0rc10"}),
    (q.KEYS_ONLY, "decode_attention", {"kernel": "trtllm/torch_flow", "version": "main"}),
    ("L40S SGLang 0.5.12 attention: 260 times the peak bandwidth", "decode_attention",
     {"kernel": "sglang/flashinfer", "version": "0.5.12", "device": "l40s"}),
    ("L40S vLLM 0.14 fp8 prefill: 165 % of peak FLOPS", "prefill_attention",
     {"kernel": "vllm/flash_attn", "version": "0.14.0", "device": "l40s", "kv_dtype": "fp8"}),
    (q.NO_NATIVE_FP8, "decode_attention", {"kernel": "vllm/flash_attn", "device": "arc-pro-b60", "kv_dtype": "fp8"}),
    (q.NO_NATIVE_FP8, "gemm", {"kernel": "vllm/default", "device": "arc-pro-b60", "dtype": "fp8"}),
    (q.FP8_NOT_USED, "mla_decode",
     {"kernel": "trtllm/default", "version": "1.0.0", "device": "l40s", "kv_dtype": "fp8"}),
]  # fmt: skip
INNOCENT = [
    ("decode_attention", {"kernel": "trtllm/torch_flow", "version": "1.3.0rc20"}),
    ("decode_attention", {"kernel": "trtllm/torch_flow", "version": "1.3.0"}),
    ("prefill_attention", {"kernel": "trtllm/torch_flow", "version": "1.0.0", "device": "a100-sxm-80gb"}),
    ("decode_attention", {"kernel": "sglang/flashinfer", "version": "0.5.14", "device": "l40s"}),
    ("decode_attention", {"kernel": "sglang/fa3", "version": "0.5.12"}),
    ("prefill_attention", {"kernel": "vllm/flash_attn", "version": "0.14.0", "device": "l40s"}),
    ("decode_attention", {"kernel": "vllm/flash_attn", "device": "arc-pro-b60"}),
    ("decode_attention", {"kernel": "kvsim/best", "device": "arc-pro-b60", "kv_dtype": "fp8"}),
    ("mla_decode", {"kernel": "trtllm/default", "version": "1.0.0", "device": "a100-sxm-80gb"}),
]
SHAPES: dict[str, dict[str, Any]] = {
    "decode_attention": DECODE | {"seconds": 5e-3}, "prefill_attention": PREFILL | {"seconds": 0.1},
    "gemm": GEMM | {"seconds": 0.1},
    "mla_decode": {"batch": 64, "context_tokens": 8192, "num_heads": 128, "seconds": 5e-3},
}  # fmt: skip


@pytest.mark.parametrize(("reason", "operation", "key"), KNOWN)
def test_rows_that_are_known_to_be_wrong(reason: str, operation: str, key: dict[str, Any]) -> None:
    assert judge(table(operation, SHAPES[operation], key=key)) == {reason: 1}


@pytest.mark.parametrize(("operation", "key"), INNOCENT)
def test_rows_beside_those_stay(operation: str, key: dict[str, Any]) -> None:
    assert judge(table(operation, SHAPES[operation], key=key)) == {}


def test_every_known_fault_has_a_row_that_it_catches() -> None:
    assert {fault.reason for fault in q.KNOWN_FAULTS} == {reason for reason, _, _ in KNOWN}


@pytest.mark.parametrize(
    ("version", "older"),
    [("1.0.0", True), ("1.2.0rc5", True), ("1.3.0rc9", True), ("1.3.0rc20", False), ("1.3.0", False), ("1.10.0", False),
     ("main", True)],
)  # fmt: skip
def test_versions_are_ordered_by_number_and_candidate(version: str, older: bool) -> None:
    assert q.is_older(version, "1.3.0rc20") is older


# Units.


def decode_rows(factor: float, count: int = 20) -> list[dict[str, Any]]:
    rows = [DECODE | {"context_tokens": 512 * (1 + index)} for index in range(count)]
    moved = [DECODE_BYTES * row["context_tokens"] / 8192 for row in rows]
    return [row | {"seconds": factor * (1e-5 + at_bandwidth(0.8, size))} for row, size in zip(rows, moved, strict=True)]


@pytest.mark.parametrize("factor", [1e3, 1e-3, 1e6])
def test_a_table_in_another_unit_is_an_error(factor: float) -> None:
    with pytest.raises(CalibrationError, match=r"h100-sxm / decode_attention / vllm.*100% of 20 rows .* mixes units"):
        judge(table("decode_attention", *decode_rows(factor)))


def test_a_table_that_mixes_units_is_an_error_and_a_few_odd_rows_are_not() -> None:
    with pytest.raises(CalibrationError, match="50% of 40 rows"):
        judge(table("decode_attention", *decode_rows(1.0), *decode_rows(1e3)))
    assert judge(table("decode_attention", *decode_rows(1.0, 30), *decode_rows(1e4, 2))) == {q.ANOTHER_UNIT: 2}
    assert judge(table("decode_attention", *decode_rows(1.0, 30), *decode_rows(500.0, 2))) == {}


def test_a_row_that_no_cache_explains_is_in_another_unit() -> None:
    small = DECODE | {"batch": 1, "context_tokens": 16, "seconds": 1e-5}
    assert judge(table("decode_attention", *[small] * 9, small | {"seconds": 1e-8})) == {q.ANOTHER_UNIT: 1}


@pytest.mark.parametrize("factor", [1.0, 30.0])
def test_a_slow_kernel_is_no_other_unit(factor: float) -> None:
    assert judge(table("decode_attention", *decode_rows(factor))) == {}


def test_rows_known_to_be_wrong_do_not_make_a_unit_error() -> None:
    key = {"kernel": "sglang/flashinfer", "version": "0.5.12", "device": "l40s"}
    assert sum(judge(table("decode_attention", *decode_rows(1e-3), key=key)).values()) == 20


# Few rows, and the sum of it.


def test_keys_with_too_few_rows() -> None:
    rows = [GEMM | {"m": m, "seconds": 1.0} for m in range(1, 11)]
    timings = table("gemm", *rows, GEMM | {"seconds": 1.0, "dtype": "fp8"})
    small = q.exclude_small_keys(timings, 10)
    assert (len(small.frame), [(one.reason, one.count) for one in small.excluded]) == (10, [(q.TOO_FEW_ROWS, 1)])
    assert q.exclude_small_keys(timings, 1).excluded == ()


def test_what_was_excluded_before_stays_counted_and_reasons_add_up() -> None:
    rows = [DECODE | {"seconds": at_bandwidth(2.0, DECODE_BYTES), "kv_dtype": kv} for kv in ("bf16", "fp16")]
    timings = replace(table("decode_attention", *rows), excluded=(Excluded("before", 3), Excluded("before", 2)))
    found = q.quarantine(timings, facts()).excluded
    assert [(one.reason, one.count) for one in found] == [("before", 5), (q.ABOVE_BANDWIDTH, 2)]


def test_a_table_without_rows_stays_as_it_is() -> None:
    timings = Timings("gemm", table("gemm", GEMM | {"seconds": 1.0}).frame.clear(), (Excluded("before", 3),))
    assert q.quarantine(timings, facts()) is timings


@given(
    share=st.floats(0.05, 3.0), batch=st.integers(1, 512), context=st.integers(1, 100_000), group=st.integers(1, 16),
    window=st.sampled_from([0, 128]),
)  # fmt: skip
def test_every_row_stays_or_is_counted_and_only_above_the_roofline(
    share: float, batch: int, context: int, group: int, window: int
) -> None:
    shape = {
        "batch": batch, "context_tokens": context, "num_heads": 8 * group, "num_kv_heads": 8, "head_dim": 128,
        "window_tokens": window,
    }  # fmt: skip
    work = least_work("decode_attention", {name: np.array([float(v)]) for name, v in shape.items()}, KEY, facts())
    counts = judge(table("decode_attention", shape | {"seconds": 2e-6 + float(work.seconds()[0]) / share}))
    if share <= q.MARGIN:
        assert counts == {}


# The least work.


@given(prompt=st.integers(1, 60), cached=st.integers(0, 60), window=st.integers(0, 140))
def test_pairs_are_those_that_a_loop_counts(prompt: int, cached: int, window: int) -> None:
    seen = [cached + index + 1 for index in range(prompt)]
    counted = sum(min(tokens, window) if window else tokens for tokens in seen)
    arrays = (np.array([float(value)]) for value in (prompt, prompt + cached, window))
    assert query_key_pairs(*arrays)[0] == counted


@pytest.mark.parametrize("operation", list(SHAPE_COLUMNS))
def test_every_operation_has_a_least_work(operation: str) -> None:
    shape = {name: np.array([8.0, 16.0]) for name in SHAPE_COLUMNS[operation]}
    work = least_work(operation, shape, KEY | {"kv_dtype": "bf16"}, facts())
    assert (work.seconds() > 0).all()


# The shared measurements.


MEASURED = {
    "a100_sxm": {q.KEYS_ONLY: 4439, q.FP8_NOT_USED: 2144},
    "h100_sxm": {q.ABOVE_BANDWIDTH: 6},
    "b60": {q.NO_NATIVE_FP8: 57798},
}


@pytest.mark.parametrize("device", list(MEASURED))
def test_what_the_measured_tables_lose(kernel_timings: Path, device: str) -> None:
    """The tables of aiconfigurator-core 0.12.0 (NVIDIA, Apache-2.0): nothing is lost but these."""
    operations = [name for name in SHAPE_COLUMNS if name != "kernel"]
    counts: dict[str, int] = {}
    for timings in aiconfigurator.read(kernel_timings / device, operations=operations):
        if len(timings.frame):
            for reason, count in judge(replace(timings, excluded=())).items():
                counts[reason] = counts.get(reason, 0) + count
    assert counts == MEASURED[device]
