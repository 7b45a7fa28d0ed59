"""Suite vllm-requests: the request log of a real vLLM server, replayed at its own arrivals and lengths.

``<GPU>/<model>/vllm/`` holds ``meta.json`` (engine options, KV blocks, device) and ``requests.jsonl[.gz]`` (one line
per request). Arrivals are the times at which the engine queued the requests, on the clock of its other times. Prompts
are taken as different from one another, so the prefix cache serves a preempted prompt alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from kvsim.documents import load_json, validate
from kvsim.errors import InvalidSpec, KvsimError
from kvsim.requests import RequestTable
from kvsim.specs.engine import EngineSpec
from kvsim.traces.files import finite_number, json_lines, read_trace_bytes, whole_number
from kvsim.traces.rows import Origin
from kvsim.units import TICKS_PER_SECOND
from kvsim.validation.deployments import Setup, deploy, find_device, find_preset, kv_blocks, play
from kvsim.validation.pool import predictions
from kvsim.validation.suite import FloatArray, Options, Result, Tally, locate
from kvsim.validation.vllm_serving import (
    HASH_TOKENS,
    LATENCIES,
    METRICS,
    OTHER_UNSEEN,
    UNKNOWN_DEVICE,
    UNKNOWN_MODEL,
    Predicted,
    StageLatencies,
    latencies,
    score_blocks,
    statistic,
)

LOGS: Final = ("requests.jsonl.gz", "requests.jsonl")
TIMES: Final = ("queued_ts", "first_token_ts", "last_token_ts")
UNFINISHED: Final = "request without a first or last token"
MIN_FOR_P99: Final = 100
Count = Annotated[int, Field(gt=0)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class EngineKwargs(_Part):
    """Options that the server was started with."""

    tensor_parallel_size: Count = 1
    max_num_seqs: Count = 256
    max_num_batched_tokens: Count = 2048
    max_model_len: Count | None = None


class KvCache(_Part):
    """KV pool as the server set it up."""

    num_gpu_blocks: Count | None = None
    block_size: Count = 16
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    enable_prefix_caching: bool = True


class Hardware(_Part):
    """Device as the driver names it."""

    device_name: str


class Meta(_Part):
    """``meta.json`` of a log."""

    model: str
    vllm_version: str = ""
    engine_kwargs: EngineKwargs = EngineKwargs()
    kv_cache: KvCache = KvCache()
    hardware: Hardware


@dataclass(frozen=True)
class Log:
    """Requests of a log in order of arrival: seconds from the first arrival, and tokens."""

    name: str
    meta: Meta
    queued_s: FloatArray
    first_s: FloatArray
    last_s: FloatArray
    prompt_tokens: np.ndarray[tuple[int], np.dtype[np.int64]]
    output_tokens: np.ndarray[tuple[int], np.dtype[np.int64]]
    unfinished: int


@dataclass(frozen=True)
class VllmRequests:
    """Latencies of logged requests."""

    name: str = "vllm-requests"
    metrics: tuple[str, ...] = METRICS

    def run(self, data: Path, options: Options) -> Result:
        """Score every log; see `kvsim.validation.suite.Suite`."""
        patterns = [f"{depth}{name}" for name in LOGS for depth in ("", "*/", "*/*/", "*/*/*/")]
        logs = [read_log(path) for path in locate(data, self.name, ("vllm_requests",), patterns)]
        tally, scored = Tally(), []
        for log in logs:
            tally.skip(UNFINISHED, log.unfinished)
            reason = _why_not(log.meta, options)
            if reason:
                tally.skip(reason, len(log.queued_s))
            else:
                scored.append(log)
        if not scored:
            msg = f"--data: {data}: no log to score: " + ", ".join(one.reason for one in tally.result(self).skipped)
            raise InvalidSpec(msg)
        for log, answer in predictions(tally, _simulated, scored, options, lambda log: len(log.queued_s)):
            _score(log, answer, tally)
        return tally.result(self)


SUITE: Final = VllmRequests()


def read_log(path: Path) -> Log:
    """Read a log and the ``meta.json`` beside it.

    Raises
    ------
    InvalidSpec, TraceError
        One of them is missing or not of the format, naming file, line and field.
    """
    meta_path = path.parent / "meta.json"
    if not meta_path.is_file():
        msg = f"{meta_path}: no such file; a request log needs it for the engine's options"
        raise InvalidSpec(msg)
    meta = validate(Meta, load_json(meta_path), str(meta_path))
    origin = Origin(path, "columns")
    rows: list[tuple[float, ...]] = []
    unfinished = 0
    for number, row in json_lines(read_trace_bytes(origin), origin):
        if any(row.get(name) is None for name in TIMES[1:] if name in row):
            unfinished += 1
            continue
        queued, first, last = (finite_number(row, name, origin, number) for name in TIMES)
        if not queued <= first <= last:
            origin.fail("times must rise from queued_ts to last_token_ts", row=number)
        tokens = (whole_number(row, name, origin, number) for name in ("input_toks", "output_toks"))
        rows.append((queued, first, last, *map(float, tokens)))
    if not rows:
        origin.fail("no request has a first and a last token")
    table = np.array(sorted(rows), dtype=np.float64)
    times = table[:, :3] - table[0, 0]
    lengths = np.maximum(table[:, 3:].astype(np.int64), 1)
    name = f"{meta.hardware.device_name}, {meta.model}, vLLM {meta.vllm_version}".strip()
    return Log(name, meta, times[:, 0], times[:, 1], times[:, 2], lengths[:, 0], lengths[:, 1], unfinished)


def _why_not(meta: Meta, options: Options) -> str | None:
    device = find_device(meta.hardware.device_name)
    if device is None:
        return UNKNOWN_DEVICE
    if options.as_unseen not in (None, device):
        return OTHER_UNSEEN
    return None if find_preset(meta.model) else UNKNOWN_MODEL


def _simulated(job: tuple[Log, str, str | None]) -> Predicted | str:
    log, calibration, as_unseen = job
    setup, options = setup_of(log.meta), Options(as_unseen, calibration)
    try:
        played = play(deploy(setup, options), requests_of(log))
        blocks = kv_blocks(setup, options)
    except KvsimError as error:
        return f"cannot be deployed: {type(error).__name__}"
    return Predicted([latencies(played, np.ones(len(log.queued_s), dtype=bool))], blocks)


def setup_of(meta: Meta) -> Setup:
    """Deployment of a log."""
    release = re.match(r"\d{1,3}\.\d{1,3}(\.\d{1,3})?(?!\d)", meta.vllm_version)
    options: dict[str, Any] = {
        "version": release[0] if release else None,
        "max_num_seqs": meta.engine_kwargs.max_num_seqs,
        "max_num_batched_tokens": meta.engine_kwargs.max_num_batched_tokens,
        "max_model_len": meta.engine_kwargs.max_model_len,
        "num_gpu_blocks_override": meta.kv_cache.num_gpu_blocks,
        "block_size": meta.kv_cache.block_size,
        "gpu_memory_utilization": meta.kv_cache.gpu_memory_utilization,
        "enable_prefix_caching": meta.kv_cache.enable_prefix_caching,
        # The log's times are the engine's own.
        "request_overhead_s": "0 s",
    }
    engine = validate(EngineSpec, options, "meta.json")
    model, device = find_preset(meta.model) or "", find_device(meta.hardware.device_name) or ""
    return Setup(model, device, ranks=meta.engine_kwargs.tensor_parallel_size, engine=engine)


def requests_of(log: Log) -> RequestTable:
    """Requests of a log; each prompt has hashes of its own."""
    count = len(log.queued_s)
    chunks = (log.prompt_tokens // HASH_TOKENS).tolist()
    starts = np.concatenate([[0], np.cumsum(chunks)]).tolist()
    return RequestTable(
        arrival_ticks=np.rint(log.queued_s * TICKS_PER_SECOND).astype(np.int64),
        prompt_tokens=log.prompt_tokens,
        output_tokens=log.output_tokens,
        delay_ticks=np.zeros(count, dtype=np.int64),
        parent=np.full(count, -1, dtype=np.int64),
        prefix_hashes=tuple(tuple(range(start, start + size)) for start, size in zip(starts, chunks, strict=False)),
        hash_block_tokens=HASH_TOKENS,
        source=log.name,
    )


def _score(log: Log, answer: Predicted, tally: Tally) -> None:
    found = answer.stages[0]
    gaps = log.output_tokens - 1
    decode_s = log.last_s - log.first_s
    several = gaps > 0
    measured = StageLatencies(
        ttft=log.first_s - log.queued_s,
        tpot=decode_s[several] / gaps[several],
        e2e=log.last_s - log.queued_s,
        itl_mean=float(decode_s.sum() / max(int(gaps.sum()), 1)),
    )
    groups = {"log": log.name, "device": find_device(log.meta.hardware.device_name) or ""}
    score_blocks(tally, log.meta.kv_cache.num_gpu_blocks, answer.kv_blocks, groups)
    for metric in LATENCIES:
        what, _, how = metric.partition("_")
        seconds, predicted = statistic(measured, what, how), statistic(found, what, how)
        if seconds is None or predicted is None or not seconds > 0 or (how == "p99" and len(gaps) < MIN_FOR_P99):
            continue
        tally.add(metric, seconds, predicted, **groups)
    tally.rows += len(gaps)
