"""The rate-distortion plot and its table, of an answer made by hand."""

from __future__ import annotations

from typing import Any

import pytest

from kvsim.limit import EncodingPoint, LimitAnswer
from kvsim.limit.answer import CURVE_BITS, LimitCurve


def point(name: str, bits: float, error: float, family: str = "rotation") -> EncodingPoint:
    return EncodingPoint(
        strategy=name, family=family, bits_per_value=bits, relative_mse=error, key_relative_mse=error,
        value_relative_mse=None, gap_isotropic_bits=None if error == 0 else bits - 1, gap_head_bits=0.5,
        gap_layer_bits=-0.25, applies="lossless" if error == 0 else "isotropic",
    )  # fmt: skip


@pytest.fixture
def answer() -> LimitAnswer:
    line = tuple(4.0**-bits for bits in CURVE_BITS)
    lower = tuple(error / 2 for error in line)
    curve = LimitCurve(isotropic=line, sphere=line, head=lower, head_plug_in=lower, layer=lower, layer_plug_in=lower,
                       key=lower, value=None)  # fmt: skip
    points = (
        point("native", 16, 0.0, "baseline"), point("good", 2, 0.1), point("better", 4, 0.01), point("bad", 4, 0.5),
        point("other", 8, 1e-4, "quantisation"), point("huge", 14, 0.1, "low rank"),
    )  # fmt: skip
    return LimitAnswer(source="made up", num_caches=1, num_layers=1, num_kv_heads=1, key_dim=64, value_dim=0,
                       num_tokens=128, curve=curve, heads=(), points=points, not_measured=())  # fmt: skip


def traces(answer: LimitAnswer) -> dict[str, Any]:
    from kvsim_dashboard.limit_chart import rate_distortion_chart

    return {trace.name: trace for trace in rate_distortion_chart(answer).figure.data if trace.name}


def test_lines_are_the_answers_curves_and_points_its_points(answer: LimitAnswer) -> None:
    shown = traces(answer)
    line = next(trace for name, trace in shown.items() if name.startswith("4^-R"))
    assert tuple(line.y) == answer.curve.isotropic
    assert tuple(line.x) == CURVE_BITS
    assert list(shown["rotation"].x) == [2, 4, 4]
    assert list(shown["rotation"].y) == [0.1, 0.01, 0.5]
    assert [words[0] for words in shown["quantisation"].customdata] == ["other"]
    assert "low rank" not in shown


def test_what_the_axes_leave_out_is_named(answer: LimitAnswer) -> None:
    from kvsim_dashboard.limit_chart import outside, rate_distortion_chart

    assert [one.strategy for one in outside(answer)] == ["native", "huge"]
    assert "4 encodings" in rate_distortion_chart(answer).alt


def test_only_the_lower_hull_is_labelled(answer: LimitAnswer) -> None:
    from kvsim_dashboard.limit_chart import rate_distortion_chart

    (labels,) = (trace for trace in rate_distortion_chart(answer).figure.data if trace.mode == "text")
    assert [text.strip("\N{NO-BREAK SPACE}") for text in labels.text] == ["good", "better", "other"]


def test_the_table_has_every_point(answer: LimitAnswer) -> None:
    from kvsim_dashboard.limit_section import limit_table

    table = limit_table(answer)
    assert table["Encoding"] == ["native", "good", "better", "bad", "other", "huge"]
    assert table["Bits above 4^-R"][:2] == ["-", "+1.00"]
    assert table["Error of V"][0] == "-"
    assert {len(column) for column in table.values()} == {6}


def test_nothing_is_measured_before_someone_asks(open_page: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvsim_dashboard import limit_section

    def refuse(*_: Any) -> None:
        pytest.fail("measured without being asked")

    monkeypatch.setattr(limit_section, "find_limit", refuse)
    page = open_page(strategies=["native"])
    assert not page.exception
    assert any("Shannon" in heading.value for heading in page.subheader)
