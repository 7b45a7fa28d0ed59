"""Numbers as text, the same in every medium."""

from __future__ import annotations

UNKNOWN = "unknown"
EN_DASH = "\N{EN DASH}"


def format_number(value: float | None) -> str:
    """Three significant digits with thousands separators; very small and very large numbers in powers of ten.

    >>> format_number(1234.5), format_number(0.01234), format_number(None)
    ('1,234', '0.0123', 'unknown')
    """
    if value is None:
        return UNKNOWN
    size = abs(value)
    if size == 0:
        return "0"
    if size < 1e-4 or size >= 1e12:
        return f"{value:.2e}"
    decimals = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3 if size >= 0.1 else 4
    return f"{value:,.{decimals}f}"


def format_share(share: float | None) -> str:
    """Show a fraction as a percentage."""
    if share is None:
        return UNKNOWN
    percent = 100 * share
    return f"{percent:.0f} %" if percent >= 10 or percent == 0 else f"{percent:.1f} %"
