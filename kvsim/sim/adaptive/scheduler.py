"""The scheduler of a replica whose prompts are let in at different levels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvsim.sim.adaptive.batch import LevelledSequence, level_of
from kvsim.sim.adaptive.control import LevelControl
from kvsim.sim.adaptive.prefix_cache import LevelledPrefixCache
from kvsim.sim.adaptive.prices import PromptBytes
from kvsim.sim.batch import DecodeBatch, SequenceState
from kvsim.sim.recorder import ReplicaRecord, RequestLog
from kvsim.sim.scheduler import Chunk, PrefixSharing, Scheduler, SchedulerLimits
from kvsim.sim.tiers.reload import Reload


@dataclass(frozen=True)
class LevelSharing:
    """The prefix cache of a pool of several levels: as a whole, and as sequences of each level see it."""

    whole: PrefixSharing
    levels: tuple[PrefixSharing, ...]


def level_sharing(unit_bytes: Sequence[int], hashes: Sequence[tuple[int, ...]], unit_tokens: int) -> LevelSharing:
    """A prefix cache for levels whose units of ``unit_tokens`` take so many bytes."""
    cache = LevelledPrefixCache(unit_bytes)
    levels = tuple(PrefixSharing(one, hashes, unit_tokens) for one in cache.levels)
    return LevelSharing(PrefixSharing(cache, hashes, unit_tokens), levels)


class AdaptiveScheduler(Scheduler):
    """Asks the policy before each step, and counts a prompt's bytes by its own level."""

    def __init__(
        self,
        limits: SchedulerLimits,
        batch: DecodeBatch,
        lengths: tuple[list[int], list[int]],
        generated: list[int],
        log: RequestLog,
        record: ReplicaRecord,
        sharing: LevelSharing | None,
        prompts: tuple[PromptBytes, ...],
        control: LevelControl,
    ) -> None:
        super().__init__(limits, batch, lengths, generated, log, record, sharing.whole if sharing else None)
        self._level_sharing = sharing
        self._prompts = prompts
        self._control = control
        self._kept_level: dict[int, int] = {}
        """At which level preempted requests left their blocks."""

    def new_sequence(self, index: int, target: int) -> SequenceState:
        """A request that may be let in, at the level that it would get now."""
        return LevelledSequence(index, target, self._control.level_for(index))

    def sharing_of(self, sequence: SequenceState) -> PrefixSharing | None:
        """A sequence finds and leaves units of its own level alone."""
        return self._level_sharing.levels[level_of(sequence)] if self._level_sharing is not None else None

    def kept_block_bytes(self, index: int) -> int:
        """Bytes of a block of a preempted request, of the level that it had."""
        return self._prompts[self._kept_level[index]].growths[0][1]

    def _give_up(self, sequence: SequenceState, held_bytes: int, known_tokens: int) -> None:
        self._kept_level[sequence.index] = level_of(sequence)
        super()._give_up(sequence, held_bytes, known_tokens)

    def _found_again(self, index: int, target: int, reserved: int) -> int:
        """Blocks of the level that the request would get now; those of another are of no use to it."""
        if self._kept_level.get(index) != self._control.level_for(index):
            return 0
        return super()._found_again(index, target, reserved)

    def prompt_bytes(self, sequence: SequenceState, tokens: int) -> int:
        """Bytes held once ``tokens`` of a prompt are in, in its level's format."""
        prompt, size = self._prompts[level_of(sequence)], self.limits.block_size
        held = prompt.fixed_bytes
        for cap, block_bytes in prompt.growths:
            kept = tokens if cap is None or tokens < cap else cap
            held += -(-kept // size) * block_bytes
        return held

    def schedule(self, now_ticks: int, seats_taken: int, start_ticks: int) -> list[Chunk]:
        """Prompt chunks of the next step, after the policy has looked."""
        self._control.look(start_ticks)
        return super().schedule(now_ticks, seats_taken, start_ticks)

    def make_room(self, start_ticks: int) -> bool:
        """Encode sequences again if that is wanted, then preempt as far as the next tokens still do not fit."""
        self._control.make_room(start_ticks)
        if self.batch.due_bytes() <= self.free:
            return False
        return super().make_room(start_ticks)

    def _seat(
        self,
        sequence: SequenceState,
        need_bytes: int,
        pinned_bytes: int,
        cached_tokens: int,
        now_ticks: int,
        reload: Reload | None,
    ) -> None:
        super()._seat(sequence, need_bytes, pinned_bytes, cached_tokens, now_ticks, reload)
        self._control.note_prompt(sequence)
