"""Prompts of a step dealt to lanes: micro-batches of a pipeline, or data parallel ranks that share experts.

A step of the engine is one turn of every lane and lasts as long as the fullest. Decoding sequences are spread evenly; a
prompt's chunk goes whole to one data parallel rank, while a pipeline takes it in pieces of its token budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvsim.cost.step import StepModel
from kvsim.cost.tables import StepTables
from kvsim.deployment import Deployment
from kvsim.units import TICKS_PER_SECOND


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of a prompt that one lane processes: tokens after some already cached."""

    tokens: int
    context_tokens: int
    ends: bool
    """Whether the prompt is in with it, so that a token is sampled."""
    compress_ticks: int = 0


@dataclass(frozen=True, slots=True)
class LanePrompts:
    """What the prompts add to the fullest lane, in ticks, and what it has of them."""

    tokens: int
    ending: int
    attention: int
    compression: int
    tables: int
    """Ticks by the tables: linear layers, collectives, elementwise kernels, LM head and sampling."""

    @property
    def ticks(self) -> int:
        """Everything together."""
        return self.attention + self.compression + self.tables


def fill(pieces: Sequence[Piece], lanes: int, room_tokens: int) -> list[list[Piece]]:
    """Micro-batches in the order in which vLLM schedules them: each takes prompts until its budget is full.

    The last one takes what is left. A prompt that is cut goes on in the next micro-batch.
    """
    filled: list[list[Piece]] = [[]]
    room = room_tokens
    for piece in pieces:
        rest = piece
        while rest.tokens > room and len(filled) < lanes:
            if room > 0:
                filled[-1].append(Piece(room, rest.context_tokens, ends=False))
                rest = replace(rest, tokens=rest.tokens - room, context_tokens=rest.context_tokens + room)
            filled.append([])
            room = room_tokens
        filled[-1].append(rest)
        room -= rest.tokens
    return [lane for lane in filled if lane]


def deal(pieces: Sequence[Piece], lanes: int, seats: int) -> list[list[Piece]]:
    """Whole prompts to data parallel ranks: longest first, each to the rank with the fewest tokens; ties by order.

    A rank has ``seats`` free; more than that it gets only where no rank has one left, as sequences are spread unevenly.
    """
    dealt: list[list[Piece]] = [[] for _ in range(lanes)]
    held = [0] * lanes
    for piece in sorted(pieces, key=lambda one: -one.tokens):
        fewest = min(len(lane) for lane in dealt)
        lane = min(range(lanes), key=lambda one: (len(dealt[one]) >= max(seats, fewest + 1), held[one]))
        dealt[lane].append(piece)
        held[lane] += piece.tokens
    return [lane for lane in dealt if lane]


class LanePricing:
    """Prices the prompts of a step by the fullest lane."""

    def __init__(self, deployment: Deployment, step: StepModel, tables: StepTables) -> None:
        self._step, self._tables = step, tables
        self._parallel = deployment.parallelism
        self._budget, self._seats = deployment.engine.max_num_batched_tokens, deployment.engine.max_num_seqs

    def prompts(self, pieces: Sequence[Piece], decoding: int) -> LanePrompts:
        """What the pieces add to a step with ``decoding`` sequences, in the lane that takes longest."""
        parallel = self._parallel
        sequences = parallel.sequences_per_lane(decoding)
        if parallel.pipeline > 1:
            lanes = fill(pieces, parallel.lanes, self._budget - sequences)
        else:
            lanes = deal(pieces, parallel.lanes, self._seats - sequences)
        return max((self._lane(lane, sequences) for lane in lanes), key=lambda lane: lane.ticks)

    def _lane(self, pieces: Sequence[Piece], sequences: int) -> LanePrompts:
        tables = self._tables
        tokens, ending = sum(piece.tokens for piece in pieces), sum(piece.ends for piece in pieces)
        attention = 0
        compression = tables.append[tokens] + (0 if sequences else tables.append_launch)
        for piece in pieces:
            seconds, unpack_s = self._step.prefill_attention_seconds(piece.tokens, piece.context_tokens)
            attention += round(float(seconds) * TICKS_PER_SECOND)
            compression += round(float(unpack_s) * TICKS_PER_SECOND) + piece.compress_ticks
        base, head = tables.base, tables.head
        added = base[sequences + tokens] - base[sequences] + head[sequences + ending] - head[sequences]
        return LanePrompts(tokens, ending, attention, compression, added)
