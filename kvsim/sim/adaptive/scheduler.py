"""The scheduler of a replica whose prompts are let in at different levels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvsim.sim.adaptive.batch import LevelledSequence, level_of
from kvsim.sim.adaptive.control import LevelControl
from kvsim.sim.adaptive.prefix_cache import LevelledPrefixCache
from kvsim.sim.adaptive.prices import PromptBytes
from kvsim.sim.batch import SequenceState
from kvsim.sim.scheduling import Chunk, PrefixSharing, Scheduler, SchedulerParts
from kvsim.sim.scheduling.vllm import PriorityScheduler, ThresholdScheduler, VllmScheduler
from kvsim.specs.engine import EngineSpec


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


class LevelScheduling(Scheduler):
    """Asks the policy before each step, and counts a prompt's bytes by its own level, over any of vLLM's policies."""

    _control: LevelControl
    _prompts: tuple[PromptBytes, ...]
    _level_sharing: LevelSharing | None
    _kept_level: dict[int, int]

    def equip(self, sharing: LevelSharing | None, prompts: tuple[PromptBytes, ...], control: LevelControl) -> None:
        """Say what differs between levels, and who chooses."""
        self._level_sharing = sharing
        self._prompts = prompts
        self._control = control
        self._kept_level = {}
        """At which level preempted requests left their blocks."""

    def new_sequence(self, index: int) -> SequenceState:
        """A request that may be let in, at the level that it would get now."""
        return LevelledSequence(index, self.prompt[index] + self.generated[index], self._control.level_for(index))

    def sharing_of(self, sequence: SequenceState) -> PrefixSharing | None:
        """A sequence finds and leaves units of its own level alone."""
        return self._level_sharing.levels[level_of(sequence)] if self._level_sharing is not None else None

    def kept_block_bytes(self, index: int) -> int:
        """Bytes of a block of a preempted request, of the level that it had."""
        return self._prompts[self._kept_level[index]].growths[0][1]

    def _give_up(self, sequence: SequenceState, held_bytes: int, known_tokens: int) -> None:
        self._kept_level[sequence.index] = level_of(sequence)
        super()._give_up(sequence, held_bytes, known_tokens)

    def find_again(self, sequence: SequenceState, reserved_bytes: int) -> None:
        """Blocks of the level that the request would get now; those of another are of no use to it."""
        if self._kept_level.get(sequence.index) == level_of(sequence):
            super().find_again(sequence, reserved_bytes)

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
        chunks: list[Chunk] = super().schedule(now_ticks, seats_taken, start_ticks)  # type: ignore[safe-super]
        return chunks

    def make_room(self, start_ticks: int) -> bool:
        """Encode sequences again if that is wanted, then preempt as far as the next tokens still do not fit."""
        self._control.make_room(start_ticks)
        if self.batch.due_bytes() <= self.free:
            return False
        return super().make_room(start_ticks)

    def note_seated(self, sequence: SequenceState) -> None:
        """Count a prompt at its level."""
        super().note_seated(sequence)
        self._control.note_prompt(sequence)


class AdaptiveScheduler(LevelScheduling, VllmScheduler):
    """First come first served."""


class AdaptiveThresholdScheduler(LevelScheduling, ThresholdScheduler):
    """With ``long_prefill_token_threshold``."""


class AdaptivePriorityScheduler(LevelScheduling, PriorityScheduler):
    """By priority."""


def adaptive_scheduler(engine: EngineSpec, parts: SchedulerParts) -> LevelScheduling:
    """The scheduler of the engine's options, which are vLLM's."""
    if engine.scheduling_policy == "priority":
        return AdaptivePriorityScheduler(parts, engine.long_prefill_token_threshold)
    if engine.long_prefill_token_threshold:
        return AdaptiveThresholdScheduler(parts, engine.long_prefill_token_threshold)
    return AdaptiveScheduler(parts)
