"""Rows from JSON objects, field by field."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvsim.traces.files import class_label, finite_number, hash_id_list, whole_number
from kvsim.traces.rows import Origin, RawRows


@dataclass(frozen=True)
class JsonFields:
    """Keys of the values wanted; None where the objects have no such value."""

    prompt: str
    output: str
    time: str | None = None
    hash_ids: str | None = None
    hash_block_tokens: int = 512
    priority: str | None = None
    request_class: str | None = None


def read_json_rows(
    rows: Iterable[tuple[int, Mapping[str, Any]]], fields: JsonFields, origin: Origin, *, times_per_second: float = 1.0
) -> RawRows:
    """Collect (number, object) pairs into columns; raise TraceError for the first value that is not allowed."""
    numbers: list[int] = []
    prompts: list[int] = []
    outputs: list[int] = []
    times: list[float] = []
    hash_ids: list[list[int]] = []
    classes: list[str] = []
    priorities: list[int] = []
    for number, row in rows:
        numbers.append(number)
        prompts.append(whole_number(row, fields.prompt, origin, number))
        outputs.append(whole_number(row, fields.output, origin, number))
        if fields.time is not None:
            times.append(finite_number(row, fields.time, origin, number))
        if fields.hash_ids is not None:
            hash_ids.append(hash_id_list(row, fields.hash_ids, origin, number))
        if fields.request_class is not None:
            classes.append(class_label(row, fields.request_class, origin, number))
        if fields.priority is not None:
            priorities.append(whole_number(row, fields.priority, origin, number, least=0))
    return RawRows(
        numbers=np.array(numbers, dtype=np.int64),
        prompt_tokens=np.array(prompts, dtype=np.int64),
        output_tokens=np.array(outputs, dtype=np.int64),
        arrival_s=None if fields.time is None else np.array(times, dtype=np.float64) / times_per_second,
        hash_ids=None if fields.hash_ids is None else hash_ids,
        hash_block_tokens=fields.hash_block_tokens,
        classes=None if fields.request_class is None else classes,
        priority=None if fields.priority is None else np.array(priorities, dtype=np.int64),
    )
