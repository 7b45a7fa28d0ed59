from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
from source_tables import read_one

from kvsim.calibration.sources import aiconfigurator, infersim, llmservingsim, vidur
from kvsim.calibration.timings import Timings

# The shared measurements: aiconfigurator-core 0.12.0 (NVIDIA, Apache-2.0), InferSim (Alibaba, Apache-2.0), Vidur
# (Microsoft, MIT), LLMServingSim (KAIST, MIT).

GOLDEN_ROWS = {
    ("h100_sxm", "decode_attention"): 129_663, ("h100_sxm", "prefill_attention"): 137_463,
    ("h100_sxm", "gemm"): 344_146, ("h100_sxm", "mla_decode"): 5_792,
    ("h100_sxm", "mla_prefill"): 3_520, ("h100_sxm", "all_reduce"): 471,
    ("a100_sxm", "decode_attention"): 13_812, ("a100_sxm", "prefill_attention"): 13_850,
    ("a100_sxm", "mla_decode"): 2_896, ("b60", "all_reduce"): 153, ("b60", "gemm"): 40_530,
}  # fmt: skip


@pytest.mark.parametrize("device", ["h100_sxm", "a100_sxm", "b60"])
def test_measured_tables_have_the_rows_that_they_had(kernel_timings: Path, device: str) -> None:
    wanted = {operation: rows for (name, operation), rows in GOLDEN_ROWS.items() if name == device}
    found = dict.fromkeys(wanted, 0)
    for timings in aiconfigurator.read(kernel_timings / device, operations=list(wanted)):
        found[timings.operation] += len(timings.frame)
        assert timings.frame.null_count().sum_horizontal().item() == 0
    assert found == wanted


GOLDEN_VALUES = [
    ("h100_sxm/attention/vllm/0.24.0/generation_attention_perf", 0.21038933595021567e-3,
     {"batch": 64, "context_tokens": 4096, "num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "window_tokens": 0,
      "kv_dtype": "fp8"}),
    ("h100_sxm/attention/vllm/0.24.0/context_attention_perf", 0.9122186501820883e-3,
     {"batch": 1, "prompt_tokens": 8192, "num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "window_tokens": 0,
      "kv_dtype": "bf16"}),
    ("b200_sxm/mla/trtllm/1.3.0rc20/generation_mla_perf", 0.03863999992609024e-3,
     {"batch": 64, "context_tokens": 4096, "num_heads": 16, "kv_dtype": "fp8"}),
    ("a100_sxm/mla/trtllm/1.0.0/context_mla_perf", (0.6705493132273356e-3 + 0.6604799826939901e-3) / 2,
     {"batch": 1, "prompt_tokens": 4096, "num_heads": 16, "kv_dtype": "bf16"}),
    ("h100_sxm/comm/nccl/2.29.2/nccl_perf", 0.03818e-3, {"ranks": 8, "message_bytes": 2 << 20, "dtype": "fp16"}),
    ("h100_sxm/comm/vllm/0.24.0/custom_allreduce_perf", 0.01938976049423218e-3,
     {"ranks": 8, "message_bytes": 2 << 20, "kernel": "vllm/custom_graph"}),
    ("b60/comm/oneccl/2021.17.2/oneccl_perf", 0.0687542e-3, {"ranks": 2, "message_bytes": 1 << 20, "dtype": "int8"}),
]  # fmt: skip


@pytest.mark.parametrize(("table", "seconds", "shape"), GOLDEN_VALUES, ids=lambda value: str(value)[:60])
def test_a_measured_row_comes_out_as_it_was_written(
    kernel_timings: Path, table: str, seconds: float, shape: dict[str, Any]
) -> None:
    frame = read_one(kernel_timings / f"{table}.parquet").frame
    found = frame.filter(*(pl.col(name) == value for name, value in shape.items()))
    assert found["seconds"].to_list() == pytest.approx([seconds])


def test_mla_repeats_at_other_degrees_of_parallelism_agree_so_heads_are_of_one_rank(kernel_timings: Path) -> None:
    raw = pl.read_parquet(kernel_timings / "a100_sxm/mla/trtllm/1.0.0/generation_mla_perf.parquet")
    same = raw.group_by("num_heads", "batch_size", "step", "kv_cache_dtype").agg(
        pl.len(), ratio=pl.col("latency").max() / pl.col("latency").min()
    )
    assert same.filter(pl.col("len") > 1)["ratio"].median() < 1.01


def test_the_other_tools_rows(kernel_timings: Path, shared_data: Path) -> None:
    def rows(found: list[Timings]) -> dict[tuple[str, str], int]:
        return {(str(t.frame["device"][0]), t.operation): len(t.frame) for t in found if len(t.frame)}

    assert rows(infersim.read(kernel_timings)) == {
        ("h20", "decode_attention"): 375, ("h20", "gemm"): 380, ("h20", "mla_decode"): 41,
        ("h20", "prefill_attention"): 25, ("h800", "decode_attention"): 287, ("h800", "gemm"): 110,
        ("h800", "mla_decode"): 41, ("h800", "mla_prefill"): 5,
    }  # fmt: skip
    assert rows(vidur.read(kernel_timings)) == {
        ("a100-pcie-80gb", "all_reduce"): 4494, ("a100-sxm-80gb", "all_reduce"): 2979,
        ("h100-pcie", "all_reduce"): 1986, ("h100-sxm", "all_reduce"): 2979,
    }  # fmt: skip
    assert rows(llmservingsim.read(shared_data)) == {
        ("rtx-4090", "decode_attention"): 99, ("rtx-4090", "prefill_attention"): 96, ("rtx-4090", "gemm"): 648,
    }  # fmt: skip
