"""From the form's choices to a validated scenario, the file that stands for it, and the key it is cached under."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Final, Literal

from kvsim.errors import InvalidSpec
from kvsim.scenario import Scenario
from kvsim.scenario_file import assign, build_scenario

Method = Literal["estimate", "simulation"]
MAX_UPLOAD_MIB: Final = 20
MAX_NAME_CHARACTERS: Final = 100
FORM: Final = "form"
"""Where an error says that a value stands."""


@dataclass(frozen=True)
class TraceUpload:
    """A trace that the user sent: its bytes stay in memory and reach a file only while a run needs one."""

    name: str
    format: str
    content: bytes
    timestamp_column: str = ""
    prompt_tokens_column: str = ""
    output_tokens_column: str = ""

    @property
    def safe_name(self) -> str:
        """File name without folders or unusual characters; the ending stays."""
        path = PurePosixPath(re.sub(r"[^\w.-]", "_", self.name.replace("\\", "/").rpartition("/")[2]))
        return f"{path.stem.lstrip('.')[:MAX_NAME_CHARACTERS] or 'trace'}{path.suffix[:10]}"

    @property
    def sha256(self) -> str:
        """Hash of the content, for the cache key."""
        return hashlib.sha256(self.content).hexdigest()


@dataclass(frozen=True)
class Choices:
    """What the form holds; None leaves a value to the workload or to the engine."""

    model: str
    device: str
    workload: str
    strategies: tuple[str, ...]
    tensor_parallel_size: int = 1
    max_num_seqs: int = 256
    request_rate: float | None = None
    max_concurrency: int | None = None
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    trace: TraceUpload | None = None


@dataclass(frozen=True)
class Question:
    """A scenario, the strategies to try on it, and the document that gives the scenario from a file."""

    scenario: Scenario
    strategies: tuple[str, ...]
    document: dict[str, Any]
    trace: TraceUpload | None

    def key(self, method: Method) -> str:
        """Canonical text: equal keys have equal answers."""
        trace = self.trace.sha256 if self.trace else None
        return json.dumps([method, self.scenario.fingerprint(), self.strategies, trace])


def build_question(choices: Choices) -> Question:
    """Validate the choices; raise InvalidSpec or UnknownName with the CLI's text."""
    if not choices.strategies:
        msg = f"{FORM}: strategies: none chosen; choose at least one, such as native"
        raise InvalidSpec(msg)
    document: dict[str, Any] = {
        "model": choices.model,
        "device": choices.device,
        "workload": _trace_document(choices.trace) if choices.trace else choices.workload,
    }
    for key, value in _settings(choices):
        assign(document, key, value, FORM)
    scenario = build_scenario(document, (), FORM, require_units=True)
    return Question(scenario, choices.strategies, document, choices.trace)


def _settings(choices: Choices) -> list[tuple[str, Any]]:
    """Dotted keys that differ from a scenario's defaults."""
    engine = Scenario.model_fields["engine"].get_default(call_default_factory=True)
    settings: list[tuple[str, Any]] = []
    if choices.tensor_parallel_size != 1:
        settings.append(("tensor_parallel_size", choices.tensor_parallel_size))
    if choices.max_num_seqs != engine.max_num_seqs:
        settings.append(("engine.max_num_seqs", choices.max_num_seqs))
    if choices.request_rate is not None and choices.max_concurrency is not None:
        msg = (
            f"{FORM}: request_rate {choices.request_rate:g} and max_concurrency {choices.max_concurrency} exclude each "
            "other: arrivals are an open stream or a closed loop; clear one"
        )
        raise InvalidSpec(msg)
    if choices.request_rate is not None:
        settings.append(("workload.arrivals", {"kind": "poisson", "request_rate": choices.request_rate}))
    if choices.max_concurrency is not None:
        settings.append(("workload.arrivals", {"kind": "concurrency", "max_concurrency": choices.max_concurrency}))
    for name, limit_ms in (("ttft_s", choices.ttft_ms), ("tpot_s", choices.tpot_ms)):
        if limit_ms is not None:
            settings.append((f"slo.{name}", f"{limit_ms!r} ms"))
    return settings


def _trace_document(trace: TraceUpload) -> dict[str, Any]:
    if len(trace.content) > MAX_UPLOAD_MIB * 2**20:
        msg = f"{trace.name}: {len(trace.content)} bytes; the dashboard takes traces of at most {MAX_UPLOAD_MIB} MiB"
        raise InvalidSpec(msg)
    document: dict[str, Any] = {"kind": "trace", "format": trace.format, "path": trace.safe_name}
    named = {
        "timestamp_column": trace.timestamp_column,
        "prompt_tokens_column": trace.prompt_tokens_column,
        "output_tokens_column": trace.output_tokens_column,
    }
    columns = {key: name for key, name in named.items() if name}
    if trace.format == "columns" and columns:
        document["columns"] = columns
    return document
