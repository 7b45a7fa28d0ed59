"""Strategy names: vLLM's, kvpress's and the papers' spellings to a Compression and back to a line of description."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Annotated, Any, Final

from pydantic import BeforeValidator

from kvsim.compression.base import KvEncoding, StrategyPart
from kvsim.compression.coding.base import Coding
from kvsim.compression.reduction.base import Reduction
from kvsim.compression.selection.base import TokenSelection
from kvsim.compression.spelling import normalised
from kvsim.compression.stacked import StackedEncoding
from kvsim.compression.strategy import CODINGS, ENCODINGS, PLANS, REDUCTIONS, SELECTIONS, Compression
from kvsim.documents import validate
from kvsim.errors import InvalidSpec, UnknownName

_PARTS: Final[tuple[type[StrategyPart], ...]] = (*ENCODINGS, *REDUCTIONS, *CODINGS, *SELECTIONS)
_SLOTS: Final = (
    ("selection", "token selections", TokenSelection),
    ("reduction", "reductions", Reduction),
    ("encoding", "encodings", KvEncoding),
    ("coding", "codings", Coding),
)
"""(field of Compression, what two of them are called, base class), in the order of a strategy's name."""
_NEUTRAL: Final = ("keep_all", "full_width", "fixed_width")
_PIECE: Final = re.compile(r"\s*([^\s:()]+)\s*(?::\s*([^:()]*?)\s*)?(?:\(([^()]*)\))?\s*")
_PLAN: Final = re.compile(r"\s*(layer_plan|layer_encodings)\s*(?::\s*(\w+)\s*)?(?:\[(.*)\])?\s*")
_COMBINATIONS: Final = (
    "snapkv+fp8", "snapkv+kivi-2", "pyramidkv+fp8", "quest+fp8", "streaming_llm+fp8",
    "kv_adaquant:2/4", "kvtc:16", "kvtc:32", "int4_per_token_head+huffman", "kivi-2+rans",
    "snapkv+think", "think+kivi-4", "minicache+int4_per_token_head", "cla-2+fp8",
    "layer_plan:relative[snapkv:0.25;snapkv:0.75]", "layer_encodings:relative[turboquant_mse:3;turboquant_mse]",
)  # fmt: skip

STRATEGIES: Final[tuple[str, ...]] = (
    *(
        name
        for part in (*ENCODINGS, *REDUCTIONS, *SELECTIONS)
        for name in (*part.names, *part.spellings)
        if name not in _NEUTRAL
    ),
    *_COMBINATIONS,
)
"""Named strategies: every part that can stand by itself, and common combinations."""


def parse_compression(text: str) -> Compression:
    """Turn a strategy's name into a Compression.

    A name is one part, or up to one of each kind (selection, reduction, encoding, coding) joined by ``+`` in any order.
    vLLM's ``--kv-cache-dtype`` values
    and kvpress's class names are understood. ``snapkv:0.5`` sets compression_ratio (the fraction removed),
    ``snapkv:1024``, ``streaming_llm:2048`` and ``quest:1024`` a budget in tokens; ``kivi-2(residual_length=64)`` any
    parameter.

    Raises
    ------
    UnknownName
        No encoding or selection has that name; the nearest ones are suggested.
    InvalidSpec
        A parameter is wrong, or the name holds two encodings or two selections.
    """
    parts = [_parse_part(piece, text) for piece in text.split("+")]
    data: dict[str, StrategyPart] = {}
    for field, what, base in _SLOTS:
        found = [part for part in parts if isinstance(part, base)]
        if len(found) > 1:
            kinds = " and ".join(repr(part.kind) for part in found)
            msg = (
                f"strategy {text!r} has {len(found)} {what}, {kinds}; a strategy has at most one selection, one "
                "reduction, one encoding and one coding"
            )
            raise InvalidSpec(msg)
        data.update((field, part) for part in found)
    return validate(Compression, data, f"strategy {text!r}")


def _from_text(value: Any) -> Any:
    return parse_compression(value) if isinstance(value, str) else value


NamedCompression = Annotated[Compression, BeforeValidator(_from_text)]
"""A strategy as a person writes it: its name, or selection and encoding with their parameters."""


def describe_strategy(name: str) -> str:
    """One line on what a strategy does and where it is published; raise as ``parse_compression`` does."""
    compression = parse_compression(name)
    stored = compression.stored
    spoken: list[StrategyPart] = [] if compression.selection.kind in _NEUTRAL else [compression.selection]
    if not compression.stores_native:
        spoken += stored.spoken if isinstance(stored, StackedEncoding) else [stored]
    return " + ".join(_summary(part) for part in spoken or [compression.encoding])


