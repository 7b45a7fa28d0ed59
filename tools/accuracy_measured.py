"""Predictions beside the shared measurements: engine runs, edge devices and kernel tables."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accuracy_quantities import decode_s, deploy, kv_blocks, prefill_s, step_model

from kvsim.cost.priors import Edge
from kvsim.device_catalog import load_device
from kvsim.errors import UnknownName
from kvsim.specs.base import Dtype

EDGES = (Edge.CENTRAL, Edge.OPTIMISTIC, Edge.PESSIMISTIC)
VLLM_RUNS = {"60": "llama-3.1-70b", "63": "mistral-nemo-12b", "65": "yi-34b", "66": "qwen2.5-7b"}
"""Runs of vllm_serving with dense models; 20 and 48 (Llama 4 Scout) profile a vision encoder too."""


@dataclass(frozen=True)
class Row:
    """One published figure and its prediction; ``predicted`` is the central edge of ``edges``."""

    name: str
    edges: tuple[float, ...]
    published: float
    unit: str
    source: str

    @property
    def predicted(self) -> float:
        """Central value."""
        return self.edges[0]

    @property
    def ratio(self) -> float:
        """Predicted over published."""
        return self.predicted / self.published

    @property
    def in_band(self) -> bool:
        """Whether the published figure lies within the edges (a tenth of a per cent is a block more or less)."""
        return min(self.edges) * 0.999 <= self.published <= max(self.edges) * 1.001


def pool_rows(shared: Path) -> Iterator[Row]:
    """KV blocks that vLLM 0.15.1 logged, gpu_memory_utilization 0.9."""
    for run in _vllm_runs(shared):
        limits = {key: run[key] for key in ("max_num_seqs", "max_num_batched_tokens")}
        options = (("version", "0.15.1"), *limits.items())
        deployment = deploy(VLLM_RUNS[run["id"]], "h100-sxm", "native", run["tp"], options=options)
        yield Row(
            f"run {run['id']}, {deployment.model.name}, {run['tp']} x H100",
            tuple(float(kv_blocks(deployment, edge)) for edge in EDGES),
            float(run["total_kv_blocks"]),
            "blocks",
            "vllm_serving/experiments.json",
        )


def engine_rows(shared: Path) -> Iterator[Row]:
    """Mean ITL of the same runs, at the concurrency that their measured latency implies (rate x decode time)."""
    for run in _vllm_runs(shared):
        lengths = run["workload"]["inference_perf"]["shared_prefix"]
        context = lengths["system_prompt_len"] + lengths["question_len"] + lengths["output_len"] // 2
        for index, stage in enumerate(run["workload"]["inference_perf"]["stages"]):
            measured = run["measured_ms"][f"stage_{index}"]
            batch = max(1, round(stage["rate"] * (measured["e2e_mean"] - measured["ttft_mean"]) / 1e3))
            deployment = deploy(VLLM_RUNS[run["id"]], "h100-sxm", "native", run["tp"])
            yield Row(
                f"run {run['id']}, {deployment.model.name}, {run['tp']} x H100, {batch} sequences",
                tuple(decode_s(step_model(deployment, edge), batch, context) * 1e3 for edge in EDGES),
                measured["itl_mean"],
                "ms",
                "vllm_serving/experiments.json",
            )


def _vllm_runs(shared: Path) -> Iterable[dict[str, Any]]:
    runs = json.loads((shared / "vllm_serving" / "experiments.json").read_text(encoding="utf-8"))
    return [run for run in runs if run["id"] in VLLM_RUNS]


def apple_rows(shared: Path) -> Iterator[Row]:
    """llama.cpp, Llama 2 7B in F16: decode of 128 tokens, for the chips whose bandwidth is the spec's."""
    for line in _csv(shared / "edge" / "apple_silicon_llama7b.csv"):
        name = "apple-" + line["chip"].lower().replace(" ", "-")
        try:
            same = load_device(name).spec.bandwidth_bytes_per_s == float(line["bw_gb_s"]) * 1e9
        except UnknownName:
            continue
        if same and line["f16_tg128"]:
            yield _decode_rate_row(
                f"{line['chip']} ({line['gpu_cores']} GPU cores), Llama 2 7B F16",
                "llama-2-7b", name, float(line["f16_tg128"]), "llama.cpp discussion 4167",
            )  # fmt: skip


def phone_rows(shared: Path) -> Iterator[Row]:
    """ExecuTorch on a OnePlus 12, bf16."""
    models = {"Llama 3.2 1B": "llama-3.2-1b", "Llama 3.2 3B": "llama-3.2-3b"}
    for line in _csv(shared / "edge" / "phone_edge_llm.csv"):
        if line["soc"] == "Snapdragon 8 Gen 3" and line["quant"] == "BF16" and line["model"] in models:
            yield _decode_rate_row(
                f"Snapdragon 8 Gen 3, {line['model']} bf16",
                models[line["model"]], "snapdragon-8-gen-3", float(line["decode_tok_s"]), "ExecuTorch README",
            )  # fmt: skip


def _decode_rate_row(name: str, model: str, device: str, published: float, source: str) -> Row:
    deployment = deploy(model, device, "native", engine="llamacpp")
    rates = tuple(1.0 / decode_s(step_model(deployment, edge), 1, 64) for edge in EDGES)
    return Row(name, rates, published, "tok/s", source)


def tpu_rows(shared: Path) -> Iterator[Row]:
    """Mean TPOT of Llama-3.3-70B on a v6e-8."""
    for line in _csv(shared / "engine_tables" / "tpu_recipes_inference.csv"):
        if line["tpu"] != "v6e" or not line["mean_tpot_ms"]:
            continue
        deployment = deploy("llama-3.3-70b", "tpu-v6e", "native", int(line["chips"]))
        batch, context = int(line["concurrency"]), int(line["isl"]) + int(line["osl"]) // 2
        yield Row(
            f"8 x TPU v6e, Llama-3.3-70B, {batch} sequences, {line['isl']} in, {line['osl']} out",
            tuple(decode_s(step_model(deployment, edge), batch, context) * 1e3 for edge in EDGES),
            float(line["mean_tpot_ms"]),
            "ms",
            "AI-Hypercomputer/tpu-recipes, trillium, vLLM",
        )


def mi300x_rows(shared: Path) -> Iterator[Row]:
    """Latency of whole batches, FP8 weights and cache, 8 ranks (vLLM 0.9.1)."""
    for line in _csv(shared / "engine_tables" / "mi300x_vllm.csv"):
        if not line["metric"].startswith("batch latency") or "70B" not in line["model"] or line["isl"] != "128":
            continue
        plain = deploy("llama-3.1-70b", "mi300x", "fp8", int(line["tp"]))
        weights = plain.model.model_copy(update={"weight_bits": 8.0, "weight_dtype": Dtype.FP8})
        deployment = replace(plain, model=weights)
        batch, prompt, output = int(line["num_prompts_or_batch"]), int(line["isl"]), int(line["osl"])
        seconds = []
        for edge in EDGES:
            step = step_model(deployment, edge)
            decode = (output - 1) * decode_s(step, batch, prompt + output // 2)
            seconds.append(prefill_s(step, prompt * batch) + decode)
        yield Row(
            f"8 x MI300X, Llama-3.1-70B FP8, batch {batch}, {prompt} in, {output} out",
            tuple(seconds),
            float(line["value"]),
            "s",
            "ROCm/vllm dev-docker README, vLLM 0.9.1",
        )


def _csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
