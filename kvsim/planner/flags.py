"""How to run a point: which engine ships its strategy, since when, and the command that starts it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, Final

from pydantic import Field

from kvsim.compression import Compression, parse_compression
from kvsim.data_files import preset_dir
from kvsim.documents import load_yaml, validate
from kvsim.planner.screen import Candidate
from kvsim.specs.base import Spec
from kvsim.specs.device import DeviceSpec
from kvsim.specs.engine import EngineKind, EngineSpec

NOT_SHIPPED: Final = "no engine ships this yet"


class ShippedStrategy(Spec):
    """One strategy of kvsim as an engine has it."""

    strategy: str
    flags: tuple[str, ...]
    since: str | None = None
    """A release that a source shows with it, perhaps not the first; None where no source names one."""
    vendors: tuple[str, ...] = ()
    """Vendors of devices that the source names; empty is any."""
    needs: str | None = None
    """What else it takes."""
    source: str


class EngineCommand(Spec):
    """An engine's command line: ``presets/engines/<engine>.yaml``."""

    engine: EngineKind
    title: str
    command: tuple[str, ...]
    options: dict[str, str]
    """Option of ``EngineSpec``, ``tensor_parallel_size`` or ``no_chunked_prefill`` to the engine's flag."""
    strategies: tuple[ShippedStrategy, ...] = Field(min_length=1)


class Command(Spec):
    """A command line that starts an engine with a point's strategy and settings."""

    engine: str
    line: str
    is_priced: bool
    """Whether the figures are of this engine; of another one they may differ."""
    since: str | None = None
    needs: str | None = None
    remark: str | None = None
    source: str


@cache
def engine_commands() -> tuple[EngineCommand, ...]:
    """Every engine's table; raise InvalidSpec or UnknownName where a file is wrong."""
    folder = preset_dir("engines")
    tables = [validate(EngineCommand, load_yaml(path), path.name) for path in sorted(folder.glob("*.yaml"))]
    for table in tables:
        for row in table.strategies:
            parse_compression(row.strategy)
    return tuple(tables)


def commands(candidate: Candidate, device: DeviceSpec, model_name: str, longest_tokens: int) -> tuple[Command, ...]:
    """Commands of all engines that ship the candidate's strategy, the priced engine first; none where none does."""
    found = list(_commands(candidate, device, model_name, longest_tokens))
    return tuple(sorted(found, key=lambda command: (not command.is_priced, command.engine)))


def shipped_by(candidate: Candidate, vendor: str) -> str | None:
    """The engine that prices a candidate if it ships its strategy and no source leaves the vendor's devices out."""
    return next(
        (
            table.title
            for table in engine_commands()
            if table.engine == candidate.engine.kind
            for row in table.strategies
            if _shipped(row.strategy) == candidate.strategy and (vendor in row.vendors or not row.vendors)
        ),
        None,
    )


def not_shipped(candidate: Candidate) -> str | None:
    """Why the priced engine has no flag for a candidate's strategy, or None where it has one."""
    ships = {
        table.engine: table.title
        for table in engine_commands()
        if any(_shipped(row.strategy) == candidate.strategy for row in table.strategies)
    }
    if candidate.engine.kind in ships:
        return None
    if not ships:
        return NOT_SHIPPED
    title = next(table.title for table in engine_commands() if table.engine == candidate.engine.kind)
    return f"{title} does not ship this yet; {', '.join(ships.values())} does"


@cache
def _shipped(name: str) -> Compression:
    return parse_compression(name)


def _commands(candidate: Candidate, device: DeviceSpec, model: str, longest_tokens: int) -> Iterator[Command]:
    for table in engine_commands():
        row = next((one for one in table.strategies if _shipped(one.strategy) == candidate.strategy), None)
        if row is None:
            continue
        is_priced = table.engine == candidate.engine.kind
        is_elsewhere = "llamacpp" in (table.engine, candidate.engine.kind) or device.vendor not in (
            row.vendors or (device.vendor,)
        )
        if not is_priced and is_elsewhere:
            continue
        name = model.rpartition("/")[2] if table.engine == "llamacpp" else model
        words = [word.format(model=name) for word in table.command]
        words += [*row.flags, *_options(table, candidate, longest_tokens)]
        yield Command(
            engine=table.title,
            line=shlex.join(words),
            is_priced=is_priced,
            since=row.since,
            needs=row.needs,
            remark=_remark(row, device, candidate.layout.replicas),
            source=row.source,
        )


def _options(table: EngineCommand, candidate: Candidate, longest_tokens: int) -> Iterator[str]:
    engine, ranks = candidate.engine, candidate.layout.tensor_parallel_size
    values: dict[str, Any] = {"tensor_parallel_size": ranks} if ranks > 1 else {}
    values |= _engine_values(table, engine, longest_tokens)
    for option, value in values.items():
        if option in table.options:
            yield table.options[option]
            if value is not True:
                yield f"{value:g}" if isinstance(value, float) else str(value)


def _engine_values(table: EngineCommand, engine: EngineSpec, longest_tokens: int) -> Mapping[str, Any]:
    values: dict[str, Any] = {
        "max_num_seqs": engine.max_num_seqs,
        "max_num_batched_tokens": engine.max_num_batched_tokens,
    }
    if table.engine == engine.kind:
        for option in ("gpu_memory_utilization", "mem_fraction_static", "free_gpu_memory_fraction", "n_ubatch"):
            if getattr(engine, option) is not None:
                values[option] = getattr(engine, option)
        if engine.block_size != 16 or table.engine == "sglang":
            values["block_size"] = engine.block_size
        if not engine.enable_chunked_prefill:
            values["no_chunked_prefill"] = True
    if engine.max_model_len is not None:
        values["max_model_len"] = engine.max_model_len
    if table.engine == "llamacpp":
        values["ctx_size"] = engine.ctx_size or engine.max_num_seqs * longest_tokens
    return values


def _remark(row: ShippedStrategy, device: DeviceSpec, replicas: int) -> str | None:
    said = [f"start {replicas} of these behind a router"] if replicas > 1 else []
    if row.vendors and device.vendor not in row.vendors:
        said.append(f"its source names {' and '.join(row.vendors)}, not {device.vendor}")
    return "; ".join(said) or None
