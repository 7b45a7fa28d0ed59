"""A picture of comparisons: one row of panels per device, as an HTML page, an SVG or a PNG.

The drawing is SVG written here, so the page needs nothing from elsewhere and the PNG shows the same drawing.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvsim.documents import check_output_path, write_output
from kvsim.errors import ScenarioError
from kvsim.rendering.cells import COMPARISON_COLUMNS, Cell, comparison_cells, comparison_headers, failures, shared_notes
from kvsim.rendering.charts import PANEL_WIDTH, Strategy, memory_panel, panel_height, pareto_panel, time_panel
from kvsim.rendering.numbers import UNKNOWN
from kvsim.rendering.published import QUALITY_HEADERS, quality_rows
from kvsim.rendering.svg import FAINT, INK, element, hatch_patterns, shortened, text

if TYPE_CHECKING:
    from kvsim.simulate import Comparison

Group = tuple[str, Sequence["Comparison"]]
"""A heading, such as a device, and the strategies compared on it."""

MARGIN = 16.0
TITLE_HEIGHT = 40.0
FAILURE_HEIGHT = 16.0
PNG_SCALE = 1.5
STYLE = """
body { font-family: system-ui, sans-serif; color: #1b1b1b; background: #fff; margin: 1.5rem; line-height: 1.4; }
.scroll { overflow-x: auto; }
svg { max-width: 100%; height: auto; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.6rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }
.number { text-align: right; white-space: nowrap; }
.band, .unknown, footer { color: #6b6b6b; }
.band { display: block; font-size: 0.75rem; }
"""


def write_gallery(rows: Sequence[Group], html_path: Path | None = None, png_path: Path | None = None) -> None:
    """Write the picture as a self-contained HTML page, as a PNG, or both.

    Parameters
    ----------
    rows
        (heading, comparisons) pairs, drawn from top to bottom.
    html_path, png_path
        Where to write; each file is written whole or not at all.

    Raises
    ------
    InvalidSpec
        If a path cannot be written.
    ScenarioError
        If a PNG is asked for and the ``picture`` extra is not installed.
    """
    if html_path is not None:
        check_output_path(html_path, (".html",))
    if png_path is not None:
        check_output_path(png_path, (".png",))
        write_output(png_path, gallery_png(rows))
    if html_path is not None:
        write_output(html_path, gallery_html(rows).encode())


def gallery_svg(rows: Sequence[Group]) -> str:
    """Draw all rows as one SVG document."""
    y = MARGIN
    drawn = []
    for title, comparisons in rows:
        body, height = _row_of_panels(title, comparisons)
        drawn.append(element("g", {"transform": f"translate({MARGIN:g} {y:g})"}, body))
        y += height
    width, height = 3 * PANEL_WIDTH + 2 * MARGIN, y + MARGIN
    attributes: dict[str, str | float] = {
        "xmlns": "http://www.w3.org/2000/svg",
        "viewBox": f"0 0 {width:g} {height:g}",
        "width": width,
        "height": height,
        "font-family": "Helvetica, Arial, 'Liberation Sans', sans-serif",
        "role": "img",
        "aria-label": "KV-cache compression strategies: speed, memory and time",
    }
    ground = element("rect", {"width": width, "height": height, "fill": "#ffffff"})
    return element("svg", attributes, hatch_patterns() + ground + "".join(drawn))


def _row_of_panels(title: str, comparisons: Sequence[Comparison]) -> tuple[str, float]:
    """Heading, three panels, and a line for each strategy that cannot run; with the height taken."""
    strategies = [Strategy(i, c.strategy, c.report) for i, c in enumerate(comparisons) if c.report is not None]
    parts = [text(0, 20, title, {"font-size": 18, "font-weight": "bold", "fill": INK})]
    height = TITLE_HEIGHT
    if strategies:
        for place, panel in enumerate((pareto_panel, memory_panel, time_panel)):
            move = {"transform": f"translate({place * PANEL_WIDTH:g} {TITLE_HEIGHT:g})"}
            parts.append(element("g", move, panel(strategies)))
        height += panel_height(len(strategies))
    for strategy, reason in failures(comparisons):
        line = shortened(f"{strategy} cannot run: {reason}", 3 * PANEL_WIDTH)
        parts.append(text(8, height + 12, line, {"fill": FAINT}))
        height += FAILURE_HEIGHT
    return "".join(parts), height + 1.5 * MARGIN


def gallery_png(rows: Sequence[Group]) -> bytes:
    """Draw all rows as a PNG; raise ScenarioError where the ``picture`` extra is missing."""
    try:
        import vl_convert
    except ImportError as error:
        msg = "a PNG needs the picture extra: pip install 'kvsim[picture]' (an HTML page needs nothing more)"
        raise ScenarioError(msg) from error
    data: bytes = vl_convert.svg_to_png(gallery_svg(rows), scale=PNG_SCALE)
    return data


def gallery_html(rows: Sequence[Group], title: str = "kvsim: KV-cache compression compared") -> str:
    """Picture and tables as one HTML page without scripts or outside files; names are escaped."""
    tables = "".join(_html_section(heading, comparisons) for heading, comparisons in rows)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>"
        f'<h1>{html.escape(title)}</h1><div class="scroll">{gallery_svg(rows)}</div>{tables}'
        f"<footer><p>Small ranges under a number are its band. "
        f"Numbers are simulated or estimated, on the basis named in the last columns.</p></footer></body></html>\n"
    )


def _html_section(heading: str, comparisons: Sequence[Comparison]) -> str:
    classes = ["", *(' class="number"' if column.is_number else "" for column in COMPARISON_COLUMNS)]
    head = "".join(f"<th{css}>{html.escape(h)}</th>" for h, css in zip(comparison_headers(), classes, strict=True))
    body = []
    for comparison in comparisons:
        if comparison.report is not None:
            cells = [Cell(comparison.strategy), *comparison_cells(comparison.report)]
            row = "".join(f"<td{css}>{_html_cell(c)}</td>" for c, css in zip(cells, classes, strict=True))
            body.append(f"<tr>{row}</tr>")
    lost = "".join(
        f"<li>{html.escape(strategy)} cannot run: {html.escape(why)}</li>" for strategy, why in failures(comparisons)
    )
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in shared_notes(comparisons))
    return (
        f'<section><h2>{html.escape(heading)}</h2><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>{_html_quality(comparisons)}"
        f"{f'<ul>{lost}</ul>' if lost else ''}"
        f"{f'<details><summary>Notes</summary><ul>{notes}</ul></details>' if notes else ''}</section>"
    )


def _html_quality(comparisons: Sequence[Comparison]) -> str:
    """Published scores of all strategies, folded away; empty where there is none."""
    reports = [(c.strategy, c.report.quality) for c in comparisons if c.report is not None]
    rows = [(name, *row) for name, quality in reports for row in quality_rows(quality)]
    if not rows:
        return ""
    head = "".join(f"<th>{html.escape(header)}</th>" for header in ("Strategy", *QUALITY_HEADERS))
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    warned = "".join(
        f"<li>{html.escape(name)}: {html.escape(warning)}</li>"
        for name, quality in reports
        for warning in quality.warnings
    )
    return (
        "<details><summary>Published quality</summary><p>Scores of the publication's model and task, not of yours."
        f'</p><div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        f"{f'<ul>{warned}</ul>' if warned else ''}</details>"
    )


def _html_cell(cell: Cell) -> str:
    shown = html.escape(cell.text)
    if cell.text == UNKNOWN:
        return f'<span class="unknown">{shown}</span>'
    return f'{shown}<span class="band">{html.escape(cell.band)}</span>' if cell.band else shown
