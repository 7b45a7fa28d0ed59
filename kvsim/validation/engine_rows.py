"""Rows of published engine tables as cases: a deployment, its load, and what was measured.

What a table does not state is set as its benchmark sets it: for the silicon sample by `kvsim.validation.silicon_rows`;
TensorRT-LLM's table is offline, everything at once, with an fp8 KV cache beside FP8 and FP4 weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from kvsim.specs.engine import EngineSpec
from kvsim.validation.deployments import MAX_RANKS, Setup, find_device, find_preset
from kvsim.validation.silicon_rows import engine_of, harness_of, is_own_run, range_ratio, recipe_of, stated_clients
from kvsim.validation.suite import NO_FIGURE, Options
from kvsim.validation.tables import Row, number, whole

UNKNOWN_DEVICE: Final = "device without a spec"
UNKNOWN_MODEL: Final = "model without a preset"
UNKNOWN_WEIGHTS: Final = "weight format that is not modelled"
OTHER_UNSEEN: Final = "device other than the one treated as unseen"
DISAGGREGATED: Final = "disaggregated serving"
PIPELINE: Final = "pipeline parallelism"
DATA_PARALLEL: Final = "attention data parallelism"
EXPERT_PARALLEL: Final = "expert parallelism over other ranks than those of a tensor parallel group"
MANY_RANKS: Final = f"more than {MAX_RANKS} ranks"
NO_LENGTHS: Final = "input or output length not stated"
NO_CONCURRENCY: Final = "concurrency not stated"
NO_DEVICES: Final = "device or number of devices not stated"
SPECULATIVE: Final = "speculative decoding"
UNCLEAR_TOKENS: Final = "throughput that does not say which tokens it counts"
FITTED: Final = "row that an engine-level fit was made from"
OTHER_TABLE: Final = "table of another suite"
OFFLINE_SEQS: Final = 2048
"""``trtllm-bench`` default of ``max_batch_size``."""


@dataclass(frozen=True)
class Case:
    """One row: a deployment, its load, and measured seconds or tokens per second by metric."""

    setup: Setup
    isl: int
    osl: int
    measured: Mapping[str, float]
    concurrency: int | None = None
    """Requests in flight; None is offline, as many as there are at once."""
    requests: int | None = None
    spread: float = 1.0
    """Shortest over nominal length."""
    groups: Mapping[str, str] = field(default_factory=dict)


Mapped = Case | str
"""A case, or the reason why the row is skipped."""
MapRow = Callable[[Row, Options], Mapped]
_PRECISIONS: Final[Mapping[str, str | None]] = {
    "fp8": "fp8", "fp4": "fp4", "nvfp4": "fp4", "int4": "int4", "bf16": "bf16", "bfloat16": "bf16", "": None,
}  # fmt: skip
"""Weight format by precision; None is the checkpoint's own."""
_OWN_FORMAT: Final = "gpt-oss"
"""Its checkpoint is MXFP4, whatever a row calls it."""
SILICON: Final = "silicon sample"
_TABLE_NAMES: Final = (SILICON, "TensorRT-LLM overview", "MI300X batches", "TPU recipes")


def _first(*reasons: tuple[bool, str]) -> str | None:
    """First reason that applies."""
    return next((reason for applies, reason in reasons if applies), None)


def _case(
    row: Row, options: Options, model: str, device: str, *, engine: EngineSpec, ranks: int, weights: str | None,
    measured: Mapping[str, float | None], table: str, backend: str, strategy: str = "native",
    concurrency: int | None = None, requests: int | None = None, spread: float = 1.0, collectives: str | None = None,
    harness: str = "", greedy: bool = True, stages: int = 1, expert_parallel: bool = False,
) -> Mapped:  # fmt: skip
    """Make a case, or say what it lacks."""
    found_device, preset = find_device(device), find_preset(model)
    isl, osl = whole(row, "isl"), whole(row, "osl")
    figures = {metric: value for metric, value in measured.items() if value}
    reason = _first(
        (found_device is None, UNKNOWN_DEVICE),
        (options.as_unseen not in (None, found_device), OTHER_UNSEEN),
        (preset is None, UNKNOWN_MODEL),
        (ranks * stages > MAX_RANKS, MANY_RANKS),
        (not isl or not osl or isl < 1 or osl < 1, NO_LENGTHS),
        (not figures, NO_FIGURE),
    )
    if reason or not found_device or not preset or not isl or not osl:
        return reason or NO_FIGURE
    setup = Setup(
        preset, found_device, strategy, weights, ranks, engine, greedy, framework=backend, collectives=collectives,
        stages=stages, expert_parallel=expert_parallel,
    )  # fmt: skip
    groups = {"table": table, "backend": backend, "concurrency": _decade(concurrency or requests)}
    groups |= {"harness": harness} if harness else {}
    return Case(setup, isl, osl, figures, concurrency, requests, spread, groups)


