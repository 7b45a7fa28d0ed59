"""Suite vllm-serving: runs of vLLM under inference-perf's load, stage by stage.

Each run is replayed as its configuration states it: the engine's limits and the KV blocks that vLLM logged, arrivals
with exponential gaps scaled to the stage's duration (inference-perf's load timer), and the load generator's fixed list
of prompts in turn, so that after the first round every prompt finds its own blocks in the prefix cache.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from kvsim.documents import load_json, validate
from kvsim.errors import InvalidSpec, KvsimError
from kvsim.requests import RequestTable
from kvsim.specs.engine import EngineSpec
from kvsim.units import TICKS_PER_SECOND
from kvsim.validation.deployments import Played, Setup, deploy, find_device, find_preset, kv_blocks, play
from kvsim.validation.pool import predictions
from kvsim.validation.suite import FloatArray, Options, Result, Tally, locate

HASH_TOKENS: Final = 16
VLLM_RELEASE: Final = "0.15.1"
"""Release of all runs, by the data's own README; the files do not say."""
METRIC: Final = re.compile(r"(ttft|tpot|itl|e2e)_(mean|p90|p99)")
KV_BLOCKS: Final = "kv_blocks"
LATENCIES: Final = tuple(f"{what}_{how}" for what in ("ttft", "tpot", "itl", "e2e") for how in ("mean", "p90", "p99"))
METRICS: Final = (*LATENCIES, KV_BLOCKS)
FITTED_RUNS: Final = frozenset({"20", "60", "65"})
"""Runs that constants were fitted on: a request's time outside the engine (``tools/fit_front_end.py``) on all three,
two terms of the engine's memory on the dense ones. Every second run in the order of the published file, beginning with
the first; they are scored apart from the others."""
QUANTILES: Final = {"p90": 0.9, "p99": 0.99}
UNKNOWN_MODEL: Final = "model without a preset"
UNKNOWN_DEVICE: Final = "device without a spec"
OTHER_UNSEEN: Final = "device other than the one treated as unseen"
SUMMARY: Final = "summary of stages that are scored one by one"
OTHER_WORKLOAD: Final = "workload other than inference-perf's shared prefix"
NOT_MEASURED: Final = "stage without a measured figure"
NO_POOL: Final = "KV blocks of a run whose weights leave no room by the memory model (counted in figures)"
NO_GAPS: Final = "quantiles of inter-token gaps by stage: the simulator pools gaps over a run"
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(gt=0)]


class _Part(BaseModel):
    """Part of the file; what is not read is let through, as the format has more than a simulator needs."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class SharedPrefix(_Part):
    """inference-perf's ``shared_prefix`` data."""

    num_unique_system_prompts: Count
    num_users_per_system_prompt: Count
    system_prompt_len: Annotated[int, Field(ge=0)]
    question_len: Count
    output_len: Count


class Stage(_Part):
    """One load stage: requests per second, and seconds."""

    rate: Positive
    duration: Positive


class InferencePerf(_Part):
    """Data and load of inference-perf."""

    shared_prefix: SharedPrefix | None = None
    stages: tuple[Stage, ...] = Field(min_length=1)


class Workload(_Part):
    """What was sent."""

    inference_perf: InferencePerf | None = None
    seed: Annotated[int, Field(ge=0)] = 0


class Run(_Part):
    """One experiment; measured values in milliseconds by stage and metric."""

    id: str
    model: str
    hardware: str
    tp: Count = 1
    max_num_seqs: Count = 256
    max_num_batched_tokens: Count = 2048
    total_kv_blocks: Count | None = None
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    workload: Workload
    measured_ms: dict[str, dict[str, float | None]]


class _Runs(_Part):
    runs: tuple[Run, ...] = Field(min_length=1)


