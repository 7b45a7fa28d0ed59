from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from source_tables import GEMM, layout, measured_row, only_row, reasons, write_rows

from kvsim.calibration import sources
from kvsim.calibration.sources import aiconfigurator, infersim, kvsim_rows, llmservingsim, vidur
from kvsim.errors import CalibrationError, InvalidSpec, KvsimError, UnknownName

# InferSim, Vidur, LLMServingSim.


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_infersim_takes_heads_from_the_name_and_counts_what_it_does_not_read(tmp_path: Path) -> None:
    header = "dtype,kv_dtype,batch_size,kv_len,latency_us,mfu\n"
    write(tmp_path / "mha/decode/h20/32-8-128.csv", f"{header}bf16,fp8,16,4096,86.34,0.08\n")
    write(tmp_path / "mha/decode/h20/64-2-128.csv", "bf16,bf16,1,1024,25.5,0.009\nbf16,bf16,1,4096,84.7,0.011\n")
    write(tmp_path / "mla/decode/h800/128-256-64.csv", f"{header}bf16,bf16,1,1024,20.9,0.01\n")
    write(tmp_path / "mla/prefill/h800/128-128-64.csv", "dtype,seq_len,latency_us,mfu\nbf16,1024,116.88,0.37\n")
    write(tmp_path / "gemm/h800/data.csv", "m,k,n,latency_us,mfu\n16,7168,1536,16.4,0.01\n")
    write(tmp_path / "gdn/decode/h20/4-16-128-32-128.csv", "batch_size,conv,gdn_update\n1,2,3\n")
    found = infersim.read(tmp_path)
    rows = {row["operation"]: row for one in found for row in one.frame.rows(named=True)}
    assert rows["decode_attention"] == {
        "device": "h20", "operation": "decode_attention", "kernel": "infersim/flashinfer", "version": "unstated",
        "dtype": "bf16", "kv_dtype": "fp8", "batch": 16, "context_tokens": 4096, "num_heads": 32, "num_kv_heads": 8,
        "head_dim": 128, "window_tokens": 0, "seconds": pytest.approx(86.34e-6),
    }  # fmt: skip
    assert (rows["gemm"]["n"], rows["gemm"]["k"], rows["gemm"]["dtype"]) == (1536, 7168, "fp8_block")
    assert (rows["mla_prefill"]["prompt_tokens"], rows["mla_prefill"]["context_tokens"]) == (1024, 1024)
    counted = [(one.reason, one.count) for timings in found for one in timings.excluded]
    assert sorted(counted) == sorted([(infersim.NO_HEADER, 2), (infersim.OTHER_LATENT, 1), (infersim.UNREAD_TABLE, 1)])


def test_infersim_says_what_a_file_name_must_be(tmp_path: Path) -> None:
    write(tmp_path / "mha/decode/h20/heads.csv", "dtype,kv_dtype,batch_size,kv_len,latency_us\nbf16,bf16,1,1,1\n")
    with pytest.raises(InvalidSpec, match=r"must be three sizes, such as 32-8-128\.csv"):
        infersim.read(tmp_path)


VIDUR_HEADER = "num_workers,devices_per_node,size,collective,time_stats.all_reduce.median\n"


def test_vidur_sizes_are_bytes_and_nodes_are_not_crossed(tmp_path: Path) -> None:
    rows = "8,8,67108864,all_reduce,0.322\n16,8,67108864,all_reduce,7.2\n"
    write(tmp_path / "h100_dgx/all_reduce.csv", VIDUR_HEADER + rows)
    (timings,) = vidur.read(tmp_path)
    row = only_row(timings)
    assert (row["device"], row["kernel"], row["ranks"]) == ("h100-sxm", "vidur/nccl_dgx", 8)
    assert (row["message_bytes"], row["seconds"]) == (67108864, pytest.approx(0.322e-3))
    assert reasons(timings) == {vidur.ACROSS_NODES: 1}
    write(tmp_path / "h100_ring/all_reduce.csv", VIDUR_HEADER + rows)
    with pytest.raises(UnknownName, match="unknown topology 'h100_ring'"):
        vidur.read(tmp_path)


META = "gpu: NVIDIA GeForce RTX 4090\nvllm_version: 0.19.0\nvariant: bf16\nmodel: meta-llama/Llama-3.1-8B\n"


def profile(folder: Path, meta: str = META, degree: str = "tp2") -> Path:
    place = folder / "RTX4090/meta-llama/Llama-3.1-8B/bf16"
    write(place / "meta.yaml", meta)
    header = "prefill_chunk,kv_prefill,n_decode,kv_decode,time_us\n"
    write(place / degree / "attention.csv", f"{header}0,0,4,1023,20.0\n64,16,0,0,30.0\n64,0,4,16,40.0\n")
    write(place / degree / "dense.csv", "layer,tokens,time_us\nqkv_proj,8,50.0\ngate_up_proj,8,90.0\nact_fn,8,3.0\n")
    return folder


