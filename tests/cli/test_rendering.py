import builtins
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from rich.console import Console

from kvsim.errors import InvalidSpec, ScenarioError
from kvsim.rendering import comparison_markdown, write_gallery
from kvsim.rendering.cells import format_number, format_share, metric_cell, moved_cost_note
from kvsim.rendering.gallery import gallery_html, gallery_svg
from kvsim.rendering.svg import nice_ticks, span
from kvsim.rendering.terminal import comparison_table, report_view
from kvsim.scenario import Scenario
from kvsim.simulate import compare

BAND = "880\N{EN DASH}1,320"


def rendered(renderable, width=200):
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "unknown"), (0, "0"), (0.01234, "0.0123"), (9.876, "9.88"), (1234567.8, "1,234,568"), (1e-7, "1.00e-07")],
)
def test_numbers(value, text):
    assert format_number(value) == text


def test_shares():
    assert [format_share(s) for s in (None, 0.0, 0.005, 0.5, 1.0)] == ["unknown", "0 %", "0.5 %", "50 %", "100 %"]


def test_unknown_is_said(make_report):
    report = make_report(priced=False, count=10)
    assert metric_cell(report, "usd_per_million_output_tokens").text == "unknown"
    assert metric_cell(report, "p99_ttft_ms").text == "unknown"


def test_terminal_table_shows_every_strategy_and_reason(comparisons):
    text = rendered(comparison_table(comparisons, "a [title]"))
    assert "a [title]" in text
    assert "<script>alert(1)</script>" in text
    assert "nvfp4 cannot run: no fp4 on <this> device" in text
    assert BAND in text
    assert BAND not in rendered(comparison_table(comparisons, show_bands=False))


def test_report_view_has_every_section(make_report):
    text = rendered(report_view(make_report(notes=("read [a100] as a100-sxm",))))
    sections = (
        "KV cache",
        "Memory per device",
        "Latency [ms]",
        "Throughput",
        "Effects against native",
        "Cost",
        "Energy",
    )
    for words in (*sections, "Busy time (bottleneck", "Quality: unknown", "Note: read [a100] as a100-sxm"):
        assert words in text
    assert "$2.5 per device-hour, example cloud on_demand, 2026-01-01" in text


def test_markdown_escapes_pipes(comparisons):
    table = comparison_markdown(comparisons)
    widths = {line.count("|") - line.count(r"\|") for line in table.splitlines() if line.startswith("|")}
    assert len(widths) == 1
    assert "<script>" not in table


class Tags(HTMLParser):
    """Collects element names and attribute values."""

    def __init__(self):
        super().__init__()
        self.names = []
        self.links = []

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.links += [value for name, value in attrs if name in ("href", "src")]


def test_page_is_self_contained_and_escaped(comparisons):
    page = gallery_html([("on <b>a device</b>", comparisons)])
    tags = Tags()
    tags.feed(page)
    assert "script" not in tags.names
    assert "b" not in tags.names
    assert tags.links == []
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "no fp4 on &lt;this&gt; device" in page
    assert "read &lt;a100&gt; as a100-sxm" in page
    assert not re.search(r"url\((?!#)", page)


def test_drawing_is_valid_xml_and_labels_its_axes(comparisons):
    drawing = gallery_svg([("a & b", comparisons), ("all fail", comparisons[2:]), ("nothing", ())])
    texts = [node.text for node in ElementTree.fromstring(drawing).iter("{http://www.w3.org/2000/svg}text")]  # noqa: S314
    assert "output tokens/s per device" in texts
    assert "GiB" in texts
    assert "% of busy time" in texts
    assert "nvfp4 cannot run: no fp4 on <this> device" in texts


def test_each_strategy_has_its_own_symbol_and_number(make_report, comparisons):
    many = tuple(type(comparisons[0])(f"s{i}", make_report(fold=1 + i / 3), None) for i in range(20))
    drawing = gallery_svg([("many", many)])
    for number in range(1, 21):
        assert f">{number} s{number - 1}<" in drawing


def test_png_is_a_png(tmp_path, comparisons):
    pytest.importorskip("vl_convert", reason="needs the picture extra")
    path = tmp_path / "g.png"
    write_gallery([("a", comparisons)], png_path=path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_missing_picture_extra_is_explained_and_leaves_no_file(tmp_path, comparisons, monkeypatch):
    real_import = builtins.__import__

    def refuse(name, *rest):
        if name == "vl_convert":
            raise ImportError(name)
        return real_import(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ScenarioError, match=r"pip install 'kvsim\[picture\]'"):
        write_gallery([("a", comparisons)], tmp_path / "g.html", tmp_path / "g.png")
    assert list(tmp_path.iterdir()) == []


def test_wrong_suffix_is_refused(tmp_path, comparisons):
    with pytest.raises(InvalidSpec, match=r"must end in \.html"):
        write_gallery([("a", comparisons)], tmp_path / "g.pdf")


def test_ticks_are_distinct_and_inside():
    for low, high in ((0.0, 1.0), (780.0, 862.0), (0.0, 3e6), (0.0012, 0.0019)):
        ticks = nice_ticks(low, high)
        assert all(low <= value <= high * (1 + 1e-9) for value, _ in ticks)
        assert len({label for _, label in ticks}) == len(ticks) >= 2


def test_axes_do_not_magnify_noise():
    low, high = span([820.0, 820.1])
    assert high - low > 0.05 * 820
    assert span([0.0, 0.0])[1] > 0


def test_cheaper_output_that_only_moves_the_bill_to_prompts_is_named():
    scenario = Scenario.model_validate({"model": "llama-3.1-8b", "device": "h100-sxm", "workload": "chat"})
    note = moved_cost_note(compare(scenario, ("native", "snapkv", "kvzip"), method="estimate"))
    assert note is not None
    assert "kvzip 0.143" in note
    assert "snapkv" not in note
    assert moved_cost_note(compare(scenario, ("native", "fp8"), method="estimate")) is None
    assert moved_cost_note(compare(scenario, ("kvzip",), method="estimate")) is None