def _decade(concurrency: int | None) -> str:
    if concurrency is None:
        return "offline"
    return "1-8" if concurrency <= 8 else "9-64" if concurrency <= 64 else "65 and more"


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _silicon(row: Row, options: Options) -> Mapped:
    precision, backend, model = row["precision"].lower(), row["backend"].lower(), row["model_path"]
    clients = stated_clients(row)
    reason = _first(
        (row["mode"] != "agg", DISAGGREGATED),
        ((whole(row, "pp_size") or 1) > 1, PIPELINE),
        ((whole(row, "attention_dp_size") or 1) > 1, DATA_PARALLEL),
        ((whole(row, "moe_ep_size") or 1) > 1 and not _whole_experts(row), EXPERT_PARALLEL),
        (precision not in _PRECISIONS, UNKNOWN_WEIGHTS),
        (not clients or clients < 1, NO_CONCURRENCY),
    )
    if reason or not clients:
        return reason or NO_CONCURRENCY
    recipe = recipe_of(row)
    measured = {
        "ttft": _scaled(number(row, "silicon_ttft_ms"), 1e-3), "tpot": _scaled(number(row, "silicon_tpot_ms"), 1e-3),
    }  # fmt: skip
    return _case(
        row, options, model, row["system"], engine=engine_of(row, clients),
        ranks=whole(row, "tp_size") or 1, weights=None if _OWN_FORMAT in model else _PRECISIONS[precision],
        measured=measured, table=_TABLE_NAMES[0], backend=backend, strategy=recipe.kv, concurrency=clients,
        spread=range_ratio(row), collectives=recipe.collectives, harness=harness_of(row),
        greedy=not is_own_run(row) or backend == "trtllm", expert_parallel=_whole_experts(row),
    )  # fmt: skip


def _whole_experts(row: Row) -> bool:
    """Whether each rank of a tensor parallel group holds whole experts; other divisions are ambiguous in the sample."""
    ranks, experts = whole(row, "tp_size") or 1, whole(row, "moe_ep_size") or 1
    return experts > 1 and experts == ranks and (whole(row, "moe_tp_size") or 1) == 1


def _trtllm(row: Row, options: Options) -> Mapped:
    weights = _PRECISIONS.get(row["weight_precision"].lower())
    reason = UNKNOWN_WEIGHTS if weights is None else None
    engine = EngineSpec(max_num_seqs=OFFLINE_SEQS, max_num_batched_tokens=8192, gpu_memory_utilization=0.9)
    return reason or _case(
        row, options, row["model"].replace(" ", "-"), row["gpu"], engine=engine, ranks=whole(row, "tp") or 1,
        stages=whole(row, "pp") or 1,
        weights=weights, measured={"output_tok_s": number(row, "output_tok_s")}, table=_TABLE_NAMES[1],
        backend="trtllm", strategy="fp8" if weights in ("fp8", "fp4") else "native",
    )  # fmt: skip


def _mi300x(row: Row, options: Options) -> Mapped:
    if not row["metric"].startswith("batch latency"):
        return UNCLEAR_TOKENS
    batch, osl, seconds = whole(row, "num_prompts_or_batch"), whole(row, "osl"), number(row, "value")
    if not batch or batch < 1:
        return NO_CONCURRENCY
    rate = batch * osl / seconds if seconds and osl else None
    engine = EngineSpec(max_num_seqs=max(batch, 256), gpu_memory_utilization=0.9)
    return _case(
        row, options, row["model"].partition(" ")[0], "mi300x", engine=engine, ranks=whole(row, "tp") or 1,
        weights="fp8" if "FP8" in row["model"] else "bf16", measured={"output_tok_s": rate}, table=_TABLE_NAMES[2],
        backend="vllm", strategy="fp8" if "FP8-KV" in row["model"] else "native", requests=batch,
    )  # fmt: skip


def _tpu(row: Row, options: Options) -> Mapped:
    chips, concurrency = whole(row, "chips"), whole(row, "concurrency")
    reason = _first((not chips, NO_DEVICES), (not concurrency, NO_CONCURRENCY))
    if reason or not chips or not concurrency:
        return reason or NO_DEVICES
    measured = {
        "ttft": _scaled(number(row, "mean_ttft_ms"), 1e-3), "tpot": _scaled(number(row, "mean_tpot_ms"), 1e-3),
        "output_tok_s": number(row, "output_tok_s_total"),
    }  # fmt: skip
    engine = EngineSpec(max_num_seqs=max(concurrency, 256), gpu_memory_utilization=0.9)
    return _case(
        row, options, row["model"], row["tpu"], engine=engine, ranks=chips, weights=None, measured=measured,
        table=_TABLE_NAMES[3], backend="vllm", concurrency=concurrency,
    )  # fmt: skip


def _neuron(row: Row, options: Options) -> Mapped:
    scenario = " ".join(row.values()).lower()
    return SPECULATIVE if "speculative" in scenario and "no speculative" not in scenario else NO_DEVICES


TABLES: Final[tuple[tuple[tuple[str, ...], MapRow], ...]] = (
    (
        ("mode", "model_path", "system", "backend", "precision", "isl", "osl", "silicon_ttft_ms", "silicon_tpot_ms"),
        _silicon,
    ),
    (("model", "tp", "pp", "weight_precision", "gpu", "isl", "osl", "output_tok_s"), _trtllm),
    (("model", "tp", "isl", "osl", "num_prompts_or_batch", "metric", "value"), _mi300x),
    (("tpu", "chips", "model", "isl", "osl", "concurrency"), _tpu),
    (("Scenario (all using BF16)",), _neuron),
    (("Dataset", "Improvement"), _neuron),
)
"""Formats by their columns."""
OTHER_SUITES: Final = ("kv_scheme", "kv_type_k/v")
"""Columns that give a table of another suite away."""
