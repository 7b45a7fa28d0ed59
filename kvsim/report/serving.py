"""What clients saw, and what the engine did for it."""

from __future__ import annotations

from kvsim.report.figure import Figure
from kvsim.specs.base import Spec


class LatencyStats(Spec):
    """Distribution of one latency in seconds; ``count`` is how many samples it rests on.

    A p99 of fewer than 100 samples is None.
    """

    count: int
    mean_s: Figure
    median_s: Figure
    std_s: Figure
    p90_s: Figure
    p95_s: Figure
    p99_s: Figure


class Latency(Spec):
    """vLLM bench's four latencies. TPOT excludes the first token: (e2el - ttft) / (output_tokens - 1).

    ITL pools every gap of every request.
    """

    ttft: LatencyStats
    tpot: LatencyStats
    itl: LatencyStats
    e2el: LatencyStats


class Throughput(Spec):
    """Rates over the run's duration."""

    request_throughput: Figure
    output_throughput: Figure
    total_token_throughput: Figure
    request_goodput: Figure
    """Requests per second that meet every SLO; unknown where none is set."""
    slo_attainment: Figure
    """Share of completed requests that meet every SLO."""


class Counts(Spec):
    """What happened to requests, tokens and steps. arrived = completed + rejected."""

    num_prompts: int
    completed: int
    rejected: int
    total_input_tokens: int
    total_output_tokens: int
    cached_prompt_tokens: int
    """Prompt tokens served from the prefix cache."""
    recomputed_tokens: int
    """Tokens processed again after preemption."""
    preemptions: int
    engine_steps: int
    max_concurrent_requests: int
    max_waiting_requests: int


class SpeculationOutcome(Spec):
    """What speculative decoding did in a run."""

    acceptance_length: float | None
    """Mean tokens that came out of one verification, the model's own included; answers that end early count as cut."""
    expected_acceptance_length: float
    """The same by the scenario's acceptance, for answers without end."""
    verifications: int
    """Steps of single sequences that verified drafts."""
    drafting_share: float | None
    """Part of decode steps' time that drafting took."""
