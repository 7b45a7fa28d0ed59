"""Request classes: drawn from a stream of their own, with lengths of their own, or read from a trace."""

from __future__ import annotations

import json
from dataclasses import fields

import numpy as np
import pytest

from kvsim.documents import validate
from kvsim.errors import InvalidSpec, TraceError
from kvsim.specs.workload import SyntheticWorkload, TraceWorkload
from kvsim.workloads import build_requests

PLAIN = {
    "input_len": {"kind": "lognormal", "median_tokens": 300, "sigma": 0.5, "max_tokens": 4000},
    "output_len": {"kind": "uniform", "min_tokens": 5, "max_tokens": 50},
    "arrivals": {"kind": "poisson", "request_rate": 3},
    "num_prompts": 2000,
}
LONG = {"kind": "constant", "tokens": 777}


def workload(**options: object) -> SyntheticWorkload:
    return SyntheticWorkload.model_validate({**PLAIN, **options})


def draw(**options: object):
    return build_requests(workload(**options), seed=3)


def test_classes_change_nothing_else():
    plain = draw()
    classed = draw(classes=[{"name": "a", "share": 3}, {"name": "b", "share": 1}])
    assert plain.request_class is None
    assert plain.class_names == ()
    for field in fields(plain):
        if field.name not in ("request_class", "class_names"):
            np.testing.assert_array_equal(getattr(plain, field.name), getattr(classed, field.name))


def test_shares_are_relative():
    table = draw(classes=[{"name": "a", "share": 6}, {"name": "b", "share": 2}])
    assert table.class_names == ("a", "b")
    assert np.mean(table.request_class == 1) == pytest.approx(0.25, abs=0.03)
    scaled = draw(classes=[{"name": "a", "share": 0.6}, {"name": "b", "share": 0.2}])
    np.testing.assert_array_equal(table.request_class, scaled.request_class)


def test_a_class_may_have_lengths_of_its_own():
    plain = draw()
    table = draw(classes=[{"name": "a", "share": 1}, {"name": "b", "share": 1, "output_len": LONG}])
    own = table.request_class == 1
    assert set(table.output_tokens[own]) == {777}
    np.testing.assert_array_equal(table.output_tokens[~own], plain.output_tokens[~own])
    np.testing.assert_array_equal(table.prompt_tokens, plain.prompt_tokens)


def test_a_further_class_changes_no_length_that_another_drew():
    own = {"kind": "uniform", "min_tokens": 100, "max_tokens": 900}
    few = draw(classes=[{"name": "a", "share": 1, "input_len": own}])
    more = draw(classes=[{"name": "a", "share": 1, "input_len": own}, {"name": "b", "share": 1, "input_len": LONG}])
    mine = more.request_class == 0
    np.testing.assert_array_equal(more.prompt_tokens[mine], few.prompt_tokens[mine])
    assert set(more.prompt_tokens[~mine]) == {777}


def test_priorities_come_from_classes():
    table = draw(classes=[{"name": "a", "share": 1}, {"name": "b", "share": 1, "priority": -2}])
    np.testing.assert_array_equal(table.priority, np.where(table.request_class == 1, -2, 0))
    assert draw(classes=[{"name": "a", "share": 1}]).priority is None


def test_a_session_has_one_class():
    talk = {"turns": {"kind": "constant", "tokens": 4}}
    table = draw(classes=[{"name": "a", "share": 1}, {"name": "b", "share": 1}], conversations=talk)
    assert len(set(table.request_class)) == 2
    later = table.parent >= 0
    np.testing.assert_array_equal(table.request_class[later], table.request_class[table.parent[later]])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"classes": [{"name": "a", "share": 1}, {"name": "a", "share": 2}]}, "every name must be there once"),
        ({"classes": [{"name": "a", "share": 0}]}, "greater than 0"),
        (
            {
                "classes": [{"name": "a", "share": 1, "input_len": LONG}],
                "conversations": {"turns": {"kind": "constant", "tokens": 2}},
            },
            "conversations draw all turns alike",
        ),
        ({"classes": [{"name": "a", "shares": 1}]}, "did you mean 'share'"),
    ],
)
def test_what_is_wrong_is_said(options, said):
    with pytest.raises(InvalidSpec, match=said):
        validate(SyntheticWorkload, {**PLAIN, **options}, "file.yaml")


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_a_trace_names_classes(tmp_path, ending):
    import polars as pl

    rows = [
        {"prompt_tokens": 10 + i, "output_tokens": 5, "t": 9.0 - i, "kind": kind}
        for i, kind in enumerate(["x", "y", "x", "z"])
    ]
    path = tmp_path / f"t.{ending}"
    frame = pl.DataFrame(rows)
    if ending == "csv":
        frame.write_csv(path)
    elif ending == "parquet":
        frame.write_parquet(path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    columns = {"timestamp_column": "t", "class_column": "kind"}
    spec = TraceWorkload.model_validate({"format": "columns", "path": str(path), "columns": columns})
    table = build_requests(spec, seed=0)
    assert table.class_names == ("x", "y", "z")
    # Sorted by time, so from the last row to the first.
    assert [table.class_names[i] for i in table.request_class] == ["z", "x", "y", "x"]
    assert table.prompt_tokens.tolist() == [13, 12, 11, 10]


@pytest.mark.parametrize(
    ("ending", "text"),
    [
        ("csv", "prompt_tokens,output_tokens,kind\n3,4,a\n5,6,\n"),
        (
            "jsonl",
            '{"prompt_tokens": 3, "output_tokens": 4, "kind": "a"}\n'
            '{"prompt_tokens": 3, "output_tokens": 4, "kind": []}',
        ),
    ],
)
def test_a_row_without_a_class_is_an_error(tmp_path, ending, text):
    path = tmp_path / f"t.{ending}"
    path.write_text(text)
    spec = TraceWorkload.model_validate(
        {"format": "columns", "path": str(path), "columns": {"class_column": "kind"}, "arrivals": {"kind": "burst"}}
    )
    with pytest.raises(TraceError, match=r"kind: .*must name a class"):
        build_requests(spec, seed=0)
