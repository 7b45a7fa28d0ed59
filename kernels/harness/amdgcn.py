"""Clocks of a compute unit's pipes for a piece of CDNA 3 assembly: a lower bound, from counting alone.

A compute unit has four SIMDs of 16 lanes; a wave of 64 threads runs on one of them, 4 clocks per vector instruction.
With enough waves the four SIMDs share the work, so a program of `num_warps` waves takes a quarter of their summed
clocks. Rates and their sources are in the README beside this file.
"""

import re
from collections import Counter
from collections.abc import Iterable

from .machine_code import Instruction, Listing
from .sass import PipeClocks

WAVE_THREADS = 64
SIMDS = 4
VECTOR_CLOCKS = 4
QUARTER_RATE_CLOCKS = 16
LDS_BYTES_PER_CLOCK = 128
VECTOR_MEMORY_BYTES_PER_CLOCK = 64
MIN_VECTOR_MEMORY_CLOCKS = 4
"""Addresses of 16 lanes are taken per clock."""
MFMA_FLOPS_PER_SIMD = {"f16": 512, "bf16": 512, "fp8": 1024, "bf8": 1024, "i8": 1024, "xf32": 256, "f32": 64, "f64": 64}
"""Per clock; a quarter of the compute unit's: CDNA 3 white paper, table of peak rates."""

_LABEL = re.compile(r"^(\.?[A-Za-z_]\w*):")
_INSTRUCTION = re.compile(r"^\s+([a-z]\w*)\s*([^;]*)")
_MFMA = re.compile(r"v_s?mfma[a-z]*_[a-z0-9]+_(\d+)x(\d+)x(\d+)(?:_(\d+)b)?_?([a-z0-9]+)")
_QUARTER_RATE = re.compile(
    r"v_(exp|log|rcp|rcp_iflag|rsq|sqrt|sin|cos)_|v_(mul_lo|mul_hi|mad)_[iu](32|64)|v_mad_[iu]64_|v_ldexp_f64|v_rcp_f64"
)
_CONTROL = ("s_waitcnt", "s_nop", "s_barrier", "s_endpgm", "s_cbranch", "s_branch", "s_sleep", "s_setprio")
_VECTOR_MEMORY = ("buffer_", "global_", "flat_", "scratch_")
_DS_BYTES = (("b128", 16), ("b96", 12), ("b64", 8), ("b32", 4), ("b16", 4), ("u16", 4), ("b8", 4), ("u8", 4), ("i8", 4))
_WORDS = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8}


def parse(text: str) -> Listing:
    """Read the first function of an ``amdgcn`` listing as Triton gives it."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    started = False
    for line in text.splitlines():
        if label := _LABEL.match(line):
            if label.group(1).startswith(".Lfunc_end"):
                break
            started = started or not label.group(1).startswith(".")
            labels[label.group(1)] = len(instructions)
        elif started and (found := _INSTRUCTION.match(line)):
            instructions.append(Instruction(found.group(1), found.group(2).strip()))
    successors = []
    for at, instruction in enumerate(instructions):
        there = [labels[instruction.operands]] if instruction.operands in labels else []
        if instruction.opcode == "s_branch":
            after = there
        elif instruction.opcode.startswith("s_cbranch"):
            after = [*there, at + 1]
        else:
            after = [] if instruction.opcode in ("s_endpgm", "s_setpc_b64") else [at + 1]
        successors.append(tuple(place for place in after if place < len(instructions)))
    return Listing(tuple(instructions), tuple(successors))


def is_matrix(instruction: Instruction) -> bool:
    """Say whether an instruction multiplies matrices."""
    return instruction.opcode.startswith(("v_mfma", "v_smfma"))


def clocks_by_pipe(body: Iterable[Instruction], target: str, num_warps: int) -> PipeClocks:
    """Count the clocks that each pipe of a compute unit is busy while one program executes a body once.

    Parameters
    ----------
    body : iterable of Instruction
    target : str
        Only ``gfx942`` is known.
    num_warps : int
        Waves of a program, each of which executes the body.
    """
    if target != "gfx942":
        msg = f"rates of {target} are not known"
        raise ValueError(msg)
    wave_clocks: Counter[str] = Counter()
    unpriced: set[str] = set()
    for instruction in body:
        priced = _price(instruction)
        if priced is None:
            unpriced.add(instruction.opcode)
        else:
            pipe, clocks = priced
            wave_clocks[pipe] += clocks
    wave_clocks.pop("", None)
    return PipeClocks({pipe: num_warps * clocks for pipe, clocks in wave_clocks.items()}, tuple(sorted(unpriced)))


def _price(instruction: Instruction) -> tuple[str, float] | None:
    """Give the pipe of one wave's instruction and its clocks, as a share of the compute unit; None if not known."""
    name = instruction.opcode
    if name.startswith(_CONTROL):
        return "", 0.0
    if is_matrix(instruction):
        clocks = _mfma_clocks(name)
        return None if clocks is None else ("mfma", clocks / SIMDS)
    if name.startswith(_VECTOR_MEMORY):
        lane_bytes = next((size for word, size in _WORDS.items() if name.endswith(word)), 4)
        return "vmem", max(WAVE_THREADS * lane_bytes / VECTOR_MEMORY_BYTES_PER_CLOCK, MIN_VECTOR_MEMORY_CLOCKS)
    costs = {
        "v": ("valu", (QUARTER_RATE_CLOCKS if _QUARTER_RATE.match(name) else VECTOR_CLOCKS) / SIMDS),
        "ds": ("lds", _lds_bytes(name) / LDS_BYTES_PER_CLOCK),
        "s": ("salu", 1.0),
    }
    return costs.get(name.partition("_")[0])


def _mfma_clocks(name: str) -> float | None:
    found = _MFMA.match(name)
    if not found:
        return None
    m, n, k = (int(part) for part in found.group(1, 2, 3))
    flops_per_clock = MFMA_FLOPS_PER_SIMD.get(found.group(5))
    return 2 * m * n * k * int(found.group(4) or 1) / flops_per_clock if flops_per_clock else None


def _lds_bytes(name: str) -> float:
    """Bytes that a wave moves through the LDS; a read2 or write2 moves two elements per lane."""
    lane_bytes = next((size for suffix, size in _DS_BYTES if suffix in name), 4)
    return WAVE_THREADS * lane_bytes * (2 if re.match(r"ds_(read|write)2", name) else 1)
