"""Small deployments and workloads on which the simulator is tested, and how hypothesis draws them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from hypothesis import strategies as st

from kvsim.catalog import resolve
from kvsim.cost.priors import Edge
from kvsim.cost.rates import build_rates
from kvsim.cost.step import StepModel
from kvsim.deployment import Deployment
from kvsim.memory import MemoryPlan, plan_memory
from kvsim.pool import block_bytes, longest_prompt, prompt_bytes
from kvsim.requests import UNSCHEDULED, RequestTable
from kvsim.scenario import Scenario
from kvsim.sim.observer import RunObserver
from kvsim.sim.run import RunResult, run_requests
from kvsim.specs.engine import EngineSpec
from kvsim.specs.routing import Routing
from kvsim.units import TICKS_PER_SECOND

MS = TICKS_PER_SECOND // 1000
HASH_TOKENS = 16

STRATEGIES = (
    "native", "fp8", "int4_per_token_head", "kivi-4(residual_length=32)", "turboquant_k8v4", "turboquant_4bit_nc",
    "streaming_llm:24", "snapkv(budget_tokens=40,window_size=8)", "snapkv(compression_ratio=0.5,window_size=16)",
    "h2o:20", "h2o:0.5", "pyramidkv(budget_tokens=48,window_size=8)", "quest:32",
    "snapkv(compression_ratio=0.5,window_size=16)+kivi-2(residual_length=32)", "streaming_llm:40+fp8",
    "quest:32+fp8", "rkv:24(compression_interval=12)", "decoding:80(compression_interval=40)",
)  # fmt: skip
MODELS = (
    "llama-3.1-8b", "qwen2.5-0.5b", "gpt-oss-20b", "gemma-3-1b", "deepseek-v2-lite", "qwen3-next-80b-a3b",
    "deepseek-v3.2",
)  # fmt: skip
MLA = ("deepseek-v2-lite", "deepseek-v3.2")


@lru_cache(maxsize=512)
def base_deployment(model: str, strategy: str, engine: EngineSpec, replicas: int = 1, ranks: int = 1) -> Deployment:
    """Resolve once per set of names; a B300 holds every model here."""
    scenario = Scenario(
        model=model, device="b300-sxm", workload="chat", compression=strategy, engine=engine, replicas=replicas,
        tensor_parallel_size=ranks,
    )  # fmt: skip
    return resolve(scenario)


def deploy(model: str = "llama-3.1-8b", strategy: str = "native", **options: Any) -> Deployment:
    """A deployment; ``options`` are EngineSpec's, and ``replicas`` and ``ranks``. No front end unless asked for."""
    options.setdefault("request_overhead_s", 0.0)
    replicas, ranks = options.pop("replicas", 1), options.pop("ranks", 8 if model == "deepseek-v3.2" else 1)
    return base_deployment(model, strategy, EngineSpec(**options), replicas, ranks)


def step_model(deployment: Deployment) -> StepModel:
    return StepModel(deployment, build_rates(deployment.device, deployment.priors, Edge.CENTRAL))


def table(
    arrivals: list[int],
    prompts: list[int],
    outputs: list[int],
    *,
    parents: list[int] | None = None,
    delays: list[int] | None = None,
    hashes: tuple[tuple[int, ...], ...] | None = None,
    output_hashes: tuple[tuple[int, ...], ...] | None = None,
) -> RequestTable:
    """A request table from plain lists, times in ticks."""
    count = len(prompts)
    return RequestTable(
        arrival_ticks=np.array(arrivals, dtype=np.int64),
        prompt_tokens=np.array(prompts, dtype=np.int64),
        output_tokens=np.array(outputs, dtype=np.int64),
        delay_ticks=np.array(delays or [0] * count, dtype=np.int64),
        parent=np.array(parents or [-1] * count, dtype=np.int64),
        prefix_hashes=hashes,
        output_hashes=output_hashes,
        hash_block_tokens=HASH_TOKENS,
    )


@dataclass(frozen=True, eq=False)
class Case:
    """One run's input."""

    deployment: Deployment
    requests: RequestTable
    plan: MemoryPlan
    max_model_len: int
    routing: Routing = "round_robin"

    def play(self, *, coalesce: bool = True, observer: RunObserver | None = None) -> RunResult:
        return run_requests(
            self.deployment, self.requests, self.plan, self.max_model_len, routing=self.routing, coalesce=coalesce,
            observer=observer,
        )  # fmt: skip

    @property
    def is_dynamic(self) -> bool:
        return bool((self.requests.arrival_ticks == UNSCHEDULED).any())

    @property
    def admitted(self) -> np.ndarray:
        """Requests that fit ``max_model_len``."""
        return self.requests.prompt_tokens + self.requests.output_tokens <= self.max_model_len

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))

    def __repr__(self) -> str:
        r, e = self.requests, self.deployment.engine
        return (
            f"Case({self.deployment.model.name}, {self.deployment.compression.name}, x{self.deployment.replicas} "
            f"{self.routing}, blocks={self.plan.num_blocks}, seqs={e.max_num_seqs}, "
            f"batched={e.max_num_batched_tokens}, async={e.schedules_ahead}, "
            f"tiers={e.all_kv_tiers}, {e.kv_reload}, "
            f"chunked={e.enable_chunked_prefill}, stream={e.compression_stream}, len={self.max_model_len}, "
            f"arrivals={r.arrival_ticks.tolist()}, prompts={r.prompt_tokens.tolist()}, "
            f"outputs={r.output_tokens.tolist()}, parents={r.parent.tolist()}, delays={r.delay_ticks.tolist()}, "
            f"hashes={r.prefix_hashes}, output_hashes={r.output_hashes})"
        )


