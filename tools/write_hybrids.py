"""Write the generated tables of docs/methods/hybrids.md: which parts of a strategy go together.

Run ``python tools/write_hybrids.py`` after a part or a rule has changed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
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
    columns = _names(across)
    yield f"| {down} \\ {across} | " + " | ".join(f"`{name}`" for name in columns) + " |"
    yield "|---" * (len(columns) + 1) + "|"
    for name in _names(down):
        yield f"| `{name}` | " + " | ".join(_cell({down: name, across: column}) for column in columns) + " |"
    yield ""


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
