"""Speculative decoding of one run: its tables, its draws, and runs of steps that each last their own time."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

from kvsim.cost.drafts import DraftContext, Drafter, speculative_tables
from kvsim.cost.priors import Edge
from kvsim.cost.rates import build_rates
from kvsim.cost.step import StepModel
from kvsim.cost.tables import StepTables, build_tables
from kvsim.sim.acceptance import Acceptance, IntArray
from kvsim.sim.speculative_batch import SpeculationPlan
from kvsim.specs.speculation import SpeculativeConfig

STREAM = zlib.crc32(b"draft_acceptance")


@dataclass(frozen=True)
class Speculation:
    """What an engine needs to verify drafts."""

    plan: SpeculationPlan
    drafter: Drafter | None

    def prefill_attention_seconds(self, chunk_tokens: int, context_tokens: int) -> float:
        """Attention of the drafter's pass over a chunk that is not the first."""
        if self.drafter is None:
            return 0.0
        return float(self.drafter.prefill_attention_seconds(chunk_tokens, context_tokens))


def build_speculation(
    step: StepModel, config: SpeculativeConfig, edge: Edge, *, seed: int, max_model_len: int
) -> tuple[StepTables, Speculation]:
    """Tables of steps that verify drafts, and what else a run needs."""
    engine, drafts = step.deployment.engine, config.num_speculative_tokens
    drafter = _drafter(step, config, edge)
    most = max(engine.max_num_batched_tokens, engine.max_num_seqs * (drafts + 1))
    plain = build_tables(step, most, engine.max_num_seqs)
    tables = speculative_tables(plain, step, drafter, drafts, engine.max_num_seqs)
    key = int(np.random.SeedSequence(entropy=seed, spawn_key=(STREAM,)).generate_state(1, np.uint64)[0])
    plan = SpeculationPlan(
        acceptance=Acceptance(config.survival, key),
        draft_tokens=drafts,
        lookahead_tokens=drafts * (1 if drafter is None else 2),
        max_model_len=max_model_len,
        context=_context(step, drafter, drafts),
    )
    return tables, Speculation(plan, drafter)


def _drafter(step: StepModel, config: SpeculativeConfig, edge: Edge) -> Drafter | None:
    if config.method == "ngram" or not config.num_speculative_tokens:
        return None
    draft = step.deployment.draft
    if draft is None:
        return Drafter(step, 1.0 / step.deployment.model.num_layers)
    return Drafter(StepModel(draft, build_rates(draft.device, draft.priors, edge)), 1.0)


def _context(step: StepModel, drafter: Drafter | None, passes: int) -> DraftContext | None:
    if drafter is None:
        return None
    own = drafter.step.sequences if drafter.step is not step else None
    return DraftContext(passes, drafter.share, own)


def steps_until(lasting: IntArray, ends: IntArray, gap: int, *, overlaps: bool) -> int:
    """Steps of a run before an arrival ``gap`` ticks from now is looked at, all of them if it comes later.

    ``lasting`` and ``ends`` are the ticks of each step and their running sum. A step planned while the one before it
    runs takes in what had come when that one started.
    """
    steps = len(ends)
    if ends[-1] <= gap:
        return steps
    covering = int(np.searchsorted(ends, gap)) + 1
    if not overlaps:
        return covering
    if ends[-1] - lasting[-1] <= gap:
        return steps
    return 1 + covering if gap > 0 else 1
