"""Decoding sequences that gain several tokens a step: what each of their steps takes, laid out ahead.

How many tokens each verification gives is drawn when a sequence joins, so its whole life is known: the ticks that it
adds to each step and the blocks that each step needs are written on a line of the batch's steps, and runs of steps are
sums over that line. With no drafts all of it equals :class:`~kvsim.sim.batch.DecodeBatch`.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

from kvsim.compression.base import TokenCurve
from kvsim.cost.drafts import DraftContext
from kvsim.cost.profile import SequenceProfile
from kvsim.sim.acceptance import Acceptance, IntArray
from kvsim.sim.batch import DecodeBatch, SequenceState


@dataclass(frozen=True)
class SpeculationPlan:
    """What the batch must know of the drafts."""

    acceptance: Acceptance
    draft_tokens: int
    lookahead_tokens: int
    """Tokens after the one computed anyway that blocks are taken for: the drafts, and those that a model writes next
    (vLLM ``num_lookahead_tokens``, none for ngram)."""
    max_model_len: int
    context: DraftContext | None
    """Ticks that drafting adds for a sequence's context; None where drafts are free."""


@dataclass(frozen=True)
class _Life:
    """One sequence from joining on; arrays over its steps."""

    first: int
    """Verifications of the request before."""
    gained: IntArray
    """Tokens gained before each step, and after the last."""
    ticks: IntArray
    draft: IntArray
    """The part of ``ticks`` that drafting takes."""
    unpack: IntArray
    held: IntArray
    """Bytes of its growing blocks before the first step, then from each step on."""


