"""The per-vector limit for a terminal: encodings with their gaps, the limits themselves, and the token-id tier."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from kvsim.rendering.numbers import EN_DASH, format_number
from kvsim.units import format_rate, format_seconds

if TYPE_CHECKING:
    from kvsim.limit import EncodingPoint, LimitAnswer, TokenIdTier

WIDE_COLUMNS = 110
SHOWN_BITS = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0)
APPLIES = {
    "isotropic": "4^-R",
    "head covariance": "head",
    "layer covariance": "layer",
    "none": "none",
    "lossless": "lossless",
}


def limit_view(answer: LimitAnswer, width: int) -> RenderableType:
    """Everything that ``kvsim limit`` shows."""
    head = Text(
        f"{answer.source}: {answer.num_caches} x {answer.num_layers} layers, {answer.num_kv_heads} KV heads, "
        f"{answer.key_dim}+{answer.value_dim} channels, {answer.num_tokens:,} tokens",
        style="bold",
    )
    parts: list[RenderableType] = [head, _curves(answer), _points(answer, is_wide=width >= WIDE_COLUMNS)]
    parts += [Text(f"{one.strategy} has no point: {one.reason}", style="yellow") for one in answer.not_measured]
    if answer.token_ids is not None:
        parts.append(Text(token_id_sentence(answer.token_ids)))
    return Group(*parts)


def _curves(answer: LimitAnswer) -> Table:
    curve = answer.curve
    places = [curve.bits_per_value.index(bits) for bits in SHOWN_BITS]
    table = _table("Least relative error at a rate (bits per K and V value)")
    table.add_column("limit", no_wrap=True)
    for bits in SHOWN_BITS:
        table.add_column(f"{bits:g}", justify="right", no_wrap=True)
    rows = {
        "4^-R, isotropic": curve.isotropic,
        f"sphere, {answer.key_dim} dim": curve.sphere,
        "covariance, head": curve.head,
        "covariance, layer": curve.layer,
        "K alone, head": curve.key,
        **({"V alone, head": curve.value} if curve.value else {}),
    }
    for name, errors in rows.items():
        table.add_row(escape(name), *(f"{errors[place]:.3g}" for place in places))
    return table


def _points(answer: LimitAnswer, *, is_wide: bool) -> Table:
    table = _table("Encodings, and bits per value above each limit at the same error")
    table.add_column("strategy", overflow="fold")
    if is_wide:
        table.add_column("family", overflow="fold")
    headers = ["bits", "error", *(["K error", "V error"] if is_wide else []), "4^-R", "head", "layer"]
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("judge by", no_wrap=True)
    for point in answer.points:
        cells = [point.strategy, *([point.family] if is_wide else []), *_numbers(point, is_wide=is_wide)]
        table.add_row(*map(escape, cells), APPLIES[point.applies], style="yellow" if point.applies == "none" else "")
    return table


def _numbers(point: EncodingPoint, *, is_wide: bool) -> list[str]:
    shown = [f"{point.bits_per_value:.3g}", f"{point.relative_mse:.3g}"]
    if is_wide:
        value = point.value_relative_mse
        shown += [f"{point.key_relative_mse:.3g}", "-" if value is None else f"{value:.3g}"]
    gaps = (point.gap_isotropic_bits, point.gap_head_bits, point.gap_layer_bits)
    return shown + ["-" if gap is None else f"{gap:+.2f}" for gap in gaps]


def token_id_sentence(tier: TokenIdTier) -> str:
    """What token ids alone take and cost, and what claims of huge ratios amount to."""
    seconds = tier.prefill_s
    band = ""
    if seconds.low is not None and seconds.high is not None:
        band = f" ({format_seconds(seconds.low)}{EN_DASH}{format_seconds(seconds.high)}, {seconds.basis})"
    return (
        f"Apart from the curve: token ids and recompute. {tier.bytes_per_token} B per token are "
        f"{tier.bits_per_value:.3g} bits per value of {tier.model}, {format_number(tier.fold)} times less "
        f"than its KV, and each use of {tier.context_tokens:,} tokens costs a prefill of "
        f"{format_rate(tier.prefill_flops, 'FLOP')}, {format_seconds(seconds.value)}{band} on {tier.num_devices} x "
        f"{tier.device}. {tier.claim}"
    )


def _table(title: str) -> Table:
    return Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", padding=(0, 1, 0, 0))
