"""The analytic answer: every request at the mean lengths, a steady state, no queue."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from kvsim.analysis import LoadShape, resident_bytes
from kvsim.closed_form import Split, SteadyState, StepTimes, decode_split, prefill_split, steady_state, total_seconds
from kvsim.cost.front_end import front_end
from kvsim.cost.priors import Edge
from kvsim.cost.step import StepModel
from kvsim.deployment import Deployment
from kvsim.energy import PhaseSeconds
from kvsim.memory import MemoryPlan
from kvsim.report import Counts
from kvsim.requests import RequestTable
from kvsim.statistics import Distribution
from kvsim.summary import Outcome

REFERENCE_S = 3600.0
"""The estimate speaks of one hour of steady state."""


@dataclass(frozen=True)
class LoadPrices:
    """What a step model says of a load's mean request, whatever the slots and replicas."""

    step: StepModel
    held_bytes: int
    """KV of the mean sequence at its end, on one rank."""
    prompt: Split
    """Seconds by component of its prefill."""
    times: StepTimes
    """Decode steps half-way through its answer."""


def price_load(step: StepModel, load: LoadShape) -> LoadPrices:
    """Price the mean request of ``load``."""
    steps = max(0, load.output_tokens - 1)
    times = StepTimes(step, load.prompt_tokens, steps // 2)
    return LoadPrices(step, resident_bytes(step, load), prefill_split(step, load.prompt_tokens), times)


def estimate_outcomes(
    steps: Mapping[Edge, StepModel], plans: Mapping[Edge, MemoryPlan], load: LoadShape
) -> tuple[tuple[Outcome, ...], float]:
    """One outcome per edge, with the pool that the edge leaves, and the central batch."""
    results = []
    batches = []
    for edge, step in steps.items():
        outcome, batch = estimate_outcome(price_load(step, load), step.deployment, plans[edge], load, edge)
        results.append(outcome)
        batches.append(batch)
    return tuple(results), batches[0]


def estimate_outcome(
    prices: LoadPrices, deployment: Deployment, plan: MemoryPlan, load: LoadShape, edge: Edge
) -> tuple[Outcome, float]:
    """(what an hour of steady state gives, sequences in a step).

    ``deployment`` may differ from that of ``prices`` in what no step's price depends on: replicas, slots, pool.
    """
    pool_bytes = plan.num_blocks * plan.block_bytes * deployment.parallelism.data
    fits = max(1.0, pool_bytes / max(prices.held_bytes, 1))
    slots = min(float(deployment.max_running), fits)
    rate = load.request_rate / deployment.replicas if load.request_rate is not None else None
    if load.concurrency is not None:
        slots = min(slots, max(1.0, load.concurrency / deployment.replicas))
    step, prompt = prices.step, prices.prompt
    taken_s = total_seconds(prompt) / prompts_together(step, prompt, load, rate, slots)
    state = steady_state(step, taken_s, load.prompt_tokens, load.output_tokens, rate, slots, prices.times)
    return _outcome(prices, deployment, state, load, edge), state.batch


def prompts_together(step: StepModel, prompt: Split, load: LoadShape, rate: float | None, slots: float) -> float:
    """Prompts that one turn of all lanes takes in, of those that take any, where arrivals are random; 1 for one lane.

    ``rate`` is that of one replica; None is a closed loop, whose ``slots`` clients send when they were answered.
    """
    lanes = step.deployment.lanes
    if lanes == 1:
        return 1.0
    prompt_s, generated = total_seconds(prompt), load.output_tokens // 2
    decode_s = total_seconds(decode_split(step, max(1, round(slots)), load.prompt_tokens, generated))
    if rate is None:
        rate = slots / (prompt_s + max(1, load.output_tokens - 1) * decode_s)
    arriving = rate * (prompt_s + decode_s)
    return min(float(lanes), arriving / -math.expm1(-arriving))


def _outcome(prices: LoadPrices, deployment: Deployment, state: SteadyState, load: LoadShape, edge: Edge) -> Outcome:
    prompt, replicas = prices.prompt, deployment.replicas
    completed = state.request_rate * replicas * REFERENCE_S
    steps = max(0, load.output_tokens - 1)
    # A new prompt waits for the rest of the running step, half of one on average where the engine is busy, and for
    # the one planned behind it where steps are planned ahead.
    ahead = 1.5 if deployment.engine.schedules_ahead else 0.5
    prompt_s = total_seconds(prompt)
    ttft_s = prompt_s + ahead * state.utilization * state.step_s + front_end(deployment, edge).overhead_s
    decode_s = steps * state.decode_token_s
    prefill = scaled(prompt, completed * state.prefill_s / prompt_s)
    batch = max(1, round(state.batch))
    per_step = prices.times.split(batch)
    total = sum(per_step.values())
    share = completed * steps * state.step_s / max(state.batch, 1.0) / total if total else 0.0
    decode = scaled(per_step, share)
    busy_prefill, busy_decode = sum(prefill.values()), sum(decode.values())
    idle_s = max(0.0, REFERENCE_S * replicas - busy_prefill - busy_decode)
    return Outcome(
        edge=edge,
        duration_s=REFERENCE_S,
        queue_delay_mean_s=None,
        ttft=mean_only(ttft_s),
        tpot=mean_only(state.decode_token_s if steps else None),
        itl=mean_only(state.decode_token_s if steps else None),
        e2el=mean_only(ttft_s + decode_s),
        completed=round(completed),
        good=None,
        input_tokens=round(completed * load.prompt_tokens),
        output_tokens=round(completed * load.output_tokens),
        phases=PhaseSeconds(busy_prefill, busy_decode, idle_s),
        prefill=prefill,
        decode=decode,
    )


def scaled(split: Split, factor: float) -> Split:
    """Seconds by component, all times ``factor``."""
    return {component: seconds * factor for component, seconds in split.items()}


def mean_only(mean_s: float | None) -> Distribution:
    """A distribution of which the mean alone is known."""
    return Distribution(0 if mean_s is None else 1, mean_s, None, None, None, None, None)


def estimate_counts(requests: RequestTable, batch: float) -> Counts:
    """The workload's totals; nothing was played, so there are no steps, waits or preemptions to report."""
    return Counts(
        num_prompts=len(requests),
        completed=len(requests),
        rejected=0,
        total_input_tokens=int(np.sum(requests.prompt_tokens)),
        total_output_tokens=int(np.sum(requests.output_tokens)),
        cached_prompt_tokens=0,
        recomputed_tokens=0,
        preemptions=0,
        engine_steps=0,
        max_concurrent_requests=max(1, round(batch)),
        max_waiting_requests=0,
    )
