"""Whatever the bytes, a reader gives rows that keep its promises or raises TraceError, and nothing else."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kvsim.errors import TraceError
from kvsim.traces import read_trace
from kvsim.traces.rows import MAX_REQUEST_TOKENS

HEADS = {
    "azure": b"TIMESTAMP,ContextTokens,GeneratedTokens\n",
    "burstgpt": b"Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n",
    "mooncake": b'{"timestamp": 0, "input_length": 5, "output_length": 5, "hash_ids": [1]}\n',
    "vllm_bench": b'{"input_lens": [1, 2], "output_lens": ',
    "sharegpt": b'[{"prompt_tokens": 1, "output_tokens": 2},',
    "columns": b"prompt_tokens,output_tokens\n",
}
CELL = st.one_of(
    st.integers(-(10**20), 10**20).map(str),
    st.floats(width=32).map(str),
    st.sampled_from(
        ["", '"', "2023-11-16 18:15:46.6805900", "9999-12-31 23:59:59", "0001-01-01 00:00:00", "\r", "\x00"]
    ),
    st.text(max_size=5),
)
ROWS = st.lists(st.lists(CELL, min_size=1, max_size=7).map(",".join), max_size=5).map("\n".join).map(str.encode)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=8,
)
FUZZ = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read_or_refuse(trace_format, path):
    try:
        trace = read_trace(trace_format, path)
    except TraceError:
        return
    assert len(trace) > 0
    for counts in (trace.prompt_tokens, trace.output_tokens):
        assert counts.dtype == np.int64
        assert counts.min() >= 1
        assert counts.max() <= MAX_REQUEST_TOKENS
    if trace.arrival_s is not None:
        assert trace.arrival_s[0] == 0
        assert np.all(np.isfinite(trace.arrival_s))
        assert np.all(np.diff(trace.arrival_s) >= 0)


@pytest.mark.parametrize("trace_format", sorted(HEADS))
@FUZZ
@given(data=st.data())
def test_garbage_is_refused(tmp_path, trace_format, data):
    tail = data.draw(st.one_of(ROWS, st.binary(max_size=60), JSON.map(lambda value: json.dumps(value).encode())))
    content = data.draw(st.sampled_from([HEADS[trace_format], b""])) + tail
    if data.draw(st.booleans()):
        content = gzip.compress(content)[: data.draw(st.integers(3, 200))]
    path = tmp_path / "fuzz.csv"
    path.write_bytes(content)
    read_or_refuse(trace_format, path)


@FUZZ
@given(value=JSON, key=st.sampled_from(["timestamp", "input_length", "output_length", "hash_ids"]))
@example(value=1e308, key="timestamp")
def test_any_value_in_any_mooncake_field(tmp_path, value, key):
    row = {"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [1, 2]} | {key: value}
    path = tmp_path / "fuzz.jsonl"
    path.write_text(json.dumps(row))
    read_or_refuse("mooncake", path)


@FUZZ
@given(content=st.binary(max_size=200))
def test_damaged_parquet(tmp_path, content):
    path = tmp_path / "fuzz.parquet"
    path.write_bytes(b"PAR1" + content + b"PAR1")
    read_or_refuse("columns", path)


COUNTS = st.lists(st.tuples(st.integers(1, MAX_REQUEST_TOKENS), st.integers(0, MAX_REQUEST_TOKENS)), min_size=1)


@FUZZ
@given(rows=COUNTS)
def test_rows_are_conserved(tmp_path, rows):
    path = tmp_path / "t.csv"
    lines = [f"{second},GPT-4,{prompt},{output},0,x" for second, (prompt, output) in enumerate(rows)]
    path.write_bytes(HEADS["burstgpt"] + "\n".join(lines).encode())
    kept = [row for row in rows if row[1] > 0]
    if not kept:
        with pytest.raises(TraceError, match="no requests"):
            read_trace("burstgpt", path)
        return
    trace = read_trace("burstgpt", path)
    assert list(zip(trace.prompt_tokens.tolist(), trace.output_tokens.tolist(), strict=True)) == kept
    dropped = len(rows) - len(kept)
    assert trace.notes == ((f"{dropped} rows with 0 output tokens dropped (failed requests)",) if dropped else ())
