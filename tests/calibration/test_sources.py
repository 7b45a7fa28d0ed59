from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from source_tables import CUSTOM, DECODE, GEMM, H100, NCCL, layout, only_row, read_one, reasons

from kvsim.calibration.quarantine import BAD_SECONDS, IMPOSSIBLE_SHAPE, MISSING_VALUE
from kvsim.calibration.sources import aiconfigurator
from kvsim.calibration.timings import KEY_COLUMNS, SHAPE_COLUMNS
from kvsim.device_catalog import load_device
from kvsim.errors import CalibrationError, InvalidSpec, KvsimError, UnknownName

# aiconfigurator: what a row becomes.


def test_a_decode_row_reads_the_cached_tokens_and_the_new_one(tmp_path: Path) -> None:
    assert only_row(read_one(layout(tmp_path, "generation_attention_perf", [DECODE]))) == {
        "device": "h100-sxm", "operation": "decode_attention", "kernel": "vllm/flash_attn_fa3", "version": "0.24.0",
        "dtype": "bf16", "kv_dtype": "fp8", "batch": 64, "context_tokens": 4096, "num_heads": 32, "num_kv_heads": 8,
        "head_dim": 128, "window_tokens": 0, "seconds": pytest.approx(0.21e-3),
    }  # fmt: skip


def test_a_prefill_row_has_new_tokens_and_all_that_they_read(tmp_path: Path) -> None:
    row = DECODE | {"op_name": "context_attention", "isl": 512, "step": 1024, "window_size": 128}
    found = only_row(read_one(layout(tmp_path, "context_attention_perf", [row])))
    assert (found["prompt_tokens"], found["context_tokens"], found["window_tokens"]) == (512, 1536, 128)


def test_the_heads_of_an_mla_row_are_those_of_one_rank_and_repeats_become_their_median(tmp_path: Path) -> None:
    row = {name: value for name, value in DECODE.items() if name not in ("attn_dtype", "window_size")}
    rows = [
        row | {"mla_dtype": "bfloat16", "num_heads": 16, "tp_size": tp, "latency": ms} for tp, ms in ((4, 1), (8, 3))
    ]
    found = only_row(read_one(layout(tmp_path, "generation_mla_perf", rows)))
    assert (found["operation"], found["num_heads"], found["seconds"]) == ("mla_decode", 16, pytest.approx(2e-3))


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("bfloat16", "bf16"), ("fp8_block", "fp8_block"), ("nvfp4", "nvfp4"), ("int4_wo", "int4_wo"), ("sq", "sq")],
)
def test_gemm_keeps_its_formats_apart(tmp_path: Path, theirs: str, ours: str) -> None:
    found = only_row(read_one(layout(tmp_path, "gemm_perf", [GEMM | {"gemm_dtype": theirs}])))
    assert (found["dtype"], found["kv_dtype"], found["kernel"]) == (ours, "", "sglang/sglang")
    assert (found["m"], found["n"], found["k"]) == (16, 4096, 4096)


@pytest.mark.parametrize(
    ("table", "row", "kernel", "message_bytes"),
    [
        ("nccl_perf", NCCL, "nccl/all_reduce", 2 << 20),
        ("nccl_perf", NCCL | {"nccl_dtype": "int8"}, "nccl/all_reduce", 1 << 20),
        ("oneccl_perf", NCCL | {"kernel_source": "oneCCL"}, "oneccl/all_reduce", 2 << 20),
        ("custom_allreduce_perf", CUSTOM, "vllm/custom_graph", 2 << 20),
        ("custom_allreduce_perf", CUSTOM | {"kernel_source": "vLLM_custom_eager"}, "vllm/custom_eager", 2 << 20),
    ],
)
def test_message_sizes_are_elements(
    tmp_path: Path, table: str, row: dict[str, Any], kernel: str, message_bytes: int
) -> None:
    found = only_row(read_one(layout(tmp_path, table, [row])))
    assert (found["kernel"], found["ranks"], found["message_bytes"]) == (kernel, 8, message_bytes)


def test_slashes_in_a_kernel_become_underscores_and_a_build_suffix_goes(tmp_path: Path) -> None:
    row = GEMM | {"kernel_source": "trt_flow_/sq/PLUGIN", "version": "0.20.1.dev3+g20dc1.d2026", "framework": "TRTLLM"}
    found = only_row(read_one(layout(tmp_path, "gemm_perf", [row])))
    assert (found["kernel"], found["version"]) == ("trtllm/trt_flow__sq_plugin", "0.20.1.dev3")


def test_columns_that_older_tables_lack_come_from_the_folders(tmp_path: Path) -> None:
    row = {name: value for name, value in NCCL.items() if name not in ("device", "version", "framework")}
    found = only_row(read_one(layout(tmp_path, "nccl_perf", [row], place="h200_sxm/comm/nccl/2.23")))
    assert (found["device"], found["version"]) == ("h200-sxm", "2.23")


