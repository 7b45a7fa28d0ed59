"""Adaptive compression as a scenario states it: levels from most to least precise, and who chooses among them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator

from kvsim.compression import NamedCompression, parse_compression
from kvsim.errors import InvalidSpec, UnknownName
from kvsim.specs.adaptive import ClassLevels, Policy, PressurePolicy, Requantize, StaticPolicy
from kvsim.specs.base import Spec
from kvsim.specs.engine import SkippedLayers

MAX_LEVELS = 8


class AdaptiveLevel(Spec):
    """One compression, and the layers that it leaves alone."""

    compression: NamedCompression
    kv_cache_dtype_skip_layers: SkippedLayers | None = None
    """Layers that stay in the model's dtype at this level; None takes the engine's."""

    @property
    def name(self) -> str:
        """How tables show it."""
        skipped = ",".join(map(str, self.kv_cache_dtype_skip_layers or ()))
        return f"{self.compression.name} but {skipped}" if skipped else self.compression.name


def _level_from_text(value: Any) -> Any:
    return {"compression": value} if isinstance(value, str) else value


def _parse_named(levels: Any) -> Any:
    """Levels with those that are names parsed; one that does not exist is named by its number."""
    if not isinstance(levels, (list, tuple)):
        return levels
    return [_parse_at(index, level) for index, level in enumerate(levels)]


def _parse_at(index: int, level: Any) -> Any:
    try:
        return {"compression": parse_compression(level)} if isinstance(level, str) else level
    except (UnknownName, InvalidSpec) as error:
        error.locate(f"adaptive.levels.{index}")
        raise


NamedLevel = Annotated[AdaptiveLevel, BeforeValidator(_level_from_text)]


class Adaptive(Spec):
    """Levels and the policy that chooses among them while requests run."""

    levels: Annotated[tuple[NamedLevel, ...], BeforeValidator(_parse_named), Field(min_length=1, max_length=MAX_LEVELS)]
    """From most to least precise, each a strategy's name or a mapping."""
    policy: Policy = PressurePolicy()
    requantize: Requantize | None = None
    """What to do with running sequences under lasting pressure; None leaves them as they were admitted."""
    classes: dict[str, ClassLevels] = Field(default_factory=dict)
    """Per request class of the workload, the levels that it may be given."""
    baselines: bool = True
    """Also simulate every level by itself, so that the report can say what adapting bought."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for problem in self._problems():
            raise ValueError(problem)
        return self

    def _problems(self) -> Iterator[str]:
        last = len(self.levels) - 1
        if len(set(self.levels)) <= last:
            yield "levels: the same level is listed twice"
        if isinstance(self.policy, StaticPolicy) and self.policy.level > last:
            yield f"policy.level {self.policy.level} is not allowed; levels are numbered 0 to {last}"
        for name, allowed in self.classes.items():
            top = last if allowed.max_level is None else allowed.max_level
            if not allowed.min_level <= top <= last:
                yield f"classes.{name}: {allowed.min_level} to {top} is no range of the levels 0 to {last}"
        if self.requantize is None:
            return
        if isinstance(self.policy, StaticPolicy):
            yield "requantize: a static policy never changes its level, so there is nothing to encode again"
        parts = [(level.name, level.compression) for level in self.levels]
        selecting = [name for name, one in parts if one.selection.kind != "keep_all" or one.encoding.evicts]
        if selecting:
            yield (
                f"requantize: {selecting[0]} selects tokens, and scores for that exist at the end of a prompt only; "
                "levels must keep all tokens, or leave requantize out"
            )

    def bounds(self, class_name: str | None) -> tuple[int, int]:
        """Lowest and highest level that requests of a class may be given."""
        last = len(self.levels) - 1
        allowed = self.classes.get(class_name) if class_name is not None else None
        if allowed is None:
            return 0, last
        return allowed.min_level, last if allowed.max_level is None else allowed.max_level

    @property
    def only_level(self) -> int | None:
        """The one level that every request is given, whatever happens; None where several are possible."""
        if len(self.levels) == 1:
            return 0
        if not isinstance(self.policy, StaticPolicy):
            return None
        level = self.policy.level
        ranges = [self.bounds(name) for name in self.classes]
        return level if all(low <= level <= high for low, high in ranges) else None

    def held_at(self, level: int) -> Adaptive:
        """The same levels with a policy that never leaves one of them."""
        return self.model_copy(update={"policy": StaticPolicy(level=level), "requantize": None, "classes": {}})
