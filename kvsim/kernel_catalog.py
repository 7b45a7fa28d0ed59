"""Kernels as compiled and checked without a GPU: the entries of ``calibration/compiled``, and which were measured."""

from __future__ import annotations

import csv
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from kvsim.data_files import data_dir
from kvsim.documents import load_json, validate
from kvsim.errors import InvalidSpec
from kvsim.specs.base import Basis, Spec

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
"""Architectures that kernels are compiled for, in the order of listings."""


class KernelResources(Spec):
    """What one compiled kernel uses."""

    registers: Count
    spill_bytes: Count
    shared_bytes: Count
    kv_buffers: tuple[Count, ...]
    """Tiles of each matrix-shaped pipeline buffer in shared memory."""


class InstructionCount(Spec):
    """Clocks that each pipe of a multiprocessor is busy per cost unit, from counting instructions."""

    kernel: str
    matrix_instructions: tuple[str, ...]
    body: Literal["matrix_loop", "largest_loop", "whole"]
    units: Positive
    """Cost units that one program does in one pass over the machine code's body."""
    unrolled_by: Annotated[int, Field(ge=1)]
    """Passes over the source's loop that one over the machine code's makes."""
    instructions: Count
    loops_counted_once: Count
    """Loops inside the body; their trip counts are not in the machine code, so the clocks are too few."""
    clocks: dict[str, NotNegative] = Field(min_length=1)
    busiest_pipe: str
    unpriced: tuple[str, ...]
    """Opcodes in the body whose cost is not known."""

    @model_validator(mode="after")
    def _busiest_is_busiest(self) -> Self:
        if self.clocks.get(self.busiest_pipe) != max(self.clocks.values()):
            msg = f"busiest_pipe must name the pipe with the most clocks, not {self.busiest_pipe!r}"
            raise ValueError(msg)
        return self

    @property
    def busiest_clocks(self) -> float:
        """Clocks per cost unit that the busiest pipe bounds the kernel by."""
        return self.clocks[self.busiest_pipe]


class CompiledConfig(Spec):
    """One tiling of a variant."""

    config: dict[str, int | float | bool | str | None]
    kernels: dict[str, KernelResources]
    not_compiled: tuple[str, ...] = ()
    """Library calls and copies, which are no Triton kernels."""
    count: InstructionCount | None = None


class CompiledTarget(Spec):
    """A variant on one architecture: its tilings, the default first, or why it cannot run there."""

    configs: tuple[CompiledConfig, ...] = ()
    unsupported: str | None = None

    @model_validator(mode="after")
    def _either(self) -> Self:
        if bool(self.configs) == (self.unsupported is not None):
            msg = "a target needs configs or the reason why it is unsupported"
            raise ValueError(msg)
        return self

    @property
    def count(self) -> InstructionCount | None:
        """Count of the default tiling."""
        return self.configs[0].count if self.configs else None


class Correctness(Spec):
    """How many cases agreed with the plain torch reference, and where they ran."""

    where: str
    triton: str
    passed: Count
    cases: Count


class CompiledKernel(Spec):
    """One variant: an operation on a KV format in one form."""

    schema_version: Literal[1]
    variant: str
    operation: str
    kv_format: str | None
    strategy: str | None
    """The encoding of ``kvsim list strategies`` whose bytes the format has."""
    form: Literal["best", "as_shipped"]
    cost_unit: str
    read_bytes_per_unit: NotNegative
    written_bytes_per_unit: NotNegative
    compile_case: str
    triton: str
    kernel: str
    source_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    correctness: Correctness
    targets: dict[str, CompiledTarget]

    @model_validator(mode="after")
    def _known_targets(self) -> Self:
        if unknown := sorted(set(self.targets) - set(TARGETS)):
            msg = f"targets may be {', '.join(TARGETS)}, not {', '.join(unknown)}"
            raise ValueError(msg)
        return self


def load_compiled_kernel(path: Path) -> CompiledKernel:
    """Read one entry.

    Raises
    ------
    InvalidSpec
        The file cannot be read, is not named after its variant, or a value in it is not allowed.
    """
    entry = validate(CompiledKernel, load_json(path), str(path))
    expected = entry.variant.replace("/", "-") + ".json"
    if path.name != expected:
        msg = f"{path}: variant: {entry.variant!r} belongs into {expected}"
        raise InvalidSpec(msg)
    return entry


@lru_cache(maxsize=1)
def load_compiled_kernels() -> tuple[CompiledKernel, ...]:
    """Read all entries, in the order of operation, format and form; raise InvalidSpec where one is broken."""
    entries = [load_compiled_kernel(path) for path in sorted(data_dir("calibration/compiled").glob("*.json"))]
    return tuple(sorted(entries, key=lambda entry: (entry.operation, entry.kv_format or "", entry.form)))


@lru_cache(maxsize=1)
def measured_sources() -> frozenset[tuple[str, str]]:
    """Give variant and source hash of every row that a GPU took in ``calibration/measured/*/rows.csv``.

    Raises
    ------
    InvalidSpec
        A file has no such columns.
    """
    found: set[tuple[str, str]] = set()
    for path in sorted(data_dir("calibration/measured").glob("*/rows.csv")):
        with path.open(encoding="utf-8", newline="") as stream:
            rows = csv.DictReader(stream)
            for column in ("basis", "variant", "source_sha256"):
                if column not in (rows.fieldnames or ()):
                    msg = f"{path}: has no column {column}"
                    raise InvalidSpec(msg)
            found.update((row["variant"], row["source_sha256"]) for row in rows if row["basis"] == Basis.MEASURED)
    return frozenset(found)