@dataclass(frozen=True)
class VllmServing:
    """Latencies of an online load."""

    name: str = "vllm-serving"
    metrics: tuple[str, ...] = METRICS

    def run(self, data: Path, options: Options) -> Result:
        """Score every run; see `kvsim.validation.suite.Suite`."""
        runs = [run for path in locate(data, self.name, ("vllm_serving",), ("*.json",)) for run in read_runs(path)]
        tally, scored = Tally(), []
        for run in runs:
            reason = _why_not(run, options)
            stages = _stages(run)
            tally.skip(SUMMARY, len(run.measured_ms) - len(stages))
            if reason:
                tally.skip(reason, len(stages))
            else:
                scored.append(run)
        if not scored:
            msg = f"--data: {data}: no run to score: " + ", ".join(one.reason for one in tally.result(self).skipped)
            raise InvalidSpec(msg)
        for run, answer in predictions(tally, _simulated, scored, options, lambda run: len(_stages(run))):
            _score(run, answer, tally)
        return tally.result(self)


SUITE: Final = VllmServing()


def read_runs(path: Path) -> tuple[Run, ...]:
    """Read a file of experiments.

    Raises
    ------
    InvalidSpec
        The file cannot be read or is not of the format, naming run and field.
    """
    document = load_json(path)
    if not isinstance(document, list):
        msg = f"{path}: must be a list of runs (got {type(document).__name__})"
        raise InvalidSpec(msg)
    return validate(_Runs, {"runs": document}, str(path)).runs


def _why_not(run: Run, options: Options) -> str | None:
    device = find_device(run.hardware)
    if device is None:
        return UNKNOWN_DEVICE
    if options.as_unseen not in (None, device):
        return OTHER_UNSEEN
    if find_preset(run.model) is None:
        return UNKNOWN_MODEL
    load = run.workload.inference_perf
    return OTHER_WORKLOAD if load is None or load.shared_prefix is None else None


def _stages(run: Run) -> list[str]:
    return [name for name in run.measured_ms if re.fullmatch(r"stage_\d+", name)]


@dataclass(frozen=True)
class StageLatencies:
    """Simulated seconds of one stage's requests."""

    ttft: FloatArray
    tpot: FloatArray
    e2e: FloatArray
    itl_mean: float


@dataclass(frozen=True)
class Predicted:
    """What kvsim says of a run."""

    stages: list[StageLatencies]
    kv_blocks: int | None


def _simulated(job: tuple[Run, str, str | None]) -> Predicted | str:
    """Latencies by stage and KV blocks, or why the run cannot be simulated."""
    run, calibration, as_unseen = job
    options = Options(as_unseen, calibration)
    try:
        deployment = deploy(setup_of(run), options)
        requests, stage_of = requests_of(run)
        played = play(deployment, requests)
        blocks = kv_blocks(setup_of(run), options)
    except KvsimError as error:
        return f"cannot be deployed: {type(error).__name__}"
    return Predicted([latencies(played, stage_of == stage) for stage in range(int(stage_of.max()) + 1)], blocks)


def setup_of(run: Run, request_overhead_s: float | None = None) -> Setup:
    """Deployment of a run; the front end's latency is the prior's unless given."""
    engine = EngineSpec(
        version=VLLM_RELEASE,
        max_num_seqs=run.max_num_seqs,
        max_num_batched_tokens=max(run.max_num_batched_tokens, run.max_num_seqs),
        gpu_memory_utilization=run.gpu_memory_utilization,
        num_gpu_blocks_override=run.total_kv_blocks,
        request_overhead_s=request_overhead_s,
    )
    return Setup(
        find_preset(run.model) or "", find_device(run.hardware) or "", ranks=run.tp, engine=engine, greedy=False
    )


