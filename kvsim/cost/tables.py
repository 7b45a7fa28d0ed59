"""Prices of steps as integer tables over tokens and batch size, for the simulator's hot loop."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from kvsim.cost.step import StepModel
from kvsim.ops import Numeric
from kvsim.units import TICKS_PER_SECOND


@dataclass(frozen=True)
class DraftTicks:
    """Drafting of a decode batch, by its sequences: passes after the first by component, and all of it."""

    weights: list[int]
    communication: list[int]
    overhead: list[int]
    attention: list[int]
    """Attention of all passes that does not grow with context."""
    later: list[int]
    """Sum of the above: what comes on top of the first pass, which is part of the tables over tokens."""
    whole: list[int]


@dataclass(frozen=True)
class StepTables:
    """Integer tick tables for the simulator's hot loop.

    ``base[t]``: a step of t tokens; ``head[n]``: what n sampled sequences add (LM head, gathering logits, sampling);
    ``step[n]``: a whole decode step of n sequences except what grows with context (``base[n]``, ``head[n]``, attention
    floor, per-sequence work); the rest splits those sums for the report.

    Tokens and sequences are those of one lane, but for ``step`` and ``factors``, which go by the whole batch.
    """

    base: list[int]
    step: list[int]
    head: list[int]
    gather: list[int]
    sampling: list[int]
    weights: list[int]
    communication: list[int]
    overhead: list[int]
    attention_fixed: list[int]
    compression_fixed: list[int]
    first_chunk: list[int]
    """Prefill attention of a prompt's first chunk, by its tokens."""
    append_launch: int
    append: list[int]
    """Encoding the tokens of a prompt, by their number."""
    rows: int = 1
    """Rows of a decoding sequence in a step: 1 and its drafts. ``base`` and ``head`` are looked up at all rows."""
    drafting: DraftTicks | None = None
    factors: list[int] | None = None
    """By batch size, what the part that grows with context is multiplied by; None where there is one lane."""


def build_tables(step: StepModel, max_tokens: int, max_sequences: int) -> StepTables:
    """Price a lane's tokens up to ``max_tokens``, and batches up to ``max_sequences`` of each data parallel rank."""
    terms = step.token_terms(np.arange(max_tokens + 1, dtype=np.float64))
    weights, communication, overhead = (
        _ticks(part) for part in (terms.weights_s, terms.communication_s, terms.overhead_s)
    )
    base = weights + communication + overhead
    first_chunk, _ = step.prefill_attention_seconds(np.arange(1, max_tokens + 1, dtype=np.float64), 0)
    # Sequences are spread over lanes evenly but for one: a lane may have that many more for a step.
    parallel = step.deployment.parallelism
    most = max_sequences + (parallel.lanes if parallel.lanes > 1 else 0)
    sequences = np.arange(most + 1, dtype=np.float64)
    attention, compression = step.decode_fixed_seconds(sequences)
    gather, sampling = _ticks(step.gather_seconds(sequences)), _ticks(step.sampling_seconds(sequences))
    head = _ticks(step.head_seconds(sequences)) + gather + sampling
    attention_ticks, compression_ticks = _ticks(attention), _ticks(compression)
    of_lane = base[: most + 1] + head + attention_ticks + compression_ticks
    in_batch = -(-np.arange(max_sequences * parallel.data + 1) // parallel.lanes)
    return StepTables(
        base=base.tolist(),
        step=of_lane[in_batch].tolist(),
        head=head.tolist(),
        gather=gather.tolist(),
        sampling=sampling.tolist(),
        weights=weights.tolist(),
        communication=communication.tolist(),
        overhead=overhead.tolist(),
        attention_fixed=attention_ticks.tolist(),
        compression_fixed=compression_ticks.tolist(),
        first_chunk=[0, *_ticks(first_chunk).tolist()],
        append_launch=round(step.append_launch_s * TICKS_PER_SECOND),
        append=_ticks(np.arange(max_tokens + 1, dtype=np.float64) * step.append_s_per_token).tolist(),
        factors=parallel.lane_factors(max_sequences * parallel.data) if parallel.lanes > 1 else None,
    )


def in_parts(tables: StepTables, part_tokens: int) -> StepTables:
    """Tables of an engine that computes at most ``part_tokens`` at once: llama.cpp's ``n_ubatch``.

    What depends on a step's tokens is paid part by part, so that each reads the weights; attention over a cut prompt
    is that of the whole.
    """

    def cut(table: list[int]) -> list[int]:
        whole = table[min(part_tokens, len(table) - 1)]
        return [tokens // part_tokens * whole + table[tokens % part_tokens] for tokens in range(len(table))]

    if part_tokens >= len(tables.base) - 1:
        return tables
    return replace(
        tables,
        base=cut(tables.base),
        weights=cut(tables.weights),
        communication=cut(tables.communication),
        overhead=cut(tables.overhead),
    )


def _ticks(seconds: Numeric) -> npt.NDArray[np.int64]:
    return np.rint(np.asarray(seconds, dtype=np.float64) * TICKS_PER_SECOND).astype(np.int64)
