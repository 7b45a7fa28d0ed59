"""What a scheduler is built from and works with: limits, shared prefixes, the queue, chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from kvsim.sim.batch import DecodeBatch, SequenceState
from kvsim.sim.prefix_cache import PrefixCache
from kvsim.sim.recorder import ReplicaRecord, RequestLog
from kvsim.sim.tiers.hierarchy import KvTiers

Chunk = tuple[SequenceState, int]
Leaving = tuple[int, SequenceState, int | None]
"""(order of joining, sequence, bytes that it holds, or None where a preemption has taken them)."""


@dataclass(frozen=True)
class SchedulerLimits:
    """Limits of one replica, and what a prompt holds while it is processed. Bytes are of one tensor-parallel rank."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int
    pool_bytes: int
    chunked_prefill: bool
    prefill_growths: tuple[tuple[int | None, int], ...]
    """(most tokens held or None, bytes of a block) per kind of layer."""
    fixed_bytes: int
    """Bytes per sequence whatever its length."""
    decode_tokens: int = 1
    """Tokens of a decoding sequence that a step computes: more than one where drafts are verified."""
    keeps_preempted: bool = False
    """Whether the blocks of a preempted sequence can be found again until they are used: prefix caching where every
    layer keeps all tokens."""
    plans_ahead: bool = False
    """A step is planned while the one before it runs, whose tokens are not known yet."""


@dataclass(frozen=True)
class PrefixSharing:
    """A replica's prefix cache, the hashes of every request's tokens, and how many tokens a hash stands for."""

    cache: PrefixCache
    hashes: Sequence[tuple[int, ...]]
    unit_tokens: int
    tiers: KvTiers | None = None
    """Where blocks go beside the device's pool."""


@dataclass(frozen=True)
class SchedulerParts:
    """What a scheduler shares with its engine."""

    limits: SchedulerLimits
    batch: DecodeBatch
    lengths: tuple[list[int], list[int]]
    """Prompt and output tokens per request."""
    generated: list[int]
    log: RequestLog
    record: ReplicaRecord
    sharing: PrefixSharing | None
    priority: Sequence[int] | None = None
    """Per request, lower first; None where all are equal."""


class WaitingQueue(Protocol):
    """Requests that nothing was computed for yet, or that lost it, in the order in which they are to go on."""

    def append(self, index: int, /) -> None:
        """Add an arrival."""

    def appendleft(self, index: int, /) -> None:
        """Add a request that lost its blocks."""

    def popleft(self) -> int:
        """Take the next one out."""

    def clear(self) -> None:
        """Take all out."""

    def __getitem__(self, position: int, /) -> int:
        """Look at one; only position 0 is sure to be the next."""

    def __len__(self) -> int:
        """How many wait."""