# aiconfigurator: what is left out is counted.


@pytest.mark.parametrize(
    ("table", "row", "reason"),
    [
        ("generation_attention_perf", DECODE | {"beam_width": 4}, aiconfigurator.BEAM_SEARCH),
        ("generation_attention_perf", DECODE | {"isl": 3}, aiconfigurator.SEVERAL_NEW_TOKENS),
        ("nccl_perf", NCCL | {"op_name": "all_gather"}, aiconfigurator.OTHER_COLLECTIVE),
        ("gemm_perf", GEMM | {"device": "NVIDIA H200"}, aiconfigurator.OTHER_DEVICE),
        ("gemm_perf", GEMM | {"latency": 0.0}, BAD_SECONDS),
        ("gemm_perf", GEMM | {"latency": -1.0}, BAD_SECONDS),
        ("gemm_perf", GEMM | {"latency": float("nan")}, BAD_SECONDS),
        ("gemm_perf", GEMM | {"latency": float("inf")}, BAD_SECONDS),
        ("gemm_perf", GEMM | {"m": 0}, IMPOSSIBLE_SHAPE),
        ("gemm_perf", GEMM | {"m": None}, MISSING_VALUE),
        ("generation_attention_perf", DECODE | {"num_heads": 4}, IMPOSSIBLE_SHAPE),
    ],
)
def test_a_row_that_is_left_out_is_counted_by_name(
    tmp_path: Path, table: str, row: dict[str, Any], reason: str
) -> None:
    good = {"generation_attention_perf": DECODE, "nccl_perf": NCCL, "gemm_perf": GEMM}[table]
    timings = read_one(layout(tmp_path, table, [good, row]))
    assert len(timings.frame) == 1
    assert reasons(timings) == {reason: 1}
    alone = read_one(layout(tmp_path / "alone", table, [row] * 3))
    assert alone.frame.is_empty()
    assert reasons(alone) == {reason: 3}


def test_tables_of_other_operations_and_whole_modules_are_counted(tmp_path: Path) -> None:
    layout(tmp_path, "moe_perf", [GEMM] * 3)
    layout(tmp_path, "mla_generation_module_perf", [GEMM] * 2)
    found = {one.operation: reasons(one) for one in aiconfigurator.read(tmp_path)}
    assert found == {"kernel": {aiconfigurator.UNREAD_TABLE: 3}, "mla_decode": {aiconfigurator.WHOLE_MODULE: 2}}


# aiconfigurator: what is chosen.


def test_devices_and_operations_choose_what_is_opened(tmp_path: Path) -> None:
    layout(tmp_path, "generation_attention_perf", [DECODE])
    layout(tmp_path, "gemm_perf", [GEMM], place="h100_sxm/gemm/sglang/0.5.14")
    broken = tmp_path / "b200_sxm" / "gemm" / "sglang" / "0.5.14" / "gemm_perf.parquet"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"not opened")
    assert [one.operation for one in aiconfigurator.read(tmp_path, devices=["h100"])] == ["decode_attention", "gemm"]
    assert [one.operation for one in aiconfigurator.read(tmp_path, ["h100_sxm"], ["gemm"])] == ["gemm"]


def test_a_tree_a_device_folder_and_a_link_read_the_same(tmp_path: Path) -> None:
    path = layout(tmp_path / "tree", "generation_attention_perf", [DECODE])
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "h100_sxm").symlink_to(tmp_path / "tree" / "h100_sxm", target_is_directory=True)
    frames = [
        read_one(place).frame for place in (tmp_path / "tree", tmp_path / "tree/h100_sxm", path, tmp_path / "linked")
    ]
    assert all(frame.equals(frames[0]) for frame in frames)
    (tmp_path / "tree" / "loop").symlink_to(tmp_path / "tree", target_is_directory=True)
    assert len(aiconfigurator.read(tmp_path / "tree")) == 1


def test_copies_of_a_table_under_several_versions_become_one(tmp_path: Path) -> None:
    for version in ("2.23", "2.27", "2.29.2"):
        layout(tmp_path, "nccl_perf", [NCCL], place=f"h100_sxm/comm/nccl/{version}")
    timings = read_one(tmp_path)
    assert len(timings.frame) == 1
    assert [origin.path for origin in timings.origins] == [
        f"h100_sxm/comm/nccl/{version}/nccl_perf.parquet" for version in ("2.23", "2.27", "2.29.2")
    ]


def test_the_package_is_found_without_importing_it_and_missed_clearly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / aiconfigurator.PACKAGE
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(CalibrationError, match="without systems/data"):
        aiconfigurator.installed_folder()
    (package / "systems" / "data").mkdir(parents=True)
    assert aiconfigurator.installed_folder() == package / "systems" / "data"
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(CalibrationError, match="not installed: pip install"):
        aiconfigurator.installed_folder()


