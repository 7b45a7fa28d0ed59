"""Closed forms over the step model: one prompt's prefill, one decode step, the steady state of a load."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from kvsim.cost.host import exposed_host_seconds
from kvsim.cost.step import StepModel
from kvsim.ops import Component
from kvsim.units import TICKS_PER_SECOND

Split = dict[Component, float]
"""Seconds by component."""


def total_seconds(split: Mapping[Component, float]) -> float:
    """Sum over components."""
    return sum(split.values())


def prefill_split(step: StepModel, prompt_tokens: int) -> Split:
    """Seconds by component of one prompt alone, in chunks of the token budget, up to its first token."""
    budget, stages = step.deployment.engine.tokens_at_once, step.deployment.parallelism.pipeline
    split = dict.fromkeys(Component, 0.0)
    done = 0
    while done < prompt_tokens:
        # Chunks follow each other through a pipeline's stages: a turn lasts as long as its slowest chunk.
        starts = range(done, min(prompt_tokens, done + stages * budget), budget)
        chunks = [_chunk_split(step, min(budget, prompt_tokens - start), start) for start in starts]
        for component, seconds in max(chunks, key=total_seconds).items():
            split[component] += seconds
        done += stages * budget
    _add_sampled(split, step, 1)
    split[Component.COMPRESSION] += step.sequences.profile(prompt_tokens).compress_ticks / TICKS_PER_SECOND
    return split


def _chunk_split(step: StepModel, tokens: int, context_tokens: int) -> Split:
    split = dict.fromkeys(Component, 0.0)
    _add_tokens(split, step, tokens)
    attention_s, unpack_s = step.prefill_attention_seconds(tokens, context_tokens)
    split[Component.ATTENTION] += float(attention_s)
    split[Component.COMPRESSION] += float(unpack_s) + step.append_launch_s + tokens * step.append_s_per_token
    split[Component.OVERHEAD] += exposed_host_seconds(step, 1, total_seconds(split))
    return split


def decode_split(step: StepModel, batch: int, prompt_tokens: int, generated_tokens: int) -> Split:
    """Seconds by component of one decode step of ``batch`` equal sequences."""
    split = dict.fromkeys(Component, 0.0)
    parallel = step.deployment.parallelism
    sequences, factor = parallel.sequences_per_lane(batch), parallel.lane_factor(batch)
    _add_tokens(split, step, sequences)
    _add_sampled(split, step, sequences)
    attention_s, compression_s = step.decode_fixed_seconds(sequences)
    segment_ticks, unpack_ticks = (factor * ticks for ticks in variable_ticks(step, prompt_tokens, generated_tokens))
    split[Component.ATTENTION] += float(attention_s) + batch * (segment_ticks - unpack_ticks) / TICKS_PER_SECOND
    split[Component.COMPRESSION] += float(compression_s) + batch * unpack_ticks / TICKS_PER_SECOND
    split[Component.OVERHEAD] += exposed_host_seconds(step, sequences, total_seconds(split))
    return split


def variable_ticks(step: StepModel, prompt_tokens: int, generated_tokens: int) -> tuple[int, int]:
    """Ticks that one sequence adds to a decode step: (whole, part due to the compression).

    Where the cache is cut back every so many steps, the mean over them, cut included. Where there are several lanes,
    times the batch's ``lane_factor``.
    """
    return step.sequences.profile(prompt_tokens).typical_ticks(generated_tokens)


def _add_tokens(split: Split, step: StepModel, tokens: int) -> None:
    terms = step.token_terms(tokens)
    split[Component.WEIGHTS] += float(terms.weights_s)
    split[Component.COMMUNICATION] += float(terms.communication_s)
    split[Component.OVERHEAD] += float(terms.overhead_s)


def _add_sampled(split: Split, step: StepModel, sampled: int) -> None:
    split[Component.WEIGHTS] += float(step.head_seconds(sampled))
    split[Component.COMMUNICATION] += float(step.gather_seconds(sampled))
    split[Component.OVERHEAD] += float(step.sampling_seconds(sampled))


@dataclass(frozen=True)
class SteadyState:
    """Mean-field balance of one replica: no queueing, every request at the mean lengths."""

    batch: float
    step_s: float
    """One decode step."""
    decode_token_s: float
    """Mean time between tokens of a sequence, prefill of others included."""
    prefill_s: float
    request_rate: float
    utilization: float


def steady_state(
    step: StepModel,
    prefill_s: float,
    prompt_tokens: int,
    output_tokens: int,
    request_rate: float | None,
    max_batch: float,
    table: StepTimes | None = None,
) -> SteadyState:
    """Balance a replica at ``request_rate`` (None: always ``max_batch`` requests, a closed loop).

    With n sequences decoding, a step takes t(n); requests leave at rate n / (output · t(n) / (1 - r·prefill)).
    Open loop: n grows until that equals the arrival rate r; beyond ``max_batch`` the replica is saturated.
    ``table`` saves pricing the same steps again where several loads are balanced.
    """
    steps = max(output_tokens - 1, 0)
    table = table or StepTimes(step, prompt_tokens, steps // 2)
    capacity_rate = _completion_rate(table, max_batch, steps, prefill_s)
    if request_rate is None or request_rate >= capacity_rate:
        return _balance(table, max_batch, steps, prefill_s, capacity_rate)
    batch = _matching_batch(table, request_rate, steps, prefill_s, max_batch)
    return _balance(table, batch, steps, prefill_s, request_rate)


def _matching_batch(table: StepTimes, request_rate: float, steps: int, prefill_s: float, max_batch: float) -> float:
    """Batch whose completions match ``request_rate``, which ``max_batch`` exceeds: steps · t(n) = n · (1/r - prefill).

    t is linear between whole batches, so the whole ones are bisected and the rest is solved.
    """
    spare_s = 1.0 / request_rate - prefill_s
    if steps * table(1) <= spare_s:
        return steps * table(1) / spare_s
    low, high = 1, math.ceil(max_batch)
    while high - low > 1:
        middle = (low + high) // 2
        if steps * table(middle) > middle * spare_s:
            low = middle
        else:
            high = middle
    slope_s = table(high) - table(low)
    return steps * (table(low) - low * slope_s) / (spare_s - steps * slope_s)


class StepTimes:
    """Decode step time over batch size, linear between two priced batches (the padded sizes beside it)."""

    def __init__(self, step: StepModel, prompt_tokens: int, generated_tokens: int) -> None:
        self._step = step
        self._lengths = (prompt_tokens, generated_tokens)
        self._memo: dict[int, Split] = {}
        self._totals: dict[int, float] = {}

    def __call__(self, batch: float) -> float:
        """Seconds of a step of ``batch``, which need not be whole."""
        whole = max(1, int(batch))
        part = batch - whole
        first = self._at(whole)
        return first if part <= 0 else first + part * (self._at(whole + 1) - first)

    def split(self, batch: int) -> Split:
        """Seconds by component of a step of a whole ``batch``; not to be changed."""
        if batch not in self._memo:
            self._memo[batch] = decode_split(self._step, batch, *self._lengths)
        return self._memo[batch]

    def _at(self, batch: int) -> float:
        if batch not in self._totals:
            self._totals[batch] = total_seconds(self.split(batch))
        return self._totals[batch]


def _completion_rate(table: StepTimes, batch: float, steps: int, prefill_s: float) -> float:
    """Requests per second that ``batch`` slots complete: each request takes its prefill and its share of steps."""
    if batch <= 0:
        return 0.0
    return 1.0 / (prefill_s + steps * table(batch) / batch)


def _balance(table: StepTimes, batch: float, steps: int, prefill_s: float, rate: float) -> SteadyState:
    step_s = table(batch)
    prefill_share = min(rate * prefill_s, 0.999)
    utilization = (
        min(1.0, rate * prefill_s + rate * steps * step_s / batch)
        if batch >= 1
        else min(1.0, rate * (prefill_s + steps * step_s))
    )
    return SteadyState(
        batch=batch,
        step_s=step_s,
        decode_token_s=step_s / (1.0 - prefill_share),
        prefill_s=prefill_s,
        request_rate=rate,
        utilization=utilization,
    )
