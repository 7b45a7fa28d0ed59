"""What adapting leaves behind: when it acted and why, and how much was decoded at which level."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Action:
    """One act of a replica's policy, in ticks and bytes. Re-encoding keeps the level."""

    at_ticks: int
    from_level: int
    to_level: int
    reason: str
    used_bytes: int
    waiting: int
    sequences: int = 0
    """Sequences encoded again."""
    freed_bytes: int = 0


@dataclass
class AdaptiveRecord:
    """Tallies of one replica."""

    levels: int
    classes: int
    start_level: int
    actions: list[Action] = field(default_factory=list)
    prompts: list[int] = field(init=False)
    """Prompts that were let in, by level; one that was preempted counts again."""
    tokens: list[list[int]] = field(init=False)
    """Tokens decoded, by class of request and level."""
    requantized_tokens: int = 0
    requantize_ticks: int = 0

    def __post_init__(self) -> None:
        self.prompts = [0] * self.levels
        self.tokens = [[0] * self.levels for _ in range(self.classes)]

    def level_ticks(self, end_ticks: int) -> list[int]:
        """How long the policy stood at each level."""
        spent, level, since = [0] * self.levels, self.start_level, 0
        for action in self.actions:
            spent[level] += action.at_ticks - since
            level, since = action.to_level, action.at_ticks
        spent[level] += max(0, end_ticks - since)
        return spent
