"""Share links: which parts of the page's address were not understood.

Streamlit seeds bound widgets from the address and drops what it cannot read without a word; this finds the words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

MAX_SHOWN = 60


def ignored_parameters(written: Mapping[str, Sequence[str]], effective: Mapping[str, object]) -> list[str]:
    """Sentences on each parameter that the link holds and the form does not follow.

    Parameters
    ----------
    written
        Query parameters as they arrived, all values of each.
    effective
        Value of every bound widget, by parameter; None is an empty field.
    """
    notices = []
    for name, values in written.items():
        if name not in effective:
            notices.append(f"{_short(name)}: no such parameter; ignored")
        elif not _agrees(values, effective[name]):
            notices.append(f"{name}: {_short(', '.join(values))!r} is not allowed; using {_spoken(effective[name])}")
    return notices


def _agrees(values: Sequence[str], effective: object) -> bool:
    if isinstance(effective, (list, tuple)):
        return [value for value in values if value] == [str(item) for item in effective]
    last = values[-1] if values else ""
    if effective is None:
        return last == ""
    if isinstance(effective, bool):
        return last.lower() == str(effective).lower()
    if isinstance(effective, (int, float)):
        return _number(last) == effective
    return last == str(effective)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _spoken(effective: object) -> str:
    if effective is None:
        return "no value"
    if isinstance(effective, (list, tuple)):
        return ", ".join(map(str, effective)) or "none"
    return str(effective)


def _short(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 1]}…"
