"""Every reader: what it takes, what it drops and says so, and what it refuses by name."""

from __future__ import annotations

import gzip
import json

import numpy as np
import polars as pl
import pytest

from kvsim.errors import TraceError
from kvsim.specs.workload import TraceColumns
from kvsim.traces import read_trace

AZURE_HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
BURST_HEAD = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def azure(tmp_path, rows, head=AZURE_HEAD):
    return read_trace("azure", write(tmp_path, "t.csv", head + rows))


def mooncake_line(**changes):
    row = {"timestamp": 0, "input_length": 1000, "output_length": 5, "hash_ids": [7, 8]} | changes
    return json.dumps(row) + "\n"


def mooncake(tmp_path, content, name="t.jsonl"):
    return read_trace("mooncake", write(tmp_path, name, content))


def test_azure_times_keep_seven_digits(tmp_path):
    trace = azure(tmp_path, "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:46.6805901,396,109\n")
    assert trace.prompt_tokens.tolist() == [374, 396]
    assert trace.output_tokens.tolist() == [44, 109]
    assert trace.arrival_s.tolist() == [0.0, 1e-7]
    assert trace.source == "t.csv (azure)"
    assert trace.prefix_hashes is None


def test_azure_takes_crlf_byte_order_mark_blank_lines_and_utc_suffix(tmp_path):
    content = "\ufeff" + AZURE_HEAD + "2024-05-10 00:00:00+00:00,5,6\n\n2024-05-10 00:00:01.5+00:00,7,8\n"
    trace = read_trace("azure", write(tmp_path, "t.csv", content.replace("\n", "\r\n")))
    assert trace.arrival_s.tolist() == [0.0, 1.5]
    assert trace.output_tokens.tolist() == [6, 8]


def test_azure_drops_and_counts_failed_requests(tmp_path):
    trace = azure(tmp_path, "2023-11-16 18:15:46,5,0\n2023-11-16 18:15:47,6,1\n")
    assert len(trace) == 1
    assert trace.arrival_s.tolist() == [0.0]
    assert trace.notes == ("1 rows with 0 output tokens dropped (failed requests)",)


def test_unsorted_times_are_sorted_and_said(tmp_path):
    trace = azure(tmp_path, "2023-11-16 18:15:47,5,1\n2023-11-16 18:15:46,6,2\n2023-11-16 18:15:48,7,3\n")
    assert trace.prompt_tokens.tolist() == [6, 5, 7]
    assert trace.arrival_s.tolist() == [0.0, 1.0, 2.0]
    assert "went back 1 times" in trace.notes[0]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("2023-11-16 18:15:46,-5,1\n", ["line 2", "ContextTokens", "-5", "from 1 to 2147483648"]),
        ("2023-11-16 18:15:46,5,1\n2023-11-16 18:15:46,0,1\n", ["line 3", "ContextTokens", "0 is not allowed"]),
        ("2023-11-16 18:15:46,5,-1\n", ["line 2", "GeneratedTokens", "-1"]),
        ("2023-11-16 18:15:46,5,2.5\n", ["line 2", "GeneratedTokens", "'2.5'", "whole number"]),
        ("2023-11-16 18:15:46,5,nan\n", ["line 2", "GeneratedTokens", "'nan'"]),
        ("2023-11-16 18:15:46,99999999999,1\n", ["line 2", "99999999999"]),
        ("2023-11-16 18:15:46,99999999999999999999,1\n", ["line 2", "whole number"]),
        ("\n\n2023-11-16 18:15:46,many,1\n", ["line 4", "'many'"]),
        ("yesterday,5,1\n", ["line 2", "TIMESTAMP", "'yesterday'", "2023-11-16"]),
        ("2023-11-16 18:15:46,5\n", ["line 2", "GeneratedTokens", "missing"]),
        ("2023-11-16 18:15:46,5,1,1\n", ["not valid CSV"]),
        ("", ["no requests"]),
        ("2023-11-16 18:15:46,5,0\n", ["no requests"]),
    ],
)
def test_azure_names_what_is_wrong(tmp_path, rows, words):
    with pytest.raises(TraceError) as caught:
        azure(tmp_path, rows)
    message = str(caught.value)
    assert "t.csv" in message
    assert all(word in message for word in words), message
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_missing_column_suggests_the_near_name(tmp_path):
    with pytest.raises(TraceError, match=r"column 'ContextTokens' is missing; did you mean 'contexttoken'"):
        azure(tmp_path, "", head="TIMESTAMP,contexttoken,GeneratedTokens\n")


def test_repeated_column_is_refused(tmp_path):
    with pytest.raises(TraceError, match="'ContextTokens' appears 2 times"):
        azure(tmp_path, "", head="TIMESTAMP,ContextTokens,ContextTokens,GeneratedTokens\n")


