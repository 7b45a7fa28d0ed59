"""What drafting costs: a draft model's own steps, or a head as a share of the model's layers.

One verification of n sequences with k drafts runs the model on n(k + 1) rows and reads each sequence's KV once.
Drafting before it takes k passes: the first over the rows that were just verified (the drafts' own KV must know them),
the others over one row a sequence (vLLM 0.15 ``v1/spec_decode/eagle.py``, ``EagleProposer.propose``, which draft models
share). An EAGLE or MTP head is one decoder layer and the model's LM head, so a pass of it costs its share of the
layers. Looking n-grams up in the prompt takes no device time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from kvsim.cost.sequence import SequenceModel
from kvsim.cost.step import StepModel, StepTerms
from kvsim.cost.tables import DraftTicks, StepTables
from kvsim.ops import Numeric
from kvsim.units import TICKS_PER_SECOND

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Drafter:
    """Who drafts, as a step model and the share of its layers that one pass runs."""

    step: StepModel
    share: float

    def token_terms(self, tokens: Numeric) -> StepTerms:
        """Layers of one pass over ``tokens`` rows."""
        terms = self.step.token_terms(tokens)
        return StepTerms(
            self.share * terms.weights_s, self.share * terms.communication_s, self.share * terms.overhead_s
        )

    def attention_seconds(self, sequences: Numeric) -> Numeric:
        """Decode attention of one pass whatever the context, and writing the new tokens."""
        attention, compression = self.step.decode_fixed_seconds(sequences)
        return self.share * (attention + compression)

    def prefill_attention_seconds(self, chunk_tokens: Numeric, context_tokens: int) -> Numeric:
        """Attention of the drafter's own pass over a prompt's chunk."""
        attention, unpack = self.step.prefill_attention_seconds(chunk_tokens, context_tokens)
        return self.share * (attention + unpack)


class DraftContext:
    """Ticks that k passes of drafting add for a sequence's context."""

    def __init__(self, passes: int, share: float, sequences: SequenceModel | None) -> None:
        """``sequences`` prices a draft model's own context; None takes a share of the model's own ticks."""
        self._passes = passes
        self._share = share
        self._sequences = sequences

    def ticks(self, target: int, gained: IntArray, verified_ticks: IntArray) -> IntArray:
        """Per step: the context after ``gained`` tokens, read once by each pass."""
        if self._sequences is None:
            shared: IntArray = self._passes * np.rint(self._share * verified_ticks).astype(np.int64)
            return shared
        own: IntArray = self._passes * self._sequences.profile(target).ticks_at(gained)[0]
        return own


def speculative_tables(
    plain: StepTables, step: StepModel, drafter: Drafter | None, draft_tokens: int, max_sequences: int
) -> StepTables:
    """Tables of one lane whose decode steps verify ``draft_tokens`` drafts per sequence.

    ``plain`` must reach all rows of a step; without drafts the answer equals it.
    """
    rows = draft_tokens + 1
    counts = np.arange(max_sequences + 1, dtype=np.float64)
    verified = rows * np.arange(max_sequences + 1)
    attention, compression = step.decode_fixed_seconds(counts)
    compression_fixed = _ticks(compression + draft_tokens * counts * step.append_s_per_token)
    sampled = np.arange(rows * max_sequences + 1, dtype=np.float64)
    gather, sampling = _ticks(step.gather_seconds(sampled)), _ticks(step.sampling_seconds(sampled))
    tables = replace(
        plain,
        head=(_ticks(step.head_seconds(sampled)) + gather + sampling).tolist(),
        gather=gather.tolist(),
        sampling=sampling.tolist(),
        attention_fixed=_ticks(attention).tolist(),
        compression_fixed=compression_fixed.tolist(),
        rows=rows,
    )
    if drafter is not None and draft_tokens:
        tables = _with_drafter(tables, drafter, draft_tokens, counts, verified)
    whole = (
        _array(tables.base)[verified] + _array(tables.head)[verified] + _array(tables.attention_fixed)
        + compression_fixed
    )  # fmt: skip
    if tables.drafting is not None:
        whole = whole + _array(tables.drafting.later)
    return replace(tables, step=whole.tolist())


def _with_drafter(
    tables: StepTables, drafter: Drafter, passes: int, counts: npt.NDArray[np.float64], verified: IntArray
) -> StepTables:
    """Add the first pass to every row of a step, and the later ones to its sequences."""
    tokens = np.arange(len(tables.base), dtype=np.float64)
    first = drafter.token_terms(tokens)
    later = drafter.token_terms(counts)
    weights = (passes - 1) * _ticks(later.weights_s) + passes * _ticks(drafter.step.head_seconds(counts))
    communication, overhead = ((passes - 1) * _ticks(part) for part in (later.communication_s, later.overhead_s))
    attention = passes * _ticks(drafter.attention_seconds(counts))
    first_ticks = [_ticks(part) for part in (first.weights_s, first.communication_s, first.overhead_s)]
    whole_first = first_ticks[0] + first_ticks[1] + first_ticks[2]
    later_ticks = weights + communication + overhead + attention
    chunk = _ticks(drafter.prefill_attention_seconds(tokens[1:], 0))
    return replace(
        tables,
        base=(_array(tables.base) + whole_first).tolist(),
        weights=(_array(tables.weights) + first_ticks[0]).tolist(),
        communication=(_array(tables.communication) + first_ticks[1]).tolist(),
        overhead=(_array(tables.overhead) + first_ticks[2]).tolist(),
        first_chunk=[0, *(_array(tables.first_chunk)[1:] + chunk).tolist()],
        drafting=DraftTicks(
            weights=weights.tolist(),
            communication=communication.tolist(),
            overhead=overhead.tolist(),
            attention=attention.tolist(),
            later=later_ticks.tolist(),
            whole=(whole_first[verified] + later_ticks).tolist(),
        ),
    )


def _array(values: list[int]) -> IntArray:
    return np.array(values, dtype=np.int64)


def _ticks(seconds: Numeric) -> IntArray:
    return np.rint(np.asarray(seconds, dtype=np.float64) * TICKS_PER_SECOND).astype(np.int64)
