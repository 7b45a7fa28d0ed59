"""What a compiled kernel uses: registers, spills, shared memory, prefetch buffers; and its machine code."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

from . import amdgcn, sass
from .machine_code import Listing

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_TOOL_LIMIT_S = 120
_PREFETCH_BUFFERS = re.compile(r"local_alloc : \(\) -> !ttg\.memdesc<(\d+)x\d+x\d+x")


@dataclass(frozen=True)
class Resources:
    """What one program of a kernel uses.

    Attributes
    ----------
    spill_bytes : int
        Per thread, in local (scratch) memory.
    kv_buffers : tuple of int
        Tiles of each matrix-shaped pipeline buffer in shared memory: the prefetch depth that Triton really gave.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    kv_buffers: tuple[int, ...]


def _run(tool: str, cubin: bytes, *options: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [str(_TOOLS / tool), *options, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_TOOL_LIMIT_S)  # noqa: S603
    return done.stdout


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if not found:
        raise ValueError(f"the compiler's output does not say {pattern!r}")
    return int(found.group(1))


def read_resources(kernel: Any) -> Resources:
    """Read what Triton's compiled kernel uses."""
    buffers = tuple(int(count) for count in _PREFETCH_BUFFERS.findall(kernel.asm["ttgir"]))
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]
        registers = _number(r"\.vgpr_count:\s*(\d+)", text)
        spill_bytes = _number(r"\.private_segment_fixed_size:\s*(\d+)", text)
    else:
        text = _run("cuobjdump", kernel.asm["cubin"], "-res-usage")
        registers = _number(r"REG:(\d+)", text)
        spill_bytes = _number(r"STACK:(\d+)", text) + _number(r"LOCAL:(\d+)", text)
    return Resources(registers, spill_bytes, kernel.metadata.shared, buffers)


def read_listing(kernel: Any) -> Listing:
    """Read the machine code of Triton's compiled kernel."""
    if "amdgcn" in kernel.asm:
        return amdgcn.parse(kernel.asm["amdgcn"])
    return sass.parse(_run("nvdisasm", kernel.asm["cubin"], "-c", "--no-dataflow"))