def test_llmservingsim_splits_attention_and_gives_linear_layers_their_shape(tmp_path: Path) -> None:
    found = {one.operation: one for one in llmservingsim.read(profile(tmp_path))}
    decode = only_row(found["decode_attention"])
    assert (decode["device"], decode["version"], decode["batch"]) == ("rtx-4090", "0.19.0", 4)
    assert (decode["context_tokens"], decode["num_heads"], decode["num_kv_heads"]) == (1024, 16, 4)
    prefill = only_row(found["prefill_attention"])
    assert (prefill["prompt_tokens"], prefill["context_tokens"]) == (64, 80)
    gemms = set(found["gemm"].frame.select("m", "n", "k").rows())
    assert gemms == {(8, 3072, 4096), (8, 14336, 4096)}
    counted = {reason: count for one in found.values() for reason, count in reasons(one).items()}
    assert counted == {llmservingsim.MIXED_BATCH: 1, llmservingsim.NO_LAW: 1}


def test_llmservingsim_leaves_out_models_whose_layers_are_of_several_kinds(tmp_path: Path) -> None:
    profile(tmp_path, META.replace("meta-llama/Llama-3.1-8B", "google/gemma-3-4b-it"))
    (timings,) = llmservingsim.read(tmp_path)
    assert reasons(timings) == {llmservingsim.OTHER_MODEL: 6}


@pytest.mark.parametrize(
    ("meta", "says"),
    [
        (META.replace("RTX 4090", "RTX 4099"), "meta.yaml: gpu: unknown device"),
        (META.replace("Llama-3.1-8B", "Llama-9-8B"), "meta.yaml: model: unknown model 'meta-llama/Llama-9-8B'"),
        (META.replace("bf16", "awq"), "meta.yaml: variant: 'awq' is not allowed; allowed: bf16, fp16"),
        (META.replace("0.19.0", "19"), r"meta.yaml: vllm_version: text is needed \(got 19\)"),
    ],
)
def test_llmservingsim_says_what_is_wrong_with_a_profile(tmp_path: Path, meta: str, says: str) -> None:
    with pytest.raises(KvsimError, match=says):
        llmservingsim.read(profile(tmp_path, meta))


# kvsim's own rows.


def test_own_rows_of_decode_attention_are_named_by_form_and_format(tmp_path: Path) -> None:
    write_rows(tmp_path, [measured_row()])
    (timings,) = kvsim_rows.read(tmp_path)
    assert only_row(timings) == {
        "device": "h100-sxm", "operation": "decode_attention", "kernel": "kvsim/best", "version": "abababababab",
        "dtype": "bf16", "kv_dtype": "fp8_e4m3", "batch": 64, "context_tokens": 4096, "num_heads": 32,
        "num_kv_heads": 8, "head_dim": 128, "window_tokens": 0, "seconds": pytest.approx(2.1e-4),
    }  # fmt: skip


def test_own_rows_of_other_variants_are_shaped_by_what_they_move(tmp_path: Path) -> None:
    stream = {"variant": "microbenchmark/stream_read/best", "operation": "microbenchmark/stream_read", "kv_format": ""}
    latent = {"dtype": "bfloat16", "num_query_heads": 128, "num_kv_heads": 1, "head_dim": 576, "context_lens": [4096]}
    mla = {"variant": "decode_attention/mla/best", "kv_format": "mla", "shape": latent, "case": "mla"}
    write_rows(tmp_path, [measured_row(**stream, shape={"size": 1}), measured_row(**mla)])
    found = {one.operation: only_row(one) for one in kvsim_rows.read(tmp_path)}
    assert found["kernel"]["kernel"] == "microbenchmark/stream_read/best"
    assert (found["kernel"]["read_bytes"], found["kernel"]["units"]) == (536870912, 2097152)
    assert (found["mla_decode"]["batch"], found["mla_decode"]["num_heads"]) == (1, 128)


