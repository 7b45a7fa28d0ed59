"""`kvsim risk` for a terminal, as plain values, and in words."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING, Any, Final

from kvsim.quality.risk.compressibility import BLIND_RATIO, Compressibility, HeadCompressibility

if TYPE_CHECKING:
    from rich.table import Table

WIDTH_FOR_ALL: Final = 112
"""Columns of text that the whole table needs."""
NAMED_HEADS: Final = 3
"""Heads that the verdict names."""
LITTLE, MUCH = 0.25, 0.75
"""Shares of entries below which a cache is called compressible, and above which it is not."""
BROKEN: Final = 0.5
"""Relative error from which on a head is called broken; ours."""


def risk_document(answer: Compressibility) -> dict[str, Any]:
    """Give everything as plain values."""
    return answer.model_dump(mode="json") | {
        "share_random": answer.share("atoms_random"),
        "share_compressed": answer.share("atoms_compressed"),
        "share_heavy": answer.share("atoms_heavy"),
        "breaking": [head.name for head in answer.breaking],
        "verdict": list(verdict(answer)),
    }


def risk_csv(answer: Compressibility) -> str:
    """One line per KV head."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(HeadCompressibility.model_fields), lineterminator="\n")
    writer.writeheader()
    writer.writerows(head.model_dump(mode="json") for head in answer.heads)
    return text.getvalue()


def risk_table(answer: Compressibility, width: int) -> Table:
    """One line per KV head; narrow terminals see fewer columns."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    shape = f"{answer.num_layers} layers, {answer.num_kv_heads} KV heads, {answer.num_tokens:,} tokens"
    table = Table(
        box=box.SIMPLE_HEAD, title=escape(f"{answer.source}: {shape}"), title_justify="left", title_style="bold",
        padding=(0, 1, 0, 0),
    )  # fmt: skip
    target, budget = f"{answer.target_error:.3g}", f"K = {answer.budget_atoms:,}"
    columns = _columns(target, budget, is_wide=width >= WIDTH_FOR_ALL)
    table.add_column("\nhead", no_wrap=True)
    for header in columns:
        table.add_column(header, justify="right", no_wrap=True)
    worst = {head.name for head in answer.breaking[:NAMED_HEADS]}
    for head in answer.heads:
        cells = [_cell(getattr(head, field), answer) for field in columns.values()]
        table.add_row(head.name, *cells, style="yellow" if head.name in worst else "")
    return table


def _columns(target: str, budget: str, *, is_wide: bool) -> dict[str, str]:
    """Header -> field."""
    statistics = {
        "\nN_eff": "effective_tokens",
        "heaviest\nweight": "heaviest_weight",
        "tr Σ /\n‖o‖²": "relative_trace",
        "rank\nof Σ": "effective_rank",
    }
    errors = {
        f"{budget}\natoms": "error_compressed",
        "\nheavy": "error_heavy",
        "\nrandom*": "error_random",
        "\ntr Σ/K*": "error_plain_rate",
    }
    needs = {
        f"for {target}\natoms": "atoms_compressed",
        "\nheavy ": "atoms_heavy",
        "\nrandom* ": "atoms_random",
    }
    if is_wide:
        return statistics | needs | errors
    shown = ("\nN_eff", "rank\nof Σ")
    return {name: statistics[name] for name in shown} | needs | dict(list(errors.items())[:3])


def _cell(value: float, answer: Compressibility) -> str:
    if isinstance(value, int):
        return f"{value:,} {value / answer.num_tokens:4.0%}"
    return f"{value:.3g}"


def verdict(answer: Compressibility) -> tuple[str, ...]:
    """What the figures mean, in sentences."""
    share = answer.share("atoms_compressed")
    kind = "compresses well" if share < LITTLE else ("hardly compresses" if share > MUCH else "compresses in part")
    needs = (
        f"This cache {kind}: for an output error of {answer.target_error:.3g} weighted atoms need {share:.0%} of its "
        f"entries, heavy hitters {answer.share('atoms_heavy'):.0%}, random tokens {answer.share('atoms_random'):.0%}."
    )
    return (needs, _breaking(answer), *_surprise(answer), *_blindness(answer))


def _breaking(answer: Compressibility) -> str:
    first = answer.breaking
    named = ", ".join(f"{head.name} ({head.error_compressed:.3g})" for head in first[:NAMED_HEADS])
    broken = sum(1 for head in first if head.error_compressed >= BROKEN)
    rest = f"; {broken} of {len(first)} heads are above {BROKEN:g}" if broken else ""
    better = sum(1 for head in first if head.error_heavy < head.error_compressed)
    heavy = f"; plain heavy hitters do better in {better}" if better else ""
    layer, error = answer.worst_layer
    return (
        f"At {answer.budget_atoms:,} entries per head the first to break, with their errors: {named}{rest}{heavy}. "
        f"Worst layer: {layer} ({error:.3g})."
    )


def _surprise(answer: Compressibility) -> tuple[str, ...]:
    heads = [head for head in answer.breaking if head.is_surprised]
    if not heads:
        return ()
    after, known = heads[0].error_compressed, heads[0].error_known
    asked = "the prompt's last queries" if answer.query_aware else "drawn queries"
    return (
        f"In {_names([head.name for head in heads])} later queries look at tokens that {asked} did not: atoms made for "
        f"those err by {known:.3g} for them and by {after:.3g} for later ones ({heads[0].name}). More atoms hardly "
        "help; a visible question or a method that keeps such tokens does.",
    )


def _names(names: list[str]) -> str:
    more = f" and {len(names) - NAMED_HEADS} more" if len(names) > NAMED_HEADS else ""
    return ", ".join(names[:NAMED_HEADS]) + more


def _blindness(answer: Compressibility) -> tuple[str, ...]:
    blind = [head.name for head in answer.heads if head.is_rate_blind]
    if not blind:
        return ()
    return (
        f"tr(Sigma)/K is blind to {_names(blind)}: random tokens do more than {BLIND_RATIO:g} "
        "times the harm that it says, because one token has nearly all the attention.",
    )