def requests_of(run: Run) -> tuple[RequestTable, np.ndarray[tuple[int], np.dtype[np.int64]]]:
    """Requests of all stages, one after another, and the stage of each."""
    load = run.workload.inference_perf
    if load is None or load.shared_prefix is None:
        raise ValueError(OTHER_WORKLOAD)
    shared = load.shared_prefix
    rng = np.random.default_rng(run.workload.seed)
    times, stages, start_s = [], [], 0.0
    for number, stage in enumerate(load.stages):
        gaps = rng.exponential(1.0 / stage.rate, max(1, int(stage.rate * stage.duration)))
        times.append(start_s + np.cumsum(gaps) * (stage.duration / gaps.sum()))
        stages.append(np.full(len(gaps), number, dtype=np.int64))
        start_s += stage.duration
    arrival_s = np.concatenate(times)
    count = len(arrival_s)
    prompt = shared.system_prompt_len + shared.question_len
    hashes = list(_prompt_hashes(shared))
    table = RequestTable(
        arrival_ticks=np.rint(arrival_s * TICKS_PER_SECOND).astype(np.int64),
        prompt_tokens=np.full(count, prompt, dtype=np.int64),
        output_tokens=np.full(count, shared.output_len, dtype=np.int64),
        delay_ticks=np.zeros(count, dtype=np.int64),
        parent=np.full(count, -1, dtype=np.int64),
        prefix_hashes=tuple(hashes[index % len(hashes)] for index in range(count)),
        hash_block_tokens=HASH_TOKENS,
        source=f"inference-perf shared prefix, run {run.id}",
    )
    return table, np.concatenate(stages)


def _prompt_hashes(shared: SharedPrefix) -> Iterator[tuple[int, ...]]:
    """Hashes of each prompt's whole chunks: those within the system prompt are its users' in common."""
    common = shared.system_prompt_len // HASH_TOKENS
    whole = (shared.system_prompt_len + shared.question_len) // HASH_TOKENS
    systems, users = shared.num_unique_system_prompts, shared.num_users_per_system_prompt
    stride = whole + 1
    for user in range(users):
        for system in range(systems):
            own = systems + user * systems + system
            yield (*(system * stride + at for at in range(common)), *(own * stride + at for at in range(common, whole)))


def latencies(played: Played, chosen: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> StageLatencies:
    """Latencies of some requests of a run."""
    arrived, first, finished = (times[chosen] for times in played.result.log.client_seconds())
    gaps = np.maximum(played.requests.output_tokens[chosen] - 1, 0)
    decode_s = finished - first
    several = gaps > 0
    return StageLatencies(
        ttft=first - arrived,
        tpot=decode_s[several] / gaps[several],
        e2e=finished - arrived,
        itl_mean=float(decode_s.sum() / gaps.sum()) if gaps.sum() else 0.0,
    )


def statistic(found: StageLatencies, what: str, how: str) -> float | None:
    """Seconds of one metric; None for quantiles of gaps, which are not kept by stage."""
    if what == "itl":
        return found.itl_mean if how == "mean" else None
    values: FloatArray = getattr(found, what)
    return float(values.mean() if how == "mean" else np.quantile(values, QUANTILES[how]))


def score_blocks(tally: Tally, logged: int | None, predicted: int | None, groups: Mapping[str, str]) -> None:
    """Compare KV blocks with those that an engine logged, where it did."""
    if logged is not None and predicted is None:
        tally.skip(NO_POOL)
    elif logged is not None and predicted is not None:
        tally.add(KV_BLOCKS, logged, predicted, **groups)


def _score(run: Run, answer: Predicted, tally: Tally) -> None:
    groups = {
        "run": f"{run.id} {find_preset(run.model)} tp{run.tp}", "model": find_preset(run.model) or "",
        "device": find_device(run.hardware) or "",
        "constants": "fitted on these runs" if run.id in FITTED_RUNS else "held out",
    }  # fmt: skip
    score_blocks(tally, run.total_kv_blocks, answer.kv_blocks, groups)
    for index, found in enumerate(answer.stages):
        measured: Mapping[str, Any] = run.measured_ms.get(f"stage_{index}", {})
        scored = False
        for name, value_ms in measured.items():
            parts = METRIC.fullmatch(name)
            if parts is None or not value_ms or value_ms <= 0:
                continue
            predicted_s = statistic(found, parts[1], parts[2])
            if predicted_s is None:
                tally.skip(NO_GAPS)
                continue
            tally.add(name, value_ms / 1e3, predicted_s, **groups, stage=f"{groups['run']} stage {index}")
            scored = True
        if scored:
            tally.rows += 1
        else:
            tally.skip(NOT_MEASURED)
