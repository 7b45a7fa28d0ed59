"""Text that Streamlit must show as it stands: names, reasons and notes are data, not Markdown."""

from __future__ import annotations

import re
from typing import Final

_MARKUP: Final = re.compile(r"([\\`*_\[\]$~<>:#|])")


def literal(text: str) -> str:
    r"""Escape what Markdown, LaTeX or Streamlit's directives would read as markup.

    >>> literal("turboquant_4bit_nc costs $2")
    'turboquant\\_4bit\\_nc costs \\$2'
    """
    return _MARKUP.sub(r"\\\1", text.replace("\n", " "))
