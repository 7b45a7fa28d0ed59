"""ShareGPT lengths: a JSON list whose entries carry token counts, so that no tokenizer is needed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NoReturn

from kvsim.traces.files import decode_text, parse_json, read_trace_bytes, whole_number, wrong_format_hint
from kvsim.traces.json_rows import JsonFields, read_json_rows
from kvsim.traces.rows import Origin, TraceRows, check_rows, shown

PROMPT_KEYS: Final = ("prompt_tokens", "prompt_len", "input_tokens", "input_len", "input_length")
OUTPUT_KEYS: Final = ("output_tokens", "output_len", "completion_tokens", "output_length")
COUNT_KEYS: Final = ("num_tokens", "token_count", "tokens")
"""Keys of a message's token count."""


def read_sharegpt(path: Path) -> TraceRows:
    """Read prompt and output lengths; the file has no times. Raise TraceError.

    An entry is either ``{"prompt_tokens", "output_tokens"}`` or ``{"conversations": [{..., "num_tokens"}, ...]}``; of
    a conversation the first two messages are prompt and answer, as vLLM bench takes them, and one with fewer than two
    is dropped and counted in the notes.
    """
    origin = Origin(path, "sharegpt", "entry")
    data = read_trace_bytes(origin)
    hint = wrong_format_hint(data, origin)
    entries = parse_json(decode_text(data, origin), origin, hint=hint)
    if not isinstance(entries, list):
        origin.fail(f"the file must hold a JSON list{hint}")
    lengths = [(number, _lengths(entry, number, origin)) for number, entry in enumerate(entries, start=1)]
    rows = [(number, row) for number, row in lengths if row is not None]
    short = len(lengths) - len(rows)
    notes = [f"{short} conversations with fewer than two messages dropped"] if short else []
    raw = read_json_rows(rows, JsonFields("prompt_tokens", "output_tokens"), origin)
    return check_rows(raw, origin, zero_output_is_failure=False, notes=notes)


def _lengths(entry: Any, number: int, origin: Origin) -> dict[str, int] | None:
    if not isinstance(entry, dict):
        origin.fail(f"{shown(entry)} is not a JSON object", row=number)
    if "conversations" in entry:
        return _conversation_lengths(entry["conversations"], number, origin)
    prompt_key = next((key for key in PROMPT_KEYS if key in entry), None)
    output_key = next((key for key in OUTPUT_KEYS if key in entry), None)
    if prompt_key is None or output_key is None:
        _fail_for_counts(number, origin)
    return {
        "prompt_tokens": whole_number(entry, prompt_key, origin, number),
        "output_tokens": whole_number(entry, output_key, origin, number),
    }


def _conversation_lengths(messages: Any, number: int, origin: Origin) -> dict[str, int] | None:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        origin.fail("must be a list of JSON objects", row=number, field="conversations")
    if len(messages) < 2:
        return None
    prompt, output = (_message_tokens(message, number, origin) for message in messages[:2])
    return {"prompt_tokens": prompt, "output_tokens": output}


def _message_tokens(message: Mapping[str, Any], number: int, origin: Origin) -> int:
    key = next((key for key in COUNT_KEYS if key in message), None)
    if key is None:
        _fail_for_counts(number, origin)
    return whole_number(message, key, origin, number)


def _fail_for_counts(number: int, origin: Origin) -> NoReturn:
    origin.fail(
        "no token counts, and kvsim has no tokenizer. Count the tokens of each prompt and answer with the model's "
        "tokenizer, write them to a CSV with the columns prompt_tokens,output_tokens and use format: columns; or give "
        f"each entry {PROMPT_KEYS[0]} and {OUTPUT_KEYS[0]}, or each message {COUNT_KEYS[0]}",
        row=number,
    )