def test_of_own_repeats_graphs_and_the_fastest_tiling_count_and_the_rest_is_named(tmp_path: Path) -> None:
    rows = [
        measured_row(median_s=3e-4, config="block_n=32"), measured_row(median_s=2e-4),
        measured_row(median_s=1e-4, method="graph"), measured_row(part="0:kernel"), measured_row(basis="interpreter"),
        measured_row(case="uneven", shape=measured_row()["shape"].replace('{"value": 4096, "count": 64}', "[1, 2]")),
    ]  # fmt: skip
    write_rows(tmp_path, rows)
    found = kvsim_rows.read(tmp_path)
    (row,) = (row for one in found for row in one.frame.rows(named=True))
    assert row["seconds"] == pytest.approx(1e-4)
    assert {reason: count for one in found for reason, count in reasons(one).items()} == {
        kvsim_rows.INTERPRETER: 1, kvsim_rows.PART: 1, kvsim_rows.EVENTS_BESIDE_GRAPH: 1, kvsim_rows.SLOWER_TILING: 1,
        kvsim_rows.UNEVEN: 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("row", "error", "says"),
    [
        ({"clock_jitter": 1}, CalibrationError, "column 'clock_jitter' is not known: the rows come from a newer kvsim"),
        ({"gpu": "NVIDIA H1000"}, UnknownName, "column 'gpu': unknown device"),
        ({"shape": "{"}, InvalidSpec, "column 'shape': not valid JSON"),
        ({"shape": "[1]"}, InvalidSpec, "column 'shape': an object is needed"),
        (
            {"shape": measured_row()["shape"].replace("4096", '"x"')},
            InvalidSpec,
            "column 'shape': whole numbers are needed",
        ),
        (
            {"shape": measured_row()["shape"].replace("32,", "null,")},
            InvalidSpec,
            "whole numbers are needed in num_query",
        ),
        ({"median_s": "soon"}, InvalidSpec, "column 'median_s': numbers are needed"),
    ],
)
def test_own_rows_that_cannot_be_read(tmp_path: Path, row: dict[str, Any], error: type[KvsimError], says: str) -> None:
    path = write_rows(tmp_path, [measured_row(**row)])
    with pytest.raises(error, match=says) as caught:
        kvsim_rows.read(tmp_path)
    assert str(path) in str(caught.value)


def test_own_columns_are_those_that_the_kernels_write() -> None:
    records = pytest.importorskip("kernels.measure.records")
    assert kvsim_rows.COLUMNS == records.ROW_COLUMNS


def test_the_tools_tables_are_found_under_one_folder(tmp_path: Path) -> None:
    layout(tmp_path, "gemm_perf", [GEMM])
    write(tmp_path / "h100_dgx/all_reduce.csv", VIDUR_HEADER + "8,8,67108864,all_reduce,0.322\n")
    write(tmp_path / "infersim/gemm/h800/data.csv", "m,k,n,latency_us,mfu\n16,7168,1536,16.4,0.01\n")
    write_rows(tmp_path / "own", [measured_row()])
    profile(tmp_path / "profiles")
    devices = {str(one.frame["device"][0]) for one in sources.read(tmp_path) if len(one.frame)}
    assert devices == {"h100-sxm", "h800", "rtx-4090"}
    (tmp_path / "empty").mkdir()
    with pytest.raises(CalibrationError, match="holds no tables of kvsim, aiconfigurator"):
        sources.read(tmp_path / "empty")
    with pytest.raises(CalibrationError, match="no such file or folder"):
        sources.read(tmp_path / "nowhere")


def test_one_file_of_any_tool_is_read_by_its_reader(tmp_path: Path) -> None:
    files = [
        layout(tmp_path, "gemm_perf", [GEMM]), write_rows(tmp_path / "own", [measured_row()]),
        write(tmp_path / "h100_dgx/all_reduce.csv", VIDUR_HEADER + "8,8,67108864,all_reduce,0.322\n"),
        write(tmp_path / "gemm/h800/data.csv", "m,k,n,latency_us,mfu\n16,7168,1536,16.4,0.01\n"),
        profile(tmp_path / "profiles") / "RTX4090/meta-llama/Llama-3.1-8B/bf16/meta.yaml",
    ]  # fmt: skip
    assert [len(sources.read(path)[0].frame) for path in files] == [1] * 5
    with pytest.raises(CalibrationError, match="is no Parquet table"):
        aiconfigurator.read(files[1])


CSV_FILES = {
    "mha/decode/h20/32-8-128.csv": "dtype,kv_dtype,batch_size,kv_len,latency_us\nbf16,bf16,1,1024,9.9\n",
    "gemm/h800/data.csv": "m,k,n,latency_us,mfu\n16,7168,1536,16.4,0.01\n",
    "gdn/decode/h20/4-16.csv": "batch_size,conv\n1,2\n",
    "h100_dgx/all_reduce.csv": VIDUR_HEADER + "8,8,67108864,all_reduce,0.322\n",
    "own/rows.csv": ",".join(kvsim_rows.COLUMNS) + "\n",
}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(sorted(CSV_FILES)), cut=st.integers(0, 120), junk=st.binary(max_size=12))
def test_damaged_csv_files_give_rows_or_a_clear_error(tmp_path: Path, name: str, cut: int, junk: bytes) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = CSV_FILES[name].encode()
    path.write_bytes(whole[:cut] + junk + whole[cut:])
    found, message = [], ""
    try:
        found = sources.read(path)
    except KvsimError as error:
        message = str(error)
    assert not message or str(path) in message
    assert sum(len(one.frame) + sum(out.count for out in one.excluded) for one in found) <= 4
