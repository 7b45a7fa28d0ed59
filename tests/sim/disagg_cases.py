"""Small runs of two pools, and how hypothesis draws them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from hypothesis import strategies as st
from sim_cases import AHEAD, ANY_TABLE, build_case, deploy

from kvsim.memory import plan_memory
from kvsim.pool import block_bytes, longest_prompt, prompt_bytes
from kvsim.requests import RequestTable
from kvsim.sim.disaggregated import Crossing, Pool, run_disaggregated
from kvsim.sim.handover import TransferRules
from kvsim.sim.run import RunResult
from kvsim.specs.routing import RouterThresholds, Routing

FREE = 1e30
"""Bytes per second at which nothing takes a tick."""


@dataclass(frozen=True, eq=False)
class Split:
    """One run's input."""

    prefill: Pool
    decode: Pool
    crossing: Crossing
    requests: RequestTable
    max_model_len: int
    routing: Routing = "round_robin"

    def play(self, *, coalesce: bool = True) -> RunResult:
        return run_disaggregated(
            self.prefill, self.decode, self.crossing, self.requests, self.max_model_len, routing=self.routing,
            thresholds=RouterThresholds(cache_threshold=0.1, balance_abs_threshold=3), coalesce=coalesce,
        )  # fmt: skip

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))

    def __repr__(self) -> str:
        p, d, r = self.prefill, self.decode, self.requests
        return (
            f"Split({p.deployment.model.name}, {p.deployment.compression.name}, {p.deployment.replicas}P "
            f"{p.plan.num_blocks} {p.deployment.engine!r} {d.deployment.replicas}D {d.plan.num_blocks} "
            f"{d.deployment.engine!r}, {self.crossing}, {self.routing}, len={self.max_model_len}, "
            f"arrivals={r.arrival_ticks.tolist()}, prompts={r.prompt_tokens.tolist()}, "
            f"outputs={r.output_tokens.tolist()}, parents={r.parent.tolist()}, delays={r.delay_ticks.tolist()}, "
            f"hashes={r.prefix_hashes}, output_hashes={r.output_hashes})"
        )


def pool(deployment: Any, longest: int, spare_blocks: int) -> Pool:
    """Just the blocks that the longest request needs, and ``spare_blocks`` more."""
    size = block_bytes(deployment)
    blocks = -(-prompt_bytes(deployment, longest) // size) + spare_blocks
    engine = deployment.engine.model_copy(update={"num_gpu_blocks_override": blocks})
    sized = replace(deployment, engine=engine)
    return Pool(sized, plan_memory(sized, size))


def crossing(
    rate: float = FREE, *, mode: str = "after_prefill", setup_ticks: int = 0, decode_routing: Routing = "least_loaded",
    layers: int = 32, receive: float | None = None,
) -> Crossing:  # fmt: skip
    return Crossing(TransferRules(mode, setup_ticks, layers), rate, receive or rate, decode_routing)  # type: ignore[arg-type]


def split(
    requests: RequestTable,
    *,
    model: str = "llama-3.1-8b",
    strategy: str = "native",
    way: Crossing | None = None,
    prefills: int = 1,
    decodes: int = 1,
    spare: tuple[int, int] = (10_000, 10_000),
    routing: Routing = "round_robin",
    decode_engine: dict[str, Any] | None = None,
    **engine: Any,
) -> Split:
    """Two pools of one device and model."""
    longest = int((requests.prompt_tokens + requests.output_tokens).max())
    first = pool(deploy(model, strategy, replicas=prefills, **engine), longest, spare[0])
    second = pool(deploy(model, strategy, replicas=decodes, **{**engine, **(decode_engine or {})}), longest, spare[1])
    fits = longest
    for one in (first, second):
        fits = min(fits, longest_prompt(one.deployment, one.plan.num_blocks * one.plan.block_bytes, longest))
        if not one.deployment.engine.enable_chunked_prefill:
            fits = min(fits, one.deployment.engine.max_num_batched_tokens)
    return Split(first, second, way or crossing(), requests, fits, routing)


@st.composite
def splits(draw: st.DrawFn, tables: st.SearchStrategy[RequestTable] = ANY_TABLE) -> Split:
    """Any small run of two pools."""
    model = draw(st.sampled_from(("llama-3.1-8b", "llama-3.1-8b", "gemma-3-1b", "qwen3-next-80b-a3b")))
    strategy = draw(st.sampled_from(("native", "native", "fp8", "kivi-4(residual_length=32)", "streaming_llm:24",
                                     "snapkv(budget_tokens=40,window_size=8)", "quest:32")))  # fmt: skip
    batched = draw(st.sampled_from((8, 24, 64, 512)))
    seqs = st.sampled_from((1, 2, 3, 8))
    way = crossing(
        draw(st.sampled_from((1e7, 3e8, 5e9, FREE))), mode=draw(st.sampled_from(("after_prefill", "layerwise"))),
        setup_ticks=draw(st.sampled_from((0, 10**9))), layers=draw(st.sampled_from((1, 2, 32))),
        decode_routing=draw(st.sampled_from(("round_robin", "least_loaded", "prefix_aware"))),
    )  # fmt: skip
    if draw(st.booleans()):
        way = replace(way, receive_bytes_per_s=way.receive_bytes_per_s * draw(st.sampled_from((0.5, 3.0))))
    return split(
        draw(tables), model=model, strategy=strategy, way=way, prefills=draw(st.sampled_from((1, 1, 2))),
        decodes=draw(st.sampled_from((1, 1, 2, 3))),
        spare=(draw(st.sampled_from((0, 1, 4, 10_000))), draw(st.sampled_from((0, 1, 4, 10_000)))),
        routing=draw(st.sampled_from(("round_robin", "least_loaded", "prefix_aware"))),
        max_num_batched_tokens=batched, max_num_seqs=min(batched, draw(seqs)),
        enable_chunked_prefill=draw(st.sampled_from((True, True, False))), async_scheduling=draw(AHEAD),
        decode_engine={"max_num_seqs": min(batched, draw(seqs))},
    )  # fmt: skip


def admitted(case: Split) -> np.ndarray:
    return case.requests.prompt_tokens + case.requests.output_tokens <= case.max_model_len


__all__ = ["FREE", "Split", "admitted", "build_case", "crossing", "pool", "split", "splits"]
