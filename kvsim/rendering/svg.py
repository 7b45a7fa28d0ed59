"""SVG elements as text, escaped; and what tells strategies and segments apart besides colour."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

Attributes = Mapping[str, str | float]
INK = "#1b1b1b"
FAINT = "#6b6b6b"
GRID = "#e3e3e3"
FONT_SIZE = 12
CHARACTER_WIDTH = 0.56
"""Mean advance of a sans-serif character, as a share of the font size."""

# Okabe & Ito, "Color Universal Design" (2008): distinguishable with any common colour vision.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#B8A800")
SHAPES = ("circle", "square", "triangle", "diamond", "triangle-down", "pentagon", "hexagon", "star")
HATCHES = (None, (45, 6), (135, 6), (0, 5), (90, 5), (45, 3))
"""Angle in degrees and spacing of the lines drawn over a segment's colour."""


def element(tag: str, attributes: Attributes, content: str = "") -> str:
    """One SVG element; attribute values are escaped, ``content`` is markup already."""
    written = "".join(f' {name}="{html.escape(_number(value))}"' for name, value in attributes.items())
    return f"<{tag}{written}>{content}</{tag}>" if content else f"<{tag}{written}/>"


def _number(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")


def text(x: float, y: float, words: str, attributes: Attributes | None = None) -> str:
    """Write a line of text, escaped."""
    style: dict[str, str | float] = {"x": x, "y": y, "font-size": FONT_SIZE, "fill": INK}
    return element("text", style | dict(attributes or {}), html.escape(words))


def line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 1.0) -> str:
    """Draw a straight line."""
    return element("line", {"x1": x1, "y1": y1, "x2": x2, "y2": y2, "stroke": colour, "stroke-width": width})


def text_width(words: str, font_size: float = FONT_SIZE) -> float:
    """Estimated width in pixels; SVG has no layout to ask."""
    return len(words) * font_size * CHARACTER_WIDTH


def shortened(words: str, width: float, font_size: float = FONT_SIZE) -> str:
    """Cut text that would be wider than ``width`` pixels."""
    room = int(width / (font_size * CHARACTER_WIDTH))
    return words if len(words) <= room else words[: max(1, room - 1)] + "…"


def marker(index: int, x: float, y: float, radius: float = 6.0) -> str:
    """Draw the symbol of strategy ``index``: shape and colour both change, and shapes outlast the palette."""
    colour = PALETTE[index % len(PALETTE)]
    shape = SHAPES[(index + index // len(SHAPES)) % len(SHAPES)]
    style: dict[str, str | float] = {"fill": colour, "stroke": INK, "stroke-width": 0.8}
    if shape == "circle":
        return element("circle", {"cx": x, "cy": y, "r": radius, **style})
    points = " ".join(f"{x + radius * dx:.2f},{y + radius * dy:.2f}" for dx, dy in _outline(shape))
    return element("polygon", {"points": points, **style})


def _outline(shape: str) -> list[tuple[float, float]]:
    """Corners on (or, for the star, within) a circle of radius 1.15, screen coordinates."""
    corners, start_degrees = {
        "square": (4, 45.0), "diamond": (4, 0.0), "triangle": (3, -90.0), "triangle-down": (3, 90.0),
        "pentagon": (5, -90.0), "hexagon": (6, 0.0), "star": (10, -90.0),
    }[shape]  # fmt: skip
    outline = []
    for corner in range(corners):
        angle = math.radians(start_degrees + 360.0 * corner / corners)
        reach = 0.55 if shape == "star" and corner % 2 else 1.15
        outline.append((reach * math.cos(angle), reach * math.sin(angle)))
    return outline


def hatch_patterns() -> str:
    """Define the fills of stacked segments: a colour each, and lines at an angle of their own."""
    patterns = []
    for index, colour in enumerate(PALETTE):
        ground = element("rect", {"width": 12, "height": 12, "fill": colour, "fill-opacity": 0.8})
        hatch = HATCHES[index % len(HATCHES)]
        attributes: dict[str, str | float] = {
            "id": f"fill-{index}", "patternUnits": "userSpaceOnUse", "width": 12, "height": 12,
        }  # fmt: skip
        if hatch is not None:
            angle, spacing = hatch
            attributes |= {"width": spacing, "height": spacing, "patternTransform": f"rotate({angle})"}
            ground += line(0, 0, 0, spacing, "#ffffff", 1.6)
        patterns.append(element("pattern", attributes, ground))
    return element("defs", {}, "".join(patterns))


def segment_fill(index: int) -> str:
    """Fill of the stacked segment ``index``."""
    return f"url(#fill-{index % len(PALETTE)})"


def nice_ticks(low: float, high: float, count: int = 5) -> list[tuple[float, str]]:
    """Round numbers that span ``low`` to ``high``, about ``count`` of them, each with its label."""
    if not high > low:
        return [(low, f"{low:g}")]
    raw = (high - low) / count
    magnitude: float = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= raw)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    decimals = next((d for d in range(12) if math.isclose(round(step, d), step, rel_tol=1e-6)), 12)
    return [(tick * step, f"{tick * step:,.{decimals}f}") for tick in range(first, last + 1)]


def span(values: Sequence[float], padding: float = 0.12, least: float = 0.05) -> tuple[float, float]:
    """Range of an axis around ``values``: never negative, and wide enough that differences under 1 % look small."""
    low, high = min(values), max(values)
    margin = max((high - low) * padding, abs(high) * least) or 1.0
    return max(0.0, low - margin), high + margin
