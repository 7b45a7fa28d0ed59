"""Write the generated tables of docs/methods.md: every named part of a strategy, by family, in one line.

Run ``python tools/write_methods.py`` after a part was added or its summary has changed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from os.path import normpath
from pathlib import Path

from kvsim.compression import CODINGS, ENCODINGS, PLANS, REDUCTIONS, SELECTIONS
from kvsim.compression.base import StrategyPart
from kvsim.documents import write_atomic

CHECKOUT = Path(__file__).resolve().parents[1]
PAGE = CHECKOUT / "docs" / "methods.md"
TABLES = re.compile(r"(<!-- tables: begin.*? -->\n).*?(<!-- tables: end -->)", re.DOTALL)
PARTS: dict[str, tuple[type[StrategyPart], ...]] = {
    "encoding": ENCODINGS, "reduction": REDUCTIONS, "coding": CODINGS, "selection": SELECTIONS,
    "selection or encoding of each layer": PLANS,
}  # fmt: skip
PAGES = {
    "quantisation": ("quantisation.md", "rotation.md#kvquant"),
    "rotation": ("rotation.md",),
    "low rank": ("low-rank.md",),
    "architecture": ("low-rank.md#mla", "cross-layer.md#cla"),
    "channel pruning": ("channel-pruning.md",),
    "cross-layer": ("cross-layer.md",),
    "transform coding": ("entropy-coding.md",),
    "entropy coding": ("entropy-coding.md",),
    "eviction": ("eviction.md", "head-budgets.md", "learned-eviction.md", "decode-eviction.md"),
    "joint bits and eviction": ("head-budgets.md#rdkv",),
    "merging": ("merging.md",),
    "sparse reading": ("sparse-reading.md",),
    "weighted atoms": ("minimax.md",),
    "layer plan": ("../layer-plans.md",),
}
"""Family -> where below docs/methods its methods are explained."""


def rows() -> Iterator[str]:
    """Every line between the page's markers."""
    found = [(kind, part) for kind, parts in PARTS.items() for part in parts if part.family != "baseline"]
    for family in dict.fromkeys(part.family for _, part in found):
        yield f"### {family.capitalize()}"
        yield ""
        places = (normpath(f"methods/{page}") for page in PAGES[family])
        pages = (f"[{place}]({place})" for place in places)
        yield f"Maths, bytes and sources: {', '.join(pages)}."
        yield ""
        yield "| Name | Part | What it does, and where it is published |"
        yield "|---|---|---|"
        for kind, part in found:
            if part.family == family:
                yield from (f"| `{name}` | {kind} | {_cell(part.summaries[name])} |" for name in part.names)
        yield ""


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


def page(text: str) -> str:
    """Put fresh tables between the page's markers."""
    body = "\n".join(rows())
    return TABLES.sub(lambda match: f"{match[1]}\n{body}{match[2]}", text)


def main() -> None:
    """Rewrite the page."""
    write_atomic(PAGE, page(PAGE.read_text(encoding="utf-8")).encode())


if __name__ == "__main__":
    main()
