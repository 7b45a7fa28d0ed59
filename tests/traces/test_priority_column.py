"""A plain trace's priorities reach the requests, in order of arrival, and wrong ones are refused by row."""

import json

import pytest

from kvsim.errors import TraceError
from kvsim.specs.workload import TraceColumns, TraceWorkload
from kvsim.traces import read_trace
from kvsim.workloads import build_requests

ROWS = [(2.0, 30, 3, 0), (0.0, 10, 1, 5), (1.0, 20, 2, 1)]
COLUMNS = TraceColumns(timestamp_column="at", priority_column="priority")


def write(folder, name, rows=ROWS):
    path = folder / name
    if name.endswith(".csv"):
        lines = ["at,prompt_tokens,output_tokens,priority", *(",".join(map(str, row)) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    else:
        keys = ("at", "prompt_tokens", "output_tokens", "priority")
        path.write_text("".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
def test_priorities_follow_their_rows(tmp_path, name):
    path = write(tmp_path, name)
    workload = TraceWorkload(format="columns", path=str(path), columns=COLUMNS, max_requests=2)
    requests = build_requests(workload, seed=0)
    assert requests.prompt_tokens.tolist() == [10, 20]
    assert requests.priority.tolist() == [5, 1]


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
def test_without_the_column_there_are_none(tmp_path, name):
    path = write(tmp_path, name)
    columns = TraceColumns(timestamp_column="at")
    assert read_trace("columns", path, columns).priority is None


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
def test_a_negative_priority_is_refused_by_row(tmp_path, name):
    path = write(tmp_path, name, [*ROWS, (3.0, 10, 1, -1)])
    with pytest.raises(TraceError, match="priority: -1 is not allowed; must be a whole number from 0"):
        read_trace("columns", path, COLUMNS)


@pytest.mark.parametrize("value", ["high", "1.5", ""])
def test_a_priority_that_is_no_number_is_told_that_0_is_allowed(tmp_path, value):
    path = write(tmp_path, "t.csv", [*ROWS, (3.0, 10, 1, value)])
    with pytest.raises(TraceError, match=r"priority: .*must be a whole number from 0"):
        read_trace("columns", path, COLUMNS)