@pytest.mark.parametrize(
    ("asked", "content", "meant"),
    [
        ("azure", mooncake_line(), "mooncake"),
        ("mooncake", AZURE_HEAD + "2023-11-16 18:15:46,5,1\n", "azure"),
        ("mooncake", BURST_HEAD + "5,ChatGPT,1,2,3,API log\n", "burstgpt"),
        ("burstgpt", AZURE_HEAD, "azure"),
        ("vllm_bench", mooncake_line(), "mooncake"),
        ("sharegpt", '{"input_lens": [1], "output_lens": [2]}', "vllm_bench"),
        ("vllm_bench", '[{"conversations": []}]', "sharegpt"),
    ],
)
def test_wrong_format_is_recognised(tmp_path, asked, content, meant):
    with pytest.raises(TraceError, match=f"looks like {meant}: set format: {meant}"):
        read_trace(asked, write(tmp_path, "t.txt", content))


@pytest.mark.parametrize("packed", [False, True])
def test_mooncake_plain_and_gzip(tmp_path, packed):
    text = (mooncake_line() + "\n" + mooncake_line(timestamp=1500, hash_ids=[7])).encode()
    trace = mooncake(tmp_path, gzip.compress(text) if packed else text)
    assert trace.arrival_s.tolist() == [0.0, 1.5]
    assert trace.prompt_tokens.tolist() == [1000, 1000]
    assert trace.prefix_hashes == ((7, 8), (7,))
    assert trace.hash_block_tokens == 512