# aiconfigurator: what cannot be read says where, what and what is allowed.


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"gemm_dtype": "fp6"}, ["'gemm_dtype'", "'fp6' is not allowed", "bfloat16"]),
        ({"device": "NVIDIA H1000"}, ["'device'", "unknown device 'NVIDIA H1000'", "did you mean"]),
        ({"m": "sixteen"}, ["'m'", "numbers are needed", "'sixteen'"]),
        ({"m": 1.5}, ["'m'", "whole numbers are needed", "1.5"]),
        ({"m": 1e300}, ["'m'", "whole numbers are needed", "1e+300"]),
        ({"latency": "fast"}, ["'latency'", "numbers are needed"]),
        ({"kernel_source": 3}, ["'kernel_source'", "text is needed"]),
    ],
)
def test_a_wrong_value_names_file_column_value_and_what_is_allowed(
    tmp_path: Path, row: dict[str, Any], says: list[str]
) -> None:
    path = layout(tmp_path, "gemm_perf", [GEMM | row])
    with pytest.raises(KvsimError) as caught:
        aiconfigurator.read(tmp_path)
    assert all(text in str(caught.value) for text in (str(path), *says)), caught.value
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("column", ["m", "latency", "gemm_dtype", "kernel_source", "framework"])
def test_a_missing_column_names_those_that_are_needed(tmp_path: Path, column: str) -> None:
    path = layout(tmp_path, "gemm_perf", [{name: value for name, value in GEMM.items() if name != column}])
    with pytest.raises(InvalidSpec, match=rf"{path}: column '{column}' is missing; this table needs .*{column}"):
        aiconfigurator.read(tmp_path)


def test_a_truncated_file_an_empty_folder_and_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"holds no Parquet table \(<device>"):
        aiconfigurator.read(tmp_path)
    with pytest.raises(CalibrationError, match="no such file or folder"):
        aiconfigurator.read(tmp_path / "nowhere")
    path = layout(tmp_path, "gemm_perf", [GEMM])
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InvalidSpec, match=rf"{path}: cannot be read as Parquet"):
        aiconfigurator.read(tmp_path)


def test_unknown_choices_suggest_the_nearest(tmp_path: Path) -> None:
    layout(tmp_path, "gemm_perf", [GEMM])
    with pytest.raises(UnknownName, match="did you mean 'decode_attention'"):
        aiconfigurator.read(tmp_path, operations=["decode_atention"])
    with pytest.raises(UnknownName, match="unknown device 'h1000'"):
        aiconfigurator.read(tmp_path, devices=["h1000"])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(
        st.tuples(
            st.integers(1, 2048), st.integers(0, 131071), st.integers(1, 16), st.sampled_from([1, 2, 4]),
            st.sampled_from([64, 128, 256]), st.sampled_from([0, 128]), st.floats(1e-3, 1e3),
        ),
        min_size=1, max_size=20, unique_by=lambda row: row[:6],
    )
)  # fmt: skip
def test_any_table_of_distinct_rows_comes_back_whole(tmp_path: Path, rows: list[tuple[Any, ...]]) -> None:
    names = ("batch_size", "step", "num_key_value_heads", "group", "head_dim", "window_size", "latency")
    written = [dict(zip(names, row, strict=True)) for row in rows]
    table = [DECODE | row | {"num_heads": row["num_key_value_heads"] * row["group"]} for row in written]
    frame = read_one(layout(tmp_path, "generation_attention_perf", table)).frame
    assert frame.columns == [*KEY_COLUMNS, *SHAPE_COLUMNS["decode_attention"], "seconds"]
    assert set(frame.select(SHAPE_COLUMNS["decode_attention"]).rows()) == {
        (b, step + 1, kv_heads * group, kv_heads, dim, window) for b, step, kv_heads, group, dim, window, _ in rows
    }
    assert sorted(frame["seconds"]) == pytest.approx(sorted(row[-1] * 1e-3 for row in rows))


# Devices.


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("h100_sxm", "h100-sxm"), (H100, "h100-sxm"), ("b60", "arc-pro-b60"), ("l40s", "l40s"), ("NVIDIA L40S", "l40s"),
        ("Intel(R) Arc(TM) Pro B60 Graphics", "arc-pro-b60"), ("Intel(R) Graphics [0xe211]", "arc-pro-b60"),
        ("a100_sxm", "a100-sxm-80gb"), ("NVIDIA A100-SXM4-80GB", "a100-sxm-80gb"), ("NVIDIA B200", "b200-sxm"),
        ("b200_sxm", "b200-sxm"), ("h20", "h20"), ("h800", "h800"), ("RTX4090", "rtx-4090"), ("gb200", "gb200"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"), ("NVIDIA B300 SXM6 AC", "b300-sxm"), ("gb300", "gb300"),
        ("rtx_pro_6000_server", "rtx-pro-6000"),
    ],
)  # fmt: skip
def test_device_names_of_the_tools_are_ours(name: str, device: str) -> None:
    assert load_device(name).spec.name == device