def _summary(part: StrategyPart) -> str:
    values = part.model_dump(mode="json")
    near = max(part.names, key=lambda name: sum(values[key] == value for key, value in part.names[name].items()))
    return part.summaries[near]


def parse_part(name: str) -> StrategyPart:
    """Turn the name of one part into it; raise as `parse_compression` does. Some make no strategy by themselves."""
    return _parse_part(name, name)


def _parse_part(piece: str, text: str) -> StrategyPart:
    plan = _PLAN.fullmatch(piece)
    return _parse_name(piece, text) if plan is None else _parse_plan(plan, text)


def _parse_plan(match: re.Match[str], text: str) -> StrategyPart:
    """Turn ``layer_plan[2*snapkv:0.25;h2o]``, or ``layer_plan:relative[...]``, into a part."""
    name, depth, entries = match.groups()
    part = next(one for one in PLANS if name in one.names)
    if entries is None:
        example = f"{name}[{'2*snapkv:0.25;snapkv:0.75' if name == 'layer_plan' else '2*fp8;kivi-2'}]"
        msg = f"strategy {text!r}: a plan needs what each layer does, such as {example}, or a file of it (PLAN.yaml)"
        raise InvalidSpec(msg)
    layers: list[StrategyPart] = []
    for entry in entries.split(";"):
        count, starred, one = entry.rpartition("*")
        if starred and not (count.strip().isdecimal() and int(count) > 0):
            msg = (
                f"strategy {text!r}: {entry.strip()!r}: what stands before '*' is a whole number of layers, as in 2*fp8"
            )
            raise InvalidSpec(msg)
        layers += [_parse_name(one, text)] * int(count or 1)
    return validate(part, {"layers": layers, **({"depth": depth} if depth else {})}, f"strategy {text!r}")


def _parse_name(piece: str, text: str) -> StrategyPart:
    if piece.strip().lower().endswith((".yaml", ".yml", ".json")):
        msg = (
            f"strategy {text!r}: a plan file is opened only where a command names it (--compression {piece.strip()}); "
            "in a scenario write what it says, layer_plan[...]"
        )
        raise InvalidSpec(msg)
    match = _PIECE.fullmatch(piece)
    if match is None:
        raise UnknownName(kind="strategy", name=text, known=STRATEGIES)
    written, inline, named = match.groups()
    part, name = _look_up(written)
    name, _, implied = name.partition(":")
    if implied and inline is not None:
        msg = f"strategy {text!r}: {written!r} already means {name}:{implied} and takes no value after ':'"
        raise InvalidSpec(msg)
    inline = inline if inline is not None else implied or None
    given = _named_parameters(named, text)
    set_here: dict[str, object] = {}
    if inline is not None:
        set_here = part.inline_parameters(inline, given)
    parameters: Mapping[str, object] = part.names[name]
    if set_here or any(field in part.inline_fields for field in given):
        # A size given here replaces the size that the bare name stands for.
        parameters = {field: value for field, value in parameters.items() if field not in part.inline_fields}
    return validate(part, {**parameters, **set_here, **given}, f"strategy {text!r}")


def _look_up(written: str) -> tuple[type[StrategyPart], str]:
    found = _by_spelling().get(normalised(written))
    if found is None:
        raise UnknownName(kind="strategy", name=written, known=_known_names())
    return found


@cache
def _by_spelling() -> Mapping[str, tuple[type[StrategyPart], str]]:
    """Part and published name by every way to write it; the first part of a spelling has it."""
    found: dict[str, tuple[type[StrategyPart], str]] = {}
    for part in _PARTS:
        for spelling, name in (*((name, name) for name in part.names), *part.aliases.items()):
            found.setdefault(normalised(spelling), (part, name))
    return found


def _known_names() -> Iterable[str]:
    for part in _PARTS:
        yield from part.names
        yield from part.aliases


def _named_parameters(text: str | None, strategy: str) -> dict[str, object]:
    given: dict[str, object] = {}
    for item in (text or "").split(","):
        field, equals, value = (piece.strip() for piece in item.partition("="))
        if not item.strip():
            continue
        if not equals or not field or not value or field in given:
            msg = f"strategy {strategy!r}: {item.strip()!r} is not a new field=value"
            raise InvalidSpec(msg)
        given[field] = value
    return given