def test_sorting_carries_the_hashes_along(tmp_path):
    trace = mooncake(tmp_path, mooncake_line(timestamp=9, hash_ids=[1]) + mooncake_line(timestamp=3, hash_ids=[2]))
    assert trace.prefix_hashes == ((2,), (1,))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (mooncake_line(input_length=0, hash_ids=[]), ["line 2", "input_length", "0 is not allowed"]),
        (mooncake_line(output_length=0), ["line 2", "output_length", "0 is not allowed"]),
        (mooncake_line(output_length="5"), ["line 2", "output_length", "'5'"]),
        (mooncake_line(output_length=True), ["line 2", "True"]),
        (mooncake_line(output_length=2**31 + 1), ["line 2", "2147483649"]),
        (mooncake_line(timestamp=None), ["line 2", "timestamp", "None"]),
        ('{"timestamp": NaN, "input_length": 1, "output_length": 1, "hash_ids": []}\n', ["line 2", "nan"]),
        (mooncake_line(timestamp=10**400), ["line 2", "timestamp"]),
        (mooncake_line(hash_ids=[1, 2, 3]), ["line 2", "hash ids", "3 ids", "at most 2 chunks"]),
        (mooncake_line(hash_ids=[1.5]), ["line 2", "hash_ids", "list of whole numbers"]),
        (mooncake_line().replace("input_length", "input_lenght"), ["line 2", "did you mean 'input_lenght'"]),
        ("[1]\n", ["line 2", "not a JSON object"]),
        ('{"timestamp": \n', ["line 2", "not valid JSON"]),
        ("[" * 100_000 + "\n", ["line 2", "nested too deeply"]),
        ('{"timestamp": ' + "9" * 5000 + "}\n", ["line 2", "too many digits"]),
    ],
)
def test_mooncake_names_what_is_wrong(tmp_path, line, words):
    with pytest.raises(TraceError) as caught:
        mooncake(tmp_path, mooncake_line() + line)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_truncated_and_damaged_gzip(tmp_path):
    packed = gzip.compress(mooncake_line().encode() * 1000)
    for content in (packed[: len(packed) // 2], packed[:2] + b"\0" * 40, packed[:15] + b"\xff" * 30 + packed[45:]):
        with pytest.raises(TraceError, match=r"gzip|cannot read"):
            mooncake(tmp_path, content, "t.jsonl.gz")


@pytest.mark.parametrize("content", [b"", b"  \n ", gzip.compress(b"", mtime=0)])
def test_empty_file(tmp_path, content):
    for trace_format in ("azure", "mooncake", "burstgpt", "vllm_bench", "sharegpt"):
        with pytest.raises(TraceError, match="the file is empty"):
            read_trace(trace_format, write(tmp_path, "t", content))


def test_binary_junk_parquet_and_bad_text(tmp_path):
    with pytest.raises(TraceError, match="binary file"):
        read_trace("azure", write(tmp_path, "a", b"\x7fELF\0\0\0"))
    with pytest.raises(TraceError, match="this is Parquet"):
        read_trace("azure", write(tmp_path, "b", b"PAR1abc"))
    with pytest.raises(TraceError, match="line 2: not UTF-8"):
        mooncake(tmp_path, mooncake_line().encode() + b"\xff\xfe\n")


def test_missing_file_folder_and_near_name(tmp_path):
    write(tmp_path, "trace.csv", AZURE_HEAD)
    with pytest.raises(TraceError, match=r"no such file; did you mean 'trace\.csv'"):
        read_trace("azure", tmp_path / "tracer.csv")
    with pytest.raises(TraceError, match="not a file"):
        read_trace("azure", tmp_path)


def test_caps_are_enforced(tmp_path, monkeypatch):
    monkeypatch.setattr("kvsim.traces.files.MAX_TRACE_BYTES", 1000)
    with pytest.raises(TraceError, match="at most 1000 are allowed"):
        mooncake(tmp_path, gzip.compress(b" " * 5000))
    with pytest.raises(TraceError, match="5000 bytes; at most 1000"):
        mooncake(tmp_path, b" " * 5000)
    monkeypatch.undo()
    for module in ("files", "tables", "rows"):
        monkeypatch.setattr(f"kvsim.traces.{module}.MAX_TRACE_ROWS", 2)
    with pytest.raises(TraceError, match="at most 2 are allowed"):
        mooncake(tmp_path, mooncake_line() * 3)
    with pytest.raises(TraceError, match="at most 2 are allowed"):
        azure(tmp_path, "2023-11-16 18:15:46,5,1\n" * 4)


@pytest.mark.parametrize("session_columns", [False, True])
def test_burstgpt_drops_failures(tmp_path, session_columns):
    extra = "Session ID,Elapsed time," if session_columns else ""
    cells = "s1,2.5," if session_columns else ""
    head = BURST_HEAD.replace("Model", f"{extra}Model")
    rows = f"5,{cells}ChatGPT,472,18,490,Conversation log\n45.5,{cells}GPT-4,1087,0,1087,API log\n"
    rows += f"118,{cells}GPT-4,417,276,693,API log\n"
    trace = read_trace("burstgpt", write(tmp_path, "b.csv", head + rows))
    assert trace.prompt_tokens.tolist() == [472, 417]
    assert trace.output_tokens.tolist() == [18, 276]
    assert trace.arrival_s.tolist() == [0.0, 113.0]
    assert trace.notes == ("1 rows with 0 output tokens dropped (failed requests)",)


@pytest.mark.parametrize("time", ["inf", "nan", "soon", ""])
def test_burstgpt_refuses_times_that_are_none(tmp_path, time):
    with pytest.raises(TraceError, match="line 2: Timestamp"):
        read_trace("burstgpt", write(tmp_path, "b.csv", BURST_HEAD + f"{time},ChatGPT,1,2,3,API log\n"))


def test_times_too_far_apart_for_a_number(tmp_path):
    rows = "-1.7e308,G,1,2,3,x\n1.7e308,G,1,2,3,x\n"
    with pytest.raises(TraceError, match="span more than a number can hold"):
        read_trace("burstgpt", write(tmp_path, "b.csv", BURST_HEAD + rows))


def test_vllm_bench_detail(tmp_path):
    result = {"input_lens": [10, 20, 30], "output_lens": [1, 0, 3], "start_times": [100.5, 0.0, 100.0], "ttfts": []}
    trace = read_trace("vllm_bench", write(tmp_path, "r.json", json.dumps(result)))
    assert trace.prompt_tokens.tolist() == [30, 10]
    assert trace.arrival_s.tolist() == [0.0, 0.5]
    assert len(trace.notes) == 2
    del result["start_times"]
    assert read_trace("vllm_bench", write(tmp_path, "r.json", json.dumps(result))).arrival_s is None


@pytest.mark.parametrize(
    ("result", "words"),
    [
        ({"duration": 3.0, "completed": 5}, "--save-detailed"),
        ({"input_lens": [1, 2], "output_lens": [1]}, "input_lens has 2, output_lens has 1"),
        ({"input_lens": 5, "output_lens": [1]}, "input_lens: must be a list"),
        ({"input_lens": [1, None], "output_lens": [1, 1]}, "request 2: input_lens: None"),
        ([1], "one JSON object"),
    ],
)
def test_vllm_bench_refuses(tmp_path, result, words):
    with pytest.raises(TraceError, match=words):
        read_trace("vllm_bench", write(tmp_path, "r.json", json.dumps(result)))


def test_sharegpt_lengths(tmp_path):
    entries = [
        {"prompt_len": 12, "output_len": 3},
        {"conversations": [{"from": "human", "num_tokens": 7}, {"from": "gpt", "num_tokens": 9}, {"value": "more"}]},
        {"conversations": [{"from": "human", "value": "alone"}]},
    ]
    trace = read_trace("sharegpt", write(tmp_path, "s.json", json.dumps(entries)))
    assert trace.prompt_tokens.tolist() == [12, 7]
    assert trace.output_tokens.tolist() == [3, 9]
    assert trace.arrival_s is None
    assert trace.notes == ("1 conversations with fewer than two messages dropped",)


def test_sharegpt_text_asks_for_a_tokenizer(tmp_path):
    entries = [{"id": "a", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}]
    with pytest.raises(TraceError, match=r"entry 1: no token counts.*prompt_tokens,output_tokens.*format: columns"):
        read_trace("sharegpt", write(tmp_path, "s.json", json.dumps(entries)))


COLUMNS = TraceColumns(
    timestamp_column="when", prompt_tokens_column="in", output_tokens_column="out", hash_ids_column="ids",
    hash_id_block_size=64,
)  # fmt: skip


@pytest.mark.parametrize("ending", ["jsonl", "ndjson", "jsonl.gz", "parquet"])
def test_columns_with_hashes(tmp_path, ending):
    rows = [{"when": 3.0, "in": 100, "out": 5, "ids": [1, 2]}, {"when": 3.5, "in": 64, "out": 6, "ids": [1]}]
    path = tmp_path / f"t.{ending}"
    if ending == "parquet":
        pl.DataFrame(rows).write_parquet(path)
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(text) if ending.endswith("gz") else text)
    trace = read_trace("columns", path, COLUMNS)
    assert trace.prompt_tokens.tolist() == [100, 64]
    assert trace.output_tokens.tolist() == [5, 6]
    assert trace.arrival_s.tolist() == [0.0, 0.5]
    assert trace.prefix_hashes == ((1, 2), (1,))
    assert trace.hash_block_tokens == 64


def test_columns_defaults_need_no_times(tmp_path):
    trace = read_trace("columns", write(tmp_path, "t.csv", "output_tokens,x,prompt_tokens\n5,y,1e2\n"))
    assert (trace.prompt_tokens.tolist(), trace.output_tokens.tolist()) == ([100], [5])
    assert trace.arrival_s is None


def test_parquet_datetimes(tmp_path):
    times = pl.Series([1_700_000_000_000_500, 1_700_000_000_000_000]).cast(pl.Datetime("us"))
    pl.DataFrame({"when": times, "in": [1.0, 2.0], "out": [3, 4]}).write_parquet(tmp_path / "t.parquet")
    columns = TraceColumns(timestamp_column="when", prompt_tokens_column="in", output_tokens_column="out")
    trace = read_trace("columns", tmp_path / "t.parquet", columns)
    assert trace.prompt_tokens.tolist() == [2, 1]
    np.testing.assert_allclose(trace.arrival_s, [0.0, 5e-4])


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        ({"in": [1], "out": [1]}, "column 'when' is missing"),
        ({"when": [1.0, None], "in": [1, 1], "out": [1, 1]}, "row 2: when: the value is missing"),
        ({"when": [1.0], "in": [1.5], "out": [1]}, "row 1: in: 1.5 is not allowed"),
        ({"when": [1.0], "in": [True], "out": [1]}, "in: holds Boolean"),
        ({"when": [[1.0]], "in": [1], "out": [1]}, "when: holds List"),
        ({"when": [1.0], "in": [1], "out": [0]}, "row 1: out: 0 is not allowed"),
        ({"when": [float("nan")], "in": [1], "out": [1]}, "row 1: when: nan is not allowed"),
    ],
)
def test_parquet_refuses(tmp_path, frame, words):
    pl.DataFrame(frame).write_parquet(tmp_path / "t.parquet")
    columns = TraceColumns(timestamp_column="when", prompt_tokens_column="in", output_tokens_column="out")
    with pytest.raises(TraceError, match=words):
        read_trace("columns", tmp_path / "t.parquet", columns)


@pytest.mark.parametrize("ids", [[1], ["a"], [[1, None]], [["a"]], [None]])
def test_parquet_hash_column_must_hold_lists_of_numbers(tmp_path, ids):
    pl.DataFrame({"when": [1.0], "in": [600], "out": [1], "ids": ids}).write_parquet(tmp_path / "t.parquet")
    with pytest.raises(TraceError, match=r"ids: .*lists? of whole numbers"):
        read_trace("columns", tmp_path / "t.parquet", COLUMNS)


def test_columns_refuses_endings_csv_hashes_and_foreign_formats(tmp_path):
    with pytest.raises(TraceError, match=r"one of \.csv, \.jsonl"):
        read_trace("columns", write(tmp_path, "t.txt", "x"))
    with pytest.raises(TraceError, match="a CSV cannot hold hash ids"):
        read_trace("columns", write(tmp_path, "t.csv", "in,out\n"), COLUMNS)
    with pytest.raises(TraceError, match="only format 'columns' takes column names"):
        read_trace("azure", write(tmp_path, "t.csv", AZURE_HEAD), COLUMNS)
    with pytest.raises(TraceError, match="not valid Parquet"):
        read_trace("columns", write(tmp_path, "t.parquet", "PAR1 but no more"))
