"""Small files in the formats of the suites, made up: what validation is tested on without any measurement."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from kvsim.calibration.artefact import Artefact
from kvsim.calibration.build import fit_artefacts
from kvsim.calibration.facts import device_facts
from kvsim.calibration.quarantine import quarantine
from kvsim.calibration.sets import pins_of, set_text
from kvsim.calibration.sources import aiconfigurator
from kvsim.device_catalog import load_device

H100 = "NVIDIA H100 80GB HBM3"
SILICON: dict[str, Any] = {
    "id": "made_up", "silicon_data_source": "silicon_concurrency=4", "backend": "vllm", "backend_version": "0.17.0",
    "model_path": "Qwen/Qwen3-32B", "system": "h100_sxm", "precision": "fp8", "mode": "agg", "isl": 1024, "osl": 128,
    "gemm_quant_mode": "fp8", "moe_quant_mode": "", "batch_size": 4, "tp_size": 2, "pp_size": 1,
    "attention_dp_size": 1, "moe_tp_size": 1, "moe_ep_size": 1, "silicon_ttft_ms": 150.0, "silicon_tpot_ms": 12.0,
}  # fmt: skip
TRTLLM: dict[str, Any] = {
    "release": "v1.0", "model": "Llama 3.1 8B", "tp": 1, "pp": 1, "weight_precision": "FP8", "gpu": "H100 SXM 80GB",
    "isl": 128, "osl": 16, "output_tok_s": 25000.0, "metric": "total output tokens/s", "source": "made up",
}  # fmt: skip
MI300X: dict[str, Any] = {
    "model": "Llama-3.1-70B FP8-KV", "tp": 8, "isl": 128, "osl": 32, "num_prompts_or_batch": 2,
    "metric": "batch latency s", "value": 0.4, "source": "made up",
}  # fmt: skip
KV_QUANT: dict[str, Any] = {
    "gpu": "H100", "engine": "vLLM", "model": "Llama-3.1-8B", "workload": "8 req, conc 2, ~2k in/16 out",
    "kv_scheme": "bf16", "metric": "output throughput", "value": 100.0, "unit": "tok/s", "source": "made up",
}  # fmt: skip
APPLE: dict[str, Any] = {
    "chip": "M2 Pro", "gpu_cores": 19, "bw_gb_s": 200, "f16_pp512": 384.4, "f16_tg128": 13.06, "q8_0_pp512": 344.5,
    "q8_0_tg128": 23.01, "q4_0_pp512": "", "q4_0_tg128": "", "model": "LLaMA 7B v2", "source": "made up",
}  # fmt: skip
RUN: dict[str, Any] = {
    "id": "1", "model": "mistralai/Mistral-Nemo-Instruct-2407", "hardware": "H100", "tp": 1, "max_num_seqs": 16,
    "max_num_batched_tokens": 2048, "total_kv_blocks": 19000, "cpu_kv_blocks": 0,
    "workload": {
        "inference_perf": {
            "shared_prefix": {
                "enable_multi_turn_chat": True, "num_unique_system_prompts": 3, "num_users_per_system_prompt": 2,
                "output_len": 8, "question_len": 200, "system_prompt_len": 50,
            },
            "stages": [{"duration": 10, "rate": 2.0}, {"duration": 10, "rate": 4.0}],
        },
        "num_requests": 60, "seed": 42, "version": "2",
    },
    "measured_ms": {
        "stage_0": {"e2e_mean": 100.0, "ttft_mean": 20.0, "ttft_p90": 25.0, "itl_mean": 10.0},
        "stage_1": {"e2e_mean": 110.0, "ttft_mean": 22.0, "ttft_p90": 27.0, "itl_mean": 11.0},
        "summary": {"e2e_mean": 105.0},
    },
    "precision": "BF16",
}  # fmt: skip
META: dict[str, Any] = {
    "schema_version": 1, "model": "meta-llama/Llama-3.1-8B", "vllm_version": "0.19.0",
    "engine_kwargs": {
        "tensor_parallel_size": 1, "max_num_seqs": 8, "max_num_batched_tokens": 2048, "max_model_len": 8192,
    },
    "kv_cache": {
        "num_gpu_blocks": 2588, "block_size": 16, "gpu_memory_utilization": 0.9, "enable_prefix_caching": True,
    },
    "hardware": {"device_name": "NVIDIA GeForce RTX 4090"},
}  # fmt: skip


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows with the columns of the first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_json(path: Path, value: Any) -> Path:
    """Write a document."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def write_log(folder: Path, rows: Sequence[Mapping[str, Any]], meta: Mapping[str, Any] = META) -> Path:
    """Write a request log of vLLM."""
    write_json(folder / "vllm" / "meta.json", meta)
    path = folder / "vllm" / "requests.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def log_rows(count: int = 120) -> list[dict[str, Any]]:
    """Requests that a slow server answered one a tenth of a second after the other."""
    return [
        {
            "request_id": f"bench-{index}", "input_toks": 200, "output_toks": 20, "arrival_time": 1e9,
            "queued_ts": 100.0 + index / 10, "scheduled_ts": 100.0 + index / 10,
            "first_token_ts": 100.05 + index / 10, "last_token_ts": 100.5 + index / 10,
        }
        for index in range(count)
    ]  # fmt: skip


def gemm_rows(*, slowness: float = 1.0, device: str = H100) -> list[dict[str, Any]]:
    """GEMM rows of a roofline with a launch, as aiconfigurator writes them."""
    rows = []
    for n in (1024, 2048, 4096, 8192, 16384):
        for k in (2048, 4096):
            for m in 2 ** np.arange(8):
                moved_s = 2.0 * (n * k + m * (n + k)) / 3.35e12
                seconds = slowness * (5e-6 + 1.2 * max(moved_s, 2.0 * m * n * k / 989e12))
                rows.append({
                    "framework": "vLLM", "version": "0.24.0", "device": device, "op_name": "gemm",
                    "kernel_source": "vllm_default", "gemm_dtype": "bfloat16", "m": int(m), "n": n, "k": k,
                    "latency": seconds * 1e3,
                })  # fmt: skip
    return rows


def write_gemm(root: Path, rows: Sequence[Mapping[str, Any]], place: str = "h100_sxm/gemm/vllm/0.24.0") -> Path:
    """Write a GEMM table in aiconfigurator's layout."""
    path = root / place / "gemm_perf.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pl.DataFrame(list(rows)).write_parquet(path)
    return path


def fit_set(tables: Path, folder: Path) -> Path:
    """Fit every table of a folder and pin the fits in a set."""
    artefacts: list[Artefact] = []
    for timings in aiconfigurator.read(tables):
        spec = load_device(str(timings.frame["device"][0])).spec
        artefacts += fit_artefacts(quarantine(timings, device_facts(spec)), spec)[0]
    for artefact in artefacts:
        artefact.save(folder / "fitted")
    path = folder / "sets" / "mine.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(set_text("mine", pins_of(artefacts, {one.id for one in artefacts})), encoding="utf-8")
    return path
