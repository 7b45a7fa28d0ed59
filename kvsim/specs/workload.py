"""What arrives: where the lengths come from, and when requests come."""

from __future__ import annotations

import itertools
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from kvsim.specs.base import Spec
from kvsim.units import Seconds

PositiveFloat = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(gt=0)]


class LogNormalLengths(Spec):
    """Token counts drawn from a lognormal, rounded and clipped."""

    kind: Literal["lognormal"] = "lognormal"
    median_tokens: PositiveFloat
    sigma: Annotated[float, Field(ge=0)]
    min_tokens: Count = 1
    max_tokens: Count

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_tokens > self.max_tokens:
            msg = "min_tokens exceeds max_tokens"
            raise ValueError(msg)
        return self


class ConstantLengths(Spec):
    kind: Literal["constant"] = "constant"
    tokens: Count


class UniformLengths(Spec):
    kind: Literal["uniform"] = "uniform"
    min_tokens: Count
    max_tokens: Count

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_tokens > self.max_tokens:
            msg = "min_tokens exceeds max_tokens"
            raise ValueError(msg)
        return self


class QuantileLengths(Spec):
    """Token counts by linear interpolation between quantiles (inverse transform sampling)."""

    kind: Literal["quantiles"] = "quantiles"
    quantiles: Annotated[tuple[tuple[Annotated[float, Field(ge=0, le=1)], Count], ...], Field(min_length=2)]
    """(probability, tokens) pairs, both ascending, from probability 0 to 1."""

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        pairs = self.quantiles
        if pairs[0][0] != 0 or pairs[-1][0] != 1:
            msg = "quantiles must run from probability 0 to 1"
            raise ValueError(msg)
        if any(a[0] >= b[0] or a[1] > b[1] for a, b in itertools.pairwise(pairs)):
            msg = "quantiles must ascend"
            raise ValueError(msg)
        return self


Lengths = Annotated[LogNormalLengths | ConstantLengths | UniformLengths | QuantileLengths, Field(discriminator="kind")]


class PoissonArrivals(Spec):
    kind: Literal["poisson"] = "poisson"
    request_rate: PositiveFloat
    """Requests per second."""


class GammaArrivals(Spec):
    """Gamma inter-arrival times; burstiness < 1 is burstier than Poisson (vLLM bench's meaning)."""

    kind: Literal["gamma"] = "gamma"
    request_rate: PositiveFloat
    burstiness: PositiveFloat = 1.0


class ConstantArrivals(Spec):
    kind: Literal["constant"] = "constant"
    request_rate: PositiveFloat


class ConcurrencyArrivals(Spec):
    """Closed loop: a fixed number of clients, each sending its next request when the last one ends."""

    kind: Literal["concurrency"] = "concurrency"
    max_concurrency: Count
    think_time_s: Seconds = 0.0


class ReplayArrivals(Spec):
    """The trace's own timestamps, optionally sped up."""

    kind: Literal["replay"] = "replay"
    speedup: PositiveFloat = 1.0


class BurstArrivals(Spec):
    """Everything at time zero (offline batch; vLLM bench's ``--request-rate inf``)."""

    kind: Literal["burst"] = "burst"


SyntheticArrivals = Annotated[
    PoissonArrivals | GammaArrivals | ConstantArrivals | ConcurrencyArrivals | BurstArrivals,
    Field(discriminator="kind"),
]
TraceArrivals = Annotated[
    ReplayArrivals | PoissonArrivals | GammaArrivals | ConstantArrivals | ConcurrencyArrivals | BurstArrivals,
    Field(discriminator="kind"),
]


class Conversations(Spec):
    """Multi-turn sessions: each turn's prompt is the whole conversation so far plus a new message."""

    turns: Lengths
    """Number of turns per session (its ``tokens`` fields count turns)."""
    think_time_s: Seconds = 10.0
    """Mean of the exponential pause between an answer and the next turn."""
    first_input_len: Lengths | None = None
    """Tokens of the opening message without the shared prefix; None draws it from ``input_len`` like any other."""
    max_context_tokens: Count | None = None
    """A session ends before the turn whose prompt and answer would pass this."""


class RequestClass(Spec):
    """A kind of request: what an engine may treat differently from the others."""

    name: Annotated[str, Field(min_length=1)]
    share: PositiveFloat
    """Part of the requests (of the sessions, in conversations), relative to the other classes' shares."""
    priority: int = 0
    """vLLM's: lower values are served first where the engine schedules by priority."""
    input_len: Lengths | None = None
    """Prompt tokens of this class; None draws them as the workload does."""
    output_len: Lengths | None = None
    """Output tokens of this class; None draws them as the workload does."""


class SyntheticWorkload(Spec):
    """Lengths drawn from distributions."""

    kind: Literal["synthetic"] = "synthetic"
    num_prompts: Count = 1000
    input_len: Lengths
    """Prompt tokens of a request, or new tokens per turn in a conversation, without the shared prefix."""
    output_len: Lengths
    arrivals: SyntheticArrivals
    shared_prefix_tokens: Annotated[int, Field(ge=0)] = 0
    """System prompt at the head of every request."""
    num_shared_prefixes: Count = 1
    conversations: Conversations | None = None
    classes: tuple[RequestClass, ...] = ()
    """Kinds of requests, drawn independently for each request (session, in conversations)."""
    fitted_from: str | None = None
    """Public trace that the length distributions were fitted from, with licence."""

    @model_validator(mode="after")
    def _classes_fit(self) -> Self:
        names = [one.name for one in self.classes]
        if len(set(names)) < len(names):
            msg = "classes: every name must be there once"
            raise ValueError(msg)
        if self.conversations is not None and any(one.input_len or one.output_len for one in self.classes):
            msg = "classes: lengths of their own are for single requests; conversations draw all turns alike"
            raise ValueError(msg)
        return self


TraceFormat = Literal["azure", "mooncake", "burstgpt", "vllm_bench", "sharegpt", "columns"]


class TraceColumns(Spec):
    """Column names of a plain CSV, JSONL or Parquet trace (GuideLLM's argument names)."""

    timestamp_column: str | None = None
    """Seconds; None where arrivals are not replayed."""
    prompt_tokens_column: str = "prompt_tokens"
    output_tokens_column: str = "output_tokens"
    hash_ids_column: str | None = None
    hash_id_block_size: Count = 512
    class_column: str | None = None
    """Name of each request's class (text or numbers)."""
    priority_column: str | None = None
    """Whole numbers, lower served first; used by ``engine.scheduling_policy: priority``."""


class TraceWorkload(Spec):
    """Requests from a file."""

    kind: Literal["trace"] = "trace"
    format: TraceFormat
    path: str
    """Relative paths are taken from the scenario file's folder."""
    columns: TraceColumns | None = None
    max_requests: Count | None = None
    arrivals: TraceArrivals = ReplayArrivals()


WorkloadSpec = Annotated[SyntheticWorkload | TraceWorkload, Field(discriminator="kind")]