class SpeculativeBatch(DecodeBatch):
    """A batch whose sequences gain one token and the accepted drafts in each step."""

    def __init__(self, block_size: int, block_bytes: int, token_ticks: int, plan: SpeculationPlan) -> None:
        super().__init__(block_size, block_bytes, token_ticks)
        self._plan = plan
        self._lives: dict[int, _Life] = {}
        self._verified: dict[int, int] = {}
        self._ticks, self._due = np.zeros(1024, dtype=np.int64), np.zeros(1024, dtype=np.int64)
        self._base = 0
        """Step that the two lines begin with."""
        self.draft_total = 0
        """Ticks of drafting over contexts, of sequences that left."""
        self.verifications = 0
        self.tokens_out = 0

    def join(self, sequence: SequenceState, steps: int) -> None:
        """Let a sequence decode for ``steps`` tokens from the next step on."""
        life = self._lives[sequence.index] = self._live(sequence, steps)
        count = len(life.ticks)
        sequence.joined = self.counter
        sequence.finish = self.counter + count
        sequence.ticks = sequence.slope = 0
        sequence.order = self.next_order()
        heapq.heappush(self.finishing, (sequence.finish, sequence.order, sequence))
        self.active[sequence.index] = sequence
        self.size += 1
        self._write(life, 0, 1)

    def remove(self, sequence: SequenceState) -> int:
        """Take a sequence out of every sum; the bytes that it held."""
        steps = self.counter - sequence.joined
        life = self._lives.pop(sequence.index)
        sequence.alive = False
        del self.active[sequence.index]
        self.size -= 1
        self._write(life, steps, -1)
        if steps < len(life.ticks):
            self._verified[sequence.index] = life.first + steps
        self.draft_total += int(life.draft[:steps].sum())
        self.unpack_total += int(life.unpack[:steps].sum())
        self.verifications += steps
        self.tokens_out += int(life.gained[steps])
        return int(life.held[steps]) + sequence.held

    def gained(self, sequence: SequenceState) -> int:
        """Tokens that a decoding sequence has gained since it joined."""
        return int(self._lives[sequence.index].gained[self.counter - sequence.joined])

    def newest(self, sequence: SequenceState) -> int:
        """Tokens of those that came with the latest step."""
        steps = self.counter - sequence.joined
        gained = self._lives[sequence.index].gained
        return int(gained[steps] - gained[steps - 1]) if steps else 0

    def growing_bytes(self, sequence: SequenceState) -> int:
        """Bytes of a decoding sequence's blocks, those for drafts included."""
        return int(self._lives[sequence.index].held[self.counter - sequence.joined])

    def due_bytes(self) -> int:
        """Bytes of new blocks that the next step needs."""
        return int(self._due[self.counter - self._base])

    def advance(self, steps: int) -> int:
        """Take ``steps`` steps; the bytes of new blocks that took."""
        start = self.counter - self._base
        due = int(self._due[start : start + steps].sum())
        self.counter += steps
        self._make_line(1)
        self.variable = int(self._ticks[self.counter - self._base])
        return due

    def steps_until_bend(self) -> int | None:
        """None: every step's ticks are on the line."""
        return None

    def steps_until_dry(self, free_bytes: int) -> int:
        """How many steps ``free_bytes`` of new blocks allow, as far as the first sequence's end."""
        ahead = self.finishing[0][0] - self.counter
        start = self.counter - self._base
        return int(np.searchsorted(np.cumsum(self._due[start : start + ahead]), free_bytes, side="right"))

    def durations(self, fixed_ticks: int, steps: int) -> IntArray:
        """Ticks of each of the next ``steps`` steps."""
        start = self.counter - self._base
        ticks: IntArray = self._ticks[start : start + steps] + fixed_ticks
        return ticks

    # --- one sequence -----------------------------------------------------------------------------------------------

    def _live(self, sequence: SequenceState, tokens: int) -> _Life:
        plan, profile, target = self._plan, sequence.profile, sequence.target
        first = self._verified.pop(sequence.index, 0)
        advances = plan.acceptance.advances(sequence.index, first, tokens)
        gained = np.concatenate([[0], np.cumsum(advances)])
        before = gained[:-1]
        if profile is None:
            ticks = self.token_ticks * (target + 1 + plan.draft_tokens + before)
            unpack = np.zeros_like(ticks)
        else:
            ticks, unpack = profile.ticks_at(before + plan.draft_tokens)
        draft = np.zeros_like(ticks) if plan.context is None else plan.context.ticks(target, before, ticks)
        return _Life(first, gained, ticks + draft, draft, unpack, self._held(profile, target, before))

    def _held(self, profile: SequenceProfile | None, target: int, before: IntArray) -> IntArray:
        """Bytes of blocks before the first step and from each step on."""
        plan, size = self._plan, self.block_size
        needed = np.minimum(before + 1 + plan.lookahead_tokens, max(0, plan.max_model_len - target))
        needed = np.concatenate([[0], np.maximum(needed, before + 1)])
        if profile is None:
            held: IntArray = -(-(target + needed) // size) * self.block_bytes
            return held
        held = np.zeros_like(needed)
        for growth in profile.growths:
            held += -(-_tokens(growth.curve, needed) // size) * growth.block_bytes
        # Blocks that a cut empties stay with the sequence: drafts may still need them in the same step.
        rising: IntArray = np.maximum.accumulate(held)
        return rising

    # --- the line ---------------------------------------------------------------------------------------------------

    def _write(self, life: _Life, start: int, sign: int) -> None:
        """Add what a sequence does from its step ``start`` on, which is the batch's next step, or take it away."""
        count = len(life.ticks) - start
        self._make_line(count)
        here = self.counter - self._base
        self._ticks[here : here + count] += sign * life.ticks[start:]
        self._due[here : here + count] += sign * np.diff(life.held)[start:]
        self.variable = int(self._ticks[here])

    def _make_line(self, ahead: int) -> None:
        """Let the line reach ``ahead`` steps, and forget what is past."""
        here = self.counter - self._base
        length = len(self._ticks)
        if here + ahead < length:
            return
        size = max(length, 2 * (ahead + 1), 2 * (length - here))
        for name in ("_ticks", "_due"):
            line = np.zeros(size, dtype=np.int64)
            rest = getattr(self, name)[here:]
            line[: len(rest)] = rest
            setattr(self, name, line)
        self._base = self.counter


def _tokens(curve: TokenCurve, generated: IntArray) -> IntArray:
    """A curve at many points."""
    table = np.array(curve.segments, dtype=np.int64)
    local = generated
    if curve.period:
        since = np.maximum(generated - curve.repeats_from, 0)
        local = generated - since // curve.period * curve.period
    at = np.searchsorted(table[:, 0], local, side="right") - 1
    tokens: IntArray = table[at, 1] + table[at, 2] * (local - table[at, 0])
    return tokens
