"""Small runs under every engine's scheduler, and how hypothesis draws them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import strategies as st
from sim_cases import ANY_TABLE, MS, Case, build_case, deploy, lengths, shared_tables, table, talk_tables

POLICIES: dict[str, dict[str, Any]] = {
    "vllm-priority": {"scheduling_policy": "priority"},
    "vllm-threshold": {"long_prefill_token_threshold": 7},
    "vllm-priority-threshold": {"scheduling_policy": "priority", "long_prefill_token_threshold": 5},
    "sglang": {"kind": "sglang"},
    "sglang-mixed": {"kind": "sglang", "enable_mixed_chunk": True, "page_size": 16},
    "sglang-lpm": {"kind": "sglang", "schedule_policy": "lpm", "max_prefill_tokens": 30},
    "sglang-bold": {"kind": "sglang", "schedule_conservativeness": 0.0},
    "trt-no-evict": {"kind": "tensorrt_llm", "tokens_per_block": 8},
    "trt-no-evict-chunked": {"kind": "tensorrt_llm", "tokens_per_block": 8, "enable_chunked_prefill": True},
    "trt-max-utilization": {
        "kind": "tensorrt_llm", "tokens_per_block": 8, "enable_chunked_prefill": True,
        "capacity_scheduler_policy": "max_utilization",
    },
    "sglang-deaf": {"kind": "sglang", "scheduler_recv_interval": 4},
    "sglang-mixed-deaf": {"kind": "sglang", "enable_mixed_chunk": True, "page_size": 16, "scheduler_recv_interval": 3},
    "trt-waiting": {
        "kind": "tensorrt_llm", "tokens_per_block": 8, "batch_wait_timeout_iters": 3,
        "batch_wait_max_tokens_ratio": 0.5,
    },
    "trt-waiting-max-utilization": {
        "kind": "tensorrt_llm", "tokens_per_block": 8, "enable_chunked_prefill": True,
        "capacity_scheduler_policy": "max_utilization", "batch_wait_timeout_iters": 5,
        "batch_wait_max_tokens_ratio": 0.9,
    },
    "llamacpp": {"kind": "llamacpp", "parallel": 1, "n_ubatch": 5},
    "llamacpp-slots": {"kind": "llamacpp", "parallel": 3, "n_ubatch": 512},
}  # fmt: skip
IN_ORDER = tuple(name for name in POLICIES if "priority" not in name and "lpm" not in name)


def options(policy: str, **shared: Any) -> dict[str, Any]:
    """A policy's options on top of shared ones; llama.cpp keeps its own slots."""
    own = POLICIES[policy]
    if "parallel" in own:
        shared.pop("max_num_seqs", None)
    return {**shared, **own}


def with_slots(case: Case) -> Case:
    """llama.cpp has as much pool as all of its slots need; others stay as tight as they are."""
    engine = case.deployment.engine
    if engine.kind != "llamacpp":
        return case
    spare = 1 + engine.max_num_seqs * case.plan.num_blocks
    return build_case(case.deployment, case.requests, spare_blocks=spare, routing=case.routing)


def with_priorities(case: Case, values: list[int]) -> Case:
    """Give the requests priorities."""
    return replace(case, requests=replace(case.requests, priority=np.array(values, dtype=np.int64)))


@st.composite
def policy_cases(
    draw: st.DrawFn,
    policy: str,
    strategies: tuple[str, ...] = ("native", "fp8", "snapkv(budget_tokens=40,window_size=8)"),
) -> Case:
    """Any small run under one policy: tight pools, small budgets, shared prefixes, conversations."""
    count = draw(st.integers(2, 9))
    arrivals = [a * MS for a in sorted(draw(st.lists(st.integers(0, 120), min_size=count, max_size=count)))]
    plain = table(arrivals, draw(lengths(count, 60)), draw(lengths(count, 60)))
    requests = draw(st.one_of(st.just(plain), shared_tables(), talk_tables(), ANY_TABLE))
    budget = draw(st.sampled_from((8, 10, 24, 64, 512)))
    deployment = deploy(
        strategy=draw(st.sampled_from(strategies)),
        **options(
            policy, max_num_batched_tokens=budget, max_num_seqs=min(budget, draw(st.sampled_from((1, 3, 5, 8)))),
            replicas=draw(st.sampled_from((1, 1, 2))), async_scheduling=draw(st.sampled_from((None, None, False))),
        ),
    )  # fmt: skip
    case = with_slots(build_case(deployment, requests, spare_blocks=draw(st.sampled_from((0, 0, 1, 3, 8, 40, 10_000)))))
    values = draw(st.lists(st.integers(0, 3), min_size=len(requests), max_size=len(requests)))
    return with_priorities(case, values)
