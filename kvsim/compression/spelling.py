"""How one part of a strategy is spelled, and which spellings are the same."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from kvsim.compression.base import StrategyPart


def spell_part(part: StrategyPart) -> str:
    """Shortest spelling of one part: a published name, then ``:value``, then ``(field=value,…)`` for the rest."""
    own = part.spelled()
    if own is not None:
        return own
    values = part.model_dump(mode="json", exclude={"kind"})
    fields = type(part).model_fields
    defaults = {field: fields[field].default for field in values}
    name = bare_name(part)
    defaults |= part.names[name]
    changed = {field: value for field, value in values.items() if value != defaults[field]}
    inline = part.inline_text() if any(field in changed for field in part.inline_fields) else None
    named = [
        f"{field}={str(value).lower() if isinstance(value, bool) else value}"
        for field, value in changed.items()
        if value is not None and not (inline is not None and field in part.inline_fields)
    ]
    return name + (f":{inline}" if inline is not None else "") + (f"({','.join(named)})" if named else "")


def bare_name(part: StrategyPart) -> str:
    """Published name that stands for a part's values; failing that, one whose inline value alone differs."""
    values = part.model_dump(mode="json", exclude={"kind"})
    fixed = {field: value for field, value in values.items() if field not in part.inline_fields}
    for given in (values, fixed):
        for name, means in part.names.items():
            if all(given.get(field, value) == value for field, value in means.items()):
                return name
    return next(iter(part.names))


def spell_list(name: str, depth: str, entries: Sequence[str]) -> str:
    """Spell a part that is a list over layers: ``name[2*snapkv;h2o]``, ``name:relative[...]`` in relative depth."""
    runs = [(entry, len(list(run))) for entry, run in groupby(entries)]
    text = ";".join(entry if count == 1 else f"{count}*{entry}" for entry, count in runs)
    return f"{name}{'' if depth == 'exact' else f':{depth}'}[{text}]"


def normalised(name: str) -> str:
    """Lower case, ``_`` for ``-``, and kvpress's class suffix dropped (``SnapKVPress`` is ``snapkv``)."""
    lowered = name.lower().replace("-", "_")
    return lowered.removesuffix("press") if lowered != "no_press" else lowered