def build_case(
    deployment: Deployment,
    requests: RequestTable,
    *,
    spare_blocks: int = 10_000,
    routing: Routing = "round_robin",
    reject_longest: bool = False,
) -> Case:
    """Give a replica just the blocks that its longest request needs, and ``spare_blocks`` more."""
    lengths = np.sort(requests.prompt_tokens + requests.output_tokens)
    longest = int(lengths[-1])
    if reject_longest:
        longest = max(int(lengths[len(lengths) // 2]), 2)
    size = block_bytes(deployment)
    blocks = -(-prompt_bytes(deployment, longest) // size) + spare_blocks
    engine = deployment.engine.model_copy(update={"num_gpu_blocks_override": blocks})
    deployment = replace(deployment, engine=engine)
    plan = plan_memory(deployment, size)
    fits = longest_prompt(deployment, plan.num_blocks * plan.block_bytes, longest)
    if not engine.enable_chunked_prefill:
        fits = min(fits, engine.max_num_batched_tokens)
    return Case(deployment, requests, plan, fits, routing)


# --- drawing --------------------------------------------------------------------------------------------------------


@st.composite
def open_tables(draw: st.DrawFn, max_tokens: int = 160) -> RequestTable:
    """Bursts, simultaneous groups, and spread arrivals."""
    count = draw(st.integers(1, 9))
    span = draw(st.sampled_from((0, 1, 20, 400, 3000)))
    arrivals = sorted(draw(st.lists(st.integers(0, span), min_size=count, max_size=count)))
    prompts, outputs = draw(lengths(count, max_tokens)), draw(lengths(count, max_tokens))
    return table([a * MS for a in arrivals], prompts, outputs)


@st.composite
def closed_tables(draw: st.DrawFn, max_tokens: int = 120) -> RequestTable:
    """Clients that each send their next request when the last one ended, perhaps after a pause."""
    clients, rounds = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    count = clients * rounds
    prompts, outputs = draw(lengths(count, max_tokens)), draw(lengths(count, max_tokens))
    delays = [0] * clients + draw(
        st.lists(st.sampled_from((0, 7 * MS, 300 * MS)), min_size=count - clients, max_size=count - clients)
    )
    starts = sorted(draw(st.lists(st.sampled_from((0, 3 * MS, 900 * MS)), min_size=clients, max_size=clients)))
    return table(
        starts + [UNSCHEDULED] * (count - clients), prompts, outputs,
        parents=[-1] * clients + list(range(count - clients)), delays=delays,
    )  # fmt: skip


@st.composite
def shared_tables(draw: st.DrawFn) -> RequestTable:
    """Open arrivals whose prompts begin with one of two shared prefixes."""
    base = draw(open_tables())
    chunks = draw(st.integers(1, 6))
    owners = draw(st.lists(st.integers(0, 1), min_size=len(base), max_size=len(base)))
    prompts = base.prompt_tokens + chunks * HASH_TOKENS
    hashes = tuple(tuple(owner * 1000 + i for i in range(chunks)) for owner in owners)
    return replace(base, prompt_tokens=prompts, prefix_hashes=hashes)


@st.composite
def talk_tables(draw: st.DrawFn) -> RequestTable:
    """Conversations: each turn's prompt is all that was said before and a new message."""
    arrivals, prompts, outputs, parents, delays, heads, tails = [], [], [], [], [], [], []
    sessions = draw(st.integers(1, 4))
    for session in range(sessions):
        context, known = 0, 0
        start = draw(st.integers(0, 200)) * MS
        for turn in range(draw(st.integers(1, 3))):
            message, answer = draw(st.integers(1, 90)), draw(st.integers(1, 60))
            context += message
            parents.append(len(prompts) - 1 if turn else -1)
            arrivals.append(UNSCHEDULED if turn else start)
            delays.append(draw(st.sampled_from((0, 30 * MS, 500 * MS))) if turn else 0)
            prompts.append(context)
            outputs.append(answer)
            whole = (context + answer - 1) // HASH_TOKENS
            known = max(context // HASH_TOKENS, whole)
            ids = tuple(session * 1000 + i for i in range(known))
            heads.append(ids[: context // HASH_TOKENS])
            tails.append(ids[context // HASH_TOKENS : whole])
            context += answer
    return table(
        arrivals, prompts, outputs, parents=parents, delays=delays, hashes=tuple(heads), output_hashes=tuple(tails)
    )


def lengths(count: int, most: int) -> st.SearchStrategy[list[int]]:
    """Token counts, with block boundaries and single tokens more often than chance would have them."""
    one = st.one_of(st.integers(1, most), st.sampled_from((1, 15, 16, 17, 32, 48, 64)))
    return st.lists(one, min_size=count, max_size=count)


ANY_TABLE = st.one_of(open_tables(), open_tables(max_tokens=420), closed_tables(), shared_tables(), talk_tables())
SPARE_BLOCKS = st.sampled_from((0, 0, 1, 2, 5, 12, 10_000))
ANY_MODEL = st.sampled_from(("llama-3.1-8b", *MODELS))
ANY_STRATEGY = st.sampled_from(("native", *STRATEGIES))
NATIVE = st.just("native")
AHEAD = st.booleans()
BATCHED = st.sampled_from((8, 24, 64, 512))


@st.composite
def cases(
    draw: st.DrawFn,
    models: st.SearchStrategy[str] = ANY_MODEL,
    strategies: st.SearchStrategy[str] = ANY_STRATEGY,
    tables: st.SearchStrategy[RequestTable] = ANY_TABLE,
    stream: Literal["inline", "side"] = "inline",
) -> Case:
    """Any small run that the catalogue allows."""
    model, strategy = draw(models), draw(strategies)
    if model in MLA and strategy != "native":
        strategy = draw(st.sampled_from(("native", "fp8")))
    batched = draw(BATCHED)
    deployment = deploy(
        model, strategy, max_num_batched_tokens=batched, max_num_seqs=min(batched, draw(st.sampled_from((1, 2, 3, 8)))),
        enable_chunked_prefill=draw(st.sampled_from((True, True, True, False))), compression_stream=stream,
        replicas=draw(st.sampled_from((1, 1, 1, 2, 3))), async_scheduling=draw(AHEAD),
    )  # fmt: skip
    return build_case(
        deployment,
        draw(tables),
        spare_blocks=draw(SPARE_BLOCKS),
        routing=draw(st.sampled_from(("round_robin", "least_loaded", "prefix_aware"))),
        reject_longest=draw(st.sampled_from((False, False, False, True))),
    )


@st.composite
def tight_cases(
    draw: st.DrawFn,
    strategies: st.SearchStrategy[str] = NATIVE,
    tables: st.SearchStrategy[RequestTable] | None = None,
) -> Case:
    """Many short requests on one replica whose pool and budget hold few of them: chunks, preemption, eviction."""
    if tables is None:
        count = draw(st.integers(3, 10))
        arrivals = sorted(draw(st.lists(st.integers(0, 120), min_size=count, max_size=count)))
        prompts, outputs = draw(lengths(count, 60)), draw(lengths(count, 60))
        tables = st.just(table([a * MS for a in arrivals], prompts, outputs))
    deployment = deploy(
        strategy=draw(strategies), max_num_batched_tokens=draw(st.sampled_from((8, 10, 20, 24, 40))),
        max_num_seqs=draw(st.sampled_from((3, 5, 8))), block_size=draw(st.sampled_from((8, 16))),
        enable_prefix_caching=draw(st.booleans()), async_scheduling=draw(AHEAD),
    )  # fmt: skip
    return build_case(deployment, draw(tables), spare_blocks=draw(st.integers(0, 8)))


@st.composite
def routed_cases(draw: st.DrawFn) -> Case:
    """Several replicas under arrivals as dense as their steps are long."""
    count = draw(st.integers(4, 16))
    deployment = deploy(
        "qwen2.5-0.5b", max_num_batched_tokens=64, max_num_seqs=draw(st.sampled_from((1, 2, 8))),
        replicas=draw(st.sampled_from((2, 3))), async_scheduling=draw(AHEAD),
    )  # fmt: skip
    short = st.lists(st.integers(1, 12), min_size=count, max_size=count)
    ticks = st.lists(st.integers(0, 150), min_size=count, max_size=count)
    requests = table([a * MS // 10 for a in sorted(draw(ticks))], draw(short), draw(short))
    return build_case(deployment, requests, routing=draw(st.sampled_from(("round_robin", "least_loaded"))))


# --- reading a run --------------------------------------------------------------------------------------------------


def gap_counts(result: RunResult) -> Counter[int]:
    """Every inter-token gap of a run, in ticks, with how often it occurred."""
    gaps: Counter[int] = Counter()
    for record in result.records:
        gaps.update(record.gaps)
        for ticks, count in record.held_back:
            gaps[ticks] += count
        for steps, sequences, first, slope in record.runs:
            for step in range(steps):
                gaps[first + slope * step] += sequences
    return +gaps


def busy_ticks(result: RunResult) -> list[int]:
    """Ticks that each replica was busy."""
    return [record.prefill.total + record.decode.total + record.contention_ticks for record in result.records]
