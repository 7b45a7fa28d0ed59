"""The strategies that a plan tries: built from the parts that kvsim has, with no list of its own."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Final

from kvsim.compression import CODINGS, ENCODINGS, REDUCTIONS, SELECTIONS, STRATEGIES, Compression, parse_compression
from kvsim.compression.base import StrategyPart
from kvsim.compression.parse import parse_part
from kvsim.compression.rules import Parts, conflicts
from kvsim.errors import InvalidSpec, NotRunnable
from kvsim.planner.request import Search

SIZES: Final = ("0.25", "0.5", "0.75", "0.9", "512", "1024", "2048", "4096")
"""What is tried behind a selection's name, as a share removed or a budget in tokens; what it refuses is left out."""
PAIRED_SIZES: Final = ("0.75",)
"""The same beside another part, where every size would be tried with every part."""
SLOTS: Final = ("selection", "reduction", "encoding", "coding")
PAIRS: Final = (
    ("selection", "encoding"),
    ("reduction", "encoding"),
    ("selection", "reduction"),
    ("encoding", "coding"),
)
PROBES: Final[Mapping[str, tuple[str, str]]] = {
    "vllm": ("fp8", "int4_per_token_head"),
    "sglang": ("fp8", "nvfp4"),
    "tensorrt_llm": ("fp8", "nvfp4"),
    "llamacpp": ("q8_0", "q4_0"),
}
"""An 8-bit and a 4-bit format of each engine, to tell devices apart by."""


def baselines(engine_kind: str) -> tuple[str, str]:
    """Give what every answer is compared with, at equal settings: no compression, and the engine's 8 bits."""
    return "native", PROBES[engine_kind][0]


@dataclass(frozen=True)
class StrategySpace:
    """Strategies to try, and why others that the parts could make are not among them."""

    strategies: tuple[Compression, ...]
    refused: tuple[tuple[str, int], ...]
    """(reason, how many pairs)"""

    @property
    def refused_alike(self) -> tuple[tuple[str, int], ...]:
        """One reason of those that differ in names alone, and how many these are."""
        counts: Counter[str] = Counter()
        examples: dict[str, str] = {}
        for reason, count in self.refused:
            alike = _without_names(reason)
            counts[alike] += count
            examples.setdefault(alike, reason)
        return tuple((examples[alike], count) for alike, count in counts.most_common())


@cache
def strategy_space() -> StrategySpace:
    """Every part alone and every pair of parts, the baselines first, then the named strategies."""
    refused: Counter[str] = Counter()
    found = dict.fromkeys(parse_compression(name) for name in ("native", "fp8", *STRATEGIES))
    found.update(dict.fromkeys(_singles()))
    found.update(dict.fromkeys(_pairs(refused)))
    kept = tuple(one for one in found if _can_serve(one, refused))
    return StrategySpace(kept, tuple(refused.most_common()))


def space_of(search: Search) -> StrategySpace:
    """Strategies that a request asks for: those it names, or all that the parts make, and its further ones."""
    space = strategy_space()
    if search.strategies:
        space = StrategySpace(tuple(map(parse_compression, search.strategies)), ())
    refused = Counter(dict(space.refused))
    further = _further(map(parse_compression, search.also), refused)
    strategies = tuple(dict.fromkeys((*space.strategies, *further)))
    return StrategySpace(strategies, tuple(refused.most_common()))


def _further(named: Iterable[Compression], refused: Counter[str]) -> Iterator[Compression]:
    for one in named:
        yield one
        if one.active_parts == (one.selection,):
            pairs = _with_each(one.selection, "selection", "encoding", parts("encoding"), refused)
            yield from (pair for pair in pairs if _can_serve(pair, refused))


def _without_names(reason: str) -> str:
    """A reason without the words that name parts."""
    names = _part_names()
    return " ".join(word for word in reason.split() if re.split(r"[+:(,.;]", word)[0] not in names)


@cache
def _part_names() -> frozenset[str]:
    kinds = (*SELECTIONS, *REDUCTIONS, *ENCODINGS, *CODINGS)
    return frozenset(name for kind in kinds for name in (*kind.names, str(kind.model_fields["kind"].default)))


@cache
def parts(slot: str, sizes: tuple[str, ...] = SIZES) -> tuple[StrategyPart, ...]:
    """Parts of one kind that do something, in the order of their union; selections with each of ``sizes``."""
    union = dict(zip(SLOTS, (SELECTIONS, REDUCTIONS, ENCODINGS, CODINGS), strict=True))[slot]
    found: dict[StrategyPart, None] = {}
    for kind in union:
        for name in (*kind.names, *kind.spellings, *(_sized(kind, sizes) if slot == "selection" else ())):
            part = _parsed(name)
            if part is not None and part.family != "baseline":
                found[part] = None
    return tuple(found)


def _sized(kind: type[StrategyPart], sizes: tuple[str, ...]) -> Iterator[str]:
    if kind.inline_fields:
        yield from (f"{name}:{size}" for name in kind.names for size in sizes)


def _parsed(name: str) -> StrategyPart | None:
    try:
        return parse_part(name)
    except InvalidSpec:
        return None


def _singles() -> Iterator[Compression]:
    for slot in ("selection", "reduction", "encoding"):
        yield from (Compression(**{slot: part}) for part in parts(slot))


def _pairs(refused: Counter[str]) -> Iterator[Compression]:
    for first, second in PAIRS:
        for one in parts(first, PAIRED_SIZES):
            yield from _with_each(one, first, second, parts(second, PAIRED_SIZES), refused)


def _with_each(
    one: StrategyPart, first: str, second: str, others: Iterable[StrategyPart], refused: Counter[str]
) -> Iterator[Compression]:
    """One part with each of others, where rules let them be a strategy."""
    plain = Compression()
    for other in others:
        chosen = {slot: getattr(plain, slot) for slot in SLOTS} | {first: one, second: other}
        reason = next(conflicts(Parts(**chosen)), None)
        if reason is None:
            yield Compression(**chosen)
        else:
            refused[reason] += 1


def _can_serve(compression: Compression, refused: Counter[str]) -> bool:
    """Whether attention can read it and a model that is there already can have it."""
    reason = compression.refused_in_pool or must_be_trained(compression)
    if reason is not None:
        refused[reason] += 1
    return reason is None


def must_be_trained(compression: Compression) -> str | None:
    """Why only a model that was trained so has this strategy, or None."""
    if compression.reduction.is_architecture:
        return f"{compression.reduction.kind} is a model's architecture; a model that has it needs no strategy for it"
    try:
        compression.selection.selector()
    except NotRunnable as error:
        return str(error)
    return None
