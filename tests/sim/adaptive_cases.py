"""Small adaptive deployments and runs, and how hypothesis draws them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
from hypothesis import strategies as st
from run_invariants import Audited
from sim_cases import ANY_TABLE, BATCHED, MS, Case, build_case, deploy, lengths, shared_tables, table, talk_tables

from kvsim.adaptive import Adaptive
from kvsim.deployment import Deployment
from kvsim.requests import RequestTable
from kvsim.sim.adaptive import engine
from kvsim.sim.adaptive.scheduler import LevelScheduling, adaptive_scheduler
from kvsim.sim.scheduling import SchedulerParts
from kvsim.specs.engine import EngineSpec

KEEPING = ("native", "fp8", "kivi-4(residual_length=32)", "turboquant_4bit_nc", "int4_per_token_head", "nvfp4")
SELECTING = ("snapkv(budget_tokens=40,window_size=8)", "streaming_llm:24", "h2o:20", "quest:32",
             "snapkv(compression_ratio=0.5,window_size=16)+kivi-2(residual_length=32)")  # fmt: skip


def adapt(
    levels: tuple[str, ...], adaptive: dict[str, Any], *, model: str = "llama-3.1-8b", **options: Any
) -> Deployment:
    """A deployment of several levels; ``options`` are those of ``deploy``."""
    spec = Adaptive.model_validate({"levels": levels, **adaptive})
    deployed = tuple(deploy(model, level, **options) for level in levels)
    return replace(
        deployed[0], adaptive=spec, levels=deployed, prefix_caching=all(one.prefix_caching for one in deployed)
    )


def classed(requests: RequestTable, classes: list[int], names: tuple[str, ...]) -> RequestTable:
    """The same requests with classes."""
    return replace(requests, request_class=np.array(classes, dtype=np.int64), class_names=names)


class AuditedLevels(Audited):
    """Counts every byte of every level again before each step."""

    def _pinned_bytes(self) -> int:
        cache = self.sharing.cache
        assert cache.evictable_bytes == sum(len(one._unused) * one.unit_bytes for one in cache.levels)
        return cache.pinned_bytes


@contextmanager
def audited_levels() -> Iterator[list[Audited]]:
    """Let adaptive runs use audited schedulers, and list them."""
    ledger: list[Audited] = []

    def build(spec: EngineSpec, parts: SchedulerParts) -> LevelScheduling:
        scheduler = adaptive_scheduler(spec, parts)
        scheduler.__class__ = type("Audited", (AuditedLevels, type(scheduler)), {})
        ledger.append(scheduler)  # type: ignore[arg-type]
        return scheduler

    with mock.patch.object(engine, "adaptive_scheduler", build):
        yield ledger


@st.composite
def policies(draw: st.DrawFn) -> dict[str, Any]:
    """Any pressure policy, swinging often."""
    low, high = sorted(draw(st.lists(st.integers(0, 40), min_size=2, max_size=2, unique=True)))
    return {
        "kind": "pressure",
        "low_watermark": low / 40,
        "high_watermark": high / 40,
        "min_dwell_s": draw(st.sampled_from((0.0, 0.003, 0.05, 1.0))),
        "queue_length": draw(st.sampled_from((None, None, 1, 3))),
    }


@st.composite
def adaptive_cases(draw: st.DrawFn, *, pressed: bool = True) -> Case:
    """Any small adaptive run; ``pressed`` ones have a pool of few blocks and many requests."""
    requantize = draw(st.sampled_from((None, None, {}, {"order": "oldest"}, {"before_preemption": False})))
    known = KEEPING if requantize is not None else (*KEEPING, *SELECTING)
    levels = tuple(draw(st.lists(st.sampled_from(known), min_size=2, max_size=3, unique=True)))
    policy = draw(policies())
    if requantize is None and draw(st.integers(0, 7)) == 0:
        policy = {"kind": "static", "level": draw(st.integers(0, len(levels) - 1))}
    adaptive: dict[str, Any] = {"policy": policy, "requantize": requantize}
    model = draw(st.sampled_from(("llama-3.1-8b", "llama-3.1-8b", "qwen2.5-0.5b", "gpt-oss-20b", "gemma-3-1b")))
    if pressed:
        count = draw(st.integers(3, 10))
        arrivals = sorted(draw(st.lists(st.integers(0, 120), min_size=count, max_size=count)))
        requests = table([a * MS for a in arrivals], draw(lengths(count, 90)), draw(lengths(count, 90)))
        if draw(st.integers(0, 2)) == 0:
            requests = draw(st.one_of(shared_tables(), talk_tables()))
        batched, seqs, spare = (
            draw(st.sampled_from((8, 20, 40, 128))),
            draw(st.sampled_from((3, 5, 8))),
            st.integers(0, 12),
        )
    else:
        requests = draw(ANY_TABLE)
        batched, spare = draw(BATCHED), st.sampled_from((0, 1, 5, 12, 10_000))
        seqs = min(batched, draw(st.sampled_from((1, 2, 3, 8))))
    if draw(st.booleans()):
        members = draw(st.lists(st.integers(0, 1), min_size=len(requests), max_size=len(requests)))
        requests = classed(requests, members, ("one", "two"))
        requests = replace(requests, priority=np.array(members, dtype=np.int64))
        low, high = sorted(draw(st.lists(st.integers(0, len(levels) - 1), min_size=2, max_size=2)))
        adaptive["classes"] = {"two": {"min_level": low, "max_level": high}}
    deployment = adapt(
        levels, adaptive, model=model, max_num_batched_tokens=batched, max_num_seqs=min(batched, seqs),
        enable_chunked_prefill=draw(st.sampled_from((True, True, True, False))),
        scheduling_policy=draw(st.sampled_from(("fcfs", "fcfs", "priority"))),
        long_prefill_token_threshold=draw(st.sampled_from((0, 0, 12))),
        compression_stream=draw(st.sampled_from(("inline", "inline", "side"))),
        async_scheduling=draw(st.booleans()), replicas=1 if pressed else draw(st.sampled_from((1, 1, 2))),
    )  # fmt: skip
    return build_case(
        deployment, requests, spare_blocks=draw(spare), reject_longest=draw(st.sampled_from((False, False, True)))
    )
