"""Write the generated tables of docs/methods/hybrids.md: which parts of a strategy go together.

Run ``python tools/write_hybrids.py`` after a part or a rule has changed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from kvsim.compression import CODINGS, ENCODINGS, REDUCTIONS, SELECTIONS, Compression
from kvsim.compression.base import StrategyPart
from kvsim.compression.parse import parse_part
from kvsim.compression.rules import RULES, Parts
from kvsim.device_catalog import load_device
from kvsim.documents import write_atomic
from kvsim.errors import NotRunnable
from kvsim.model_catalog import load_model

CHECKOUT = Path(__file__).resolve().parents[1]
PAGE = CHECKOUT / "docs" / "methods" / "hybrids.md"
TABLES = re.compile(r"(<!-- tables: begin.*? -->\n).*?(<!-- tables: end -->)", re.DOTALL)
MODEL, DEVICE = "llama-3.1-8b", "h100-sxm"
MOST_NAMED = 8
"""Parts that a heading names, beyond which the largest group is called all others."""
SLOTS: dict[str, Sequence[type[StrategyPart]]] = {
    "selection": SELECTIONS, "reduction": REDUCTIONS, "encoding": ENCODINGS, "coding": CODINGS,
}  # fmt: skip


def rows() -> Iterator[str]:
    """Every line between the page's markers."""
    yield from _table("reduction", "selection")
    yield from _table("encoding", "reduction")
    yield from _table("encoding", "selection")
    if len(CODINGS) > 1:
        yield from _table("encoding", "coding")
    yield "Rules:"
    yield ""
    for number, rule in enumerate(RULES, 1):
        yield f"{number}. {(rule.__doc__ or '').strip()}"


def _table(down: str, across: str) -> Iterator[str]:
    """One row per group of parts with equal rows, one column per group with equal columns."""
    cells = {(name, other): _cell({down: name, across: other}) for name in _names(down) for other in _names(across)}
    rows = alike({name: tuple(cells[name, other] for other in _names(across)) for name in _names(down)})
    columns = alike({other: tuple(cells[name, other] for name in _names(down)) for other in _names(across)})
    yield f"| {down} \\ {across} | " + " | ".join(heading(group, columns, across) for group in columns) + " |"
    yield "|---" * (len(columns) + 1) + "|"
    for group in rows:
        outcomes = (cells[group[0], others[0]] for others in columns)
        yield f"| {heading(group, rows, down)} | " + " | ".join(outcomes) + " |"
    yield ""


def alike(outcomes: Mapping[str, tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Names of equal outcomes together, each group where its first name stands."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, outcome in outcomes.items():
        groups.setdefault(outcome, []).append(name)
    return [tuple(group) for group in groups.values()]


def heading(group: tuple[str, ...], groups: Sequence[tuple[str, ...]], slot: str) -> str:
    """Names of a group; of the largest one, where they are many, that it is all others."""
    largest = max(groups, key=len)
    if group is largest and len(group) > MOST_NAMED:
        return f"any other {slot}" if len(groups) > 1 else f"every {slot}"
    return ", ".join(f"`{name}`" for name in group)


def _names(slot: str) -> list[str]:
    """Published names of a slot's parts, the neutral one left out."""
    neutral = getattr(Compression(), slot).kind
    return [name for part in SLOTS[slot] for name in part.names if name != neutral]


def _cell(names: dict[str, str]) -> str:
    """``yes``, ``priced`` where no algorithm runs, ``shape`` where the model's shape is refused, or rules' numbers."""
    chosen = {slot: parse_part(name) for slot, name in names.items()}
    parts = Parts(**{slot: chosen.get(slot, getattr(Compression(), slot)) for slot in SLOTS})
    broken = [str(number) for number, rule in enumerate(RULES, 1) if rule(parts)]
    if broken:
        return " ".join(broken)
    compression = Compression(**chosen)
    if compression.check(load_model(MODEL), load_device(DEVICE).spec):
        return "shape"
    try:
        compression.selection.selector()
        compression.reduction.codec()
        compression.encoding.codec()
        compression.coding.coder()
    except NotRunnable:
        return "priced"
    return "yes"


def page(text: str) -> str:
    """Put the tables into the page."""
    body = "\n".join(rows())
    return TABLES.sub(lambda found: f"{found[1]}{body}\n{found[2]}", text)


if __name__ == "__main__":
    write_atomic(PAGE, page(PAGE.read_text(encoding="utf-8")).encode())
    print(f"wrote {PAGE.relative_to(CHECKOUT)}")
