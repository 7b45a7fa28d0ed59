"""What an adaptive compression did."""

from __future__ import annotations

from kvsim.report.figure import Figure
from kvsim.specs.base import Spec


class LevelUse(Spec):
    """One level of an adaptive compression in a run."""

    level: int
    compression: str
    kv_bytes_per_token: float
    """All layers, summed over tensor-parallel ranks."""
    prompts: int
    """Prompts let in at this level; one that was preempted counts again."""
    tokens_decoded: int
    """Tokens that decode steps made from a cache at this level."""
    policy_s: float
    """How long the policy stood here, summed over replicas."""


class ClassUse(Spec):
    """One class of requests in an adaptive run."""

    name: str
    completed: int
    tokens_decoded: tuple[int, ...]
    """By level."""
    reduced_share: Figure
    """Share of them decoded at a level after the first."""
    ttft_p99_s: Figure
    tpot_median_s: Figure


class AdaptiveAction(Spec):
    """One act of the policy. Encoding running sequences again keeps the level and names how many."""

    time_s: float
    replica: int
    from_level: int
    to_level: int
    reason: str
    kv_utilization: float
    """Share of the pool in use when it acted."""
    waiting: int
    requantized_sequences: int
    freed_bytes: int
    """On one tensor-parallel rank."""


class PolicyOutcome(Spec):
    """What a policy gave on these requests, central edge: the adaptive one, or a level held throughout."""

    policy: str
    compression: str
    reason: str | None = None
    """Why it cannot run."""
    duration_s: Figure = Figure(value=None)
    queue_delay_mean_s: Figure = Figure(value=None)
    ttft_p99_s: Figure = Figure(value=None)
    tpot_median_s: Figure = Figure(value=None)
    e2el_p99_s: Figure = Figure(value=None)
    output_throughput: Figure = Figure(value=None)
    request_goodput: Figure = Figure(value=None)
    preemptions: int | None = None
    reduced_share: Figure = Figure(value=None)
    """Share of tokens decoded at a level after the first: how much the loss of quality could touch."""


class AdaptiveUse(Spec):
    """When an adaptive compression acted, on what, and what that bought. All of the central edge."""

    levels: tuple[LevelUse, ...]
    classes: tuple[ClassUse, ...]
    actions: tuple[AdaptiveAction, ...]
    """The first ones of all replicas in order of time; ``total_actions`` counts all."""
    total_actions: int
    tightened: int
    relaxed: int
    requantized_sequences: int
    requantized_tokens: int
    requantize_freed_bytes: int
    """Over all replicas, on one tensor-parallel rank each."""
    requantize_s: float
    """Time that steps took longer for it."""
    reduced_share: Figure
    """Share of decoded tokens at a level after the first."""
    outcomes: tuple[PolicyOutcome, ...]
    """This policy, then each level held throughout, on the same requests."""
