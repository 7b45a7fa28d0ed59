"""Result files of ``vllm bench serve --save-result --save-detailed``: one JSON object with per-request arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvsim.traces.files import decode_text, parse_json, read_trace_bytes, wrong_format_hint
from kvsim.traces.json_rows import JsonFields, read_json_rows
from kvsim.traces.rows import Origin, TraceRows, check_rows


def read_vllm_bench(path: Path) -> TraceRows:
    """Read ``input_lens``, ``output_lens`` and, where present, ``start_times`` (s). Raise TraceError.

    Requests with 0 output tokens failed in that run and are dropped.
    """
    origin = Origin(path, "vllm_bench", "request", "input_lens", "output_lens", "start_times")
    data = read_trace_bytes(origin)
    hint = wrong_format_hint(data, origin)
    result = parse_json(decode_text(data, origin), origin, hint=hint)
    if not isinstance(result, dict):
        origin.fail(f"the file must hold one JSON object{hint}")
    names = ["input_lens", "output_lens", *(["start_times"] if "start_times" in result else [])]
    arrays = {name: _array(result, name, origin, hint) for name in names}
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        described = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        origin.fail(f"the arrays differ in length: {described}")
    rows = (dict(zip(names, values, strict=True)) for values in zip(*arrays.values(), strict=True))
    fields = JsonFields("input_lens", "output_lens", "start_times" if "start_times" in arrays else None)
    raw = read_json_rows(enumerate(rows, start=1), fields, origin)
    return check_rows(raw, origin, zero_output_is_failure=True)


def _array(result: dict[str, Any], name: str, origin: Origin, hint: str) -> list[Any]:
    if name not in result:
        origin.fail(
            f"{name} is missing: per-request detail was dropped; run vllm bench serve with both "
            f"--save-result and --save-detailed{hint}"
        )
    if not isinstance(result[name], list):
        origin.fail("must be a list with one number per request", field=name)
    array: list[Any] = result[name]
    return array
