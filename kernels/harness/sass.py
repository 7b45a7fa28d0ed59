"""Clocks of a streaming multiprocessor's pipes for a piece of SASS: a lower bound, from counting alone.

Each warp of a program executes the body once, so a pipe that serves `lanes` threads per clock is busy for
``num_warps * instructions * 32 / lanes`` clocks. The pipe that is busy longest bounds the body, however well the rest
overlaps. Rates and their sources are in the README beside this file.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .machine_code import Instruction, Listing, read_lines

WARP_THREADS = 32
ISSUE_SLOTS = 4
"""Schedulers of a multiprocessor, an instruction per clock each."""
SHARED_BYTES_PER_CLOCK = 128
GLOBAL_BYTES_PER_CLOCK = 128
SHUFFLE_LANES = 32
SPECIAL_LANES = 16
"""Lanes of the unit for conversions, exp2, reciprocals, bit counts."""
INTEGER_MULTIPLY_LANES = 64

_MATRIX = re.compile(r"[A-Z]*MMA\.|[A-Z]*GMMA|UTC[A-Z]*MMA")
_MMA_SHAPES = {
    "884": (8, 8, 4), "8816": (8, 8, 16), "1684": (16, 8, 4), "1688": (16, 8, 8), "16816": (16, 8, 16),
    "16832": (16, 8, 32), "16864": (16, 8, 64), "168128": (16, 8, 128),
}  # fmt: skip
_WARPS_PER_WGMMA = 4


@dataclass(frozen=True)
class Multiprocessor:
    """Rates of one architecture that differ from others'.

    Attributes
    ----------
    fp32_lanes, half2_lanes, bf162_lanes : int
        Threads per clock for an fp32 operation, a packed fp16 one, a packed bf16 one.
    add_lanes, logic_lanes : int
        Threads per clock for 32-bit integer additions and comparisons; for logic, shifts, permutes and packing.
    float_to_int_lanes : int
    mma_flops : float
        Of ``mma.sync`` on 16-bit operands with fp32 sums, per clock; 8-bit operands run at twice, tf32 at half of it.
    wgmma_flops : float
        Of warp-group instructions on 16-bit operands.
    """

    fp32_lanes: int
    half2_lanes: int
    bf162_lanes: int
    add_lanes: int
    logic_lanes: int
    float_to_int_lanes: int
    mma_flops: float
    wgmma_flops: float = 0.0


MULTIPROCESSORS: Mapping[str, Multiprocessor] = {
    "sm_80": Multiprocessor(64, 128, 64, 64, 64, 16, mma_flops=2048),
    "sm_90": Multiprocessor(128, 128, 128, 64, 64, 16, mma_flops=2560, wgmma_flops=4096),
    "sm_100": Multiprocessor(128, 64, 64, 64, 64, 16, mma_flops=2560),
    "sm_120": Multiprocessor(128, 64, 64, 128, 64, 2, mma_flops=1024),
}

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z]\w*(?:\.\w+)*)\s*(.*?)\s*;")
_LABEL = re.compile(r"^\s*(\.L\w+):")
_TARGET = re.compile(r"`\((\.L\w+)\)")
_BARRIER = re.compile(r"\bB\d+\b")

# Opcodes by the pipe that serves them; the first part of the mnemonic decides.
_FP32 = ("FADD", "FMUL", "FFMA", "FSWZADD", "FCHK")
_PACKED_FP32 = ("FADD2", "FMUL2", "FFMA2")
_PACKED_HALF = ("HADD2", "HMUL2", "HFMA2")
_INTEGER_MULTIPLY = ("IMAD", "IMUL", "IDP")
_ADDITION = ("IADD", "IADD3", "VIADD", "IABS", "ISETP", "IMNMX", "VIMNMX", "VIMNMX3", "VIADDMNMX")
_LOGIC = (
    "LOP3", "PLOP3", "SHF", "SHL", "SHR", "LEA", "PRMT", "SEL", "FSEL", "BMSK", "SGXT", "MOV", "CS2R", "P2R", "R2P",
    "F2FP", "I2FP", "I2IP", "FSETP", "FMNMX", "FMNMX3", "FSET", "HSETP2", "HSET2", "HMNMX2", "VHMNMX", "VOTE", "VOTEU",
    "R2UR", "VABSDIFF", "VABSDIFF4", "LEPC",
)  # fmt: skip
_SPECIAL = ("MUFU", "I2F", "F2F", "FRND", "I2I", "POPC", "FLO", "BREV", "REDUX", "CREDUX", "MATCH")
_SHARED = ("LDS", "STS", "LDSM", "STSM", "ATOMS")
_GLOBAL = ("LDG", "STG", "LDGSTS", "ATOMG", "ATOM", "RED", "REDG", "LD", "ST", "LDL", "STL")
_ISSUED_ONLY = (
    "BRA", "BRX", "BRXU", "JMP", "BSSY", "BSYNC", "BREAK", "BAR", "DEPBAR", "LDGDEPBAR", "NOP", "EXIT", "WARPSYNC",
    "YIELD", "SYNCS", "CCTL", "CCTLL", "MEMBAR", "ELECT", "ERRBAR", "NANOSLEEP", "CALL", "RET", "BMOV", "KILL",
    "WARPGROUP", "ARRIVES", "FENCE", "S2R", "S2UR", "LDC", "LDCU", "BPT", "ACQBULK", "PREEXIT", "USETMAXREG",
)  # fmt: skip
_BULK_COPIES = ("UTMALDG", "UTMASTG", "UBLKCP", "UTMACMDFLUSH", "UTMACCTL", "UTMAREDG", "UBLKRED", "UTMAPF")


def parse(text: str) -> Listing:
    """Read the output of ``nvdisasm -c`` for one kernel."""
    instructions, labels = read_lines(text, _LABEL, _INSTRUCTION)
    joins: dict[str, list[int]] = {}
    successors = []
    for at, instruction in enumerate(instructions):
        target = _TARGET.search(instruction.operands)
        there = [labels[target.group(1)]] if target and target.group(1) in labels else []
        if instruction.opcode == "BSSY" or instruction.opcode.startswith("BSSY."):
            for barrier in _BARRIER.findall(instruction.operands):
                joins[barrier] = there
            there = []
        after = _after(instruction, there, joins, [at + 1])
        successors.append(tuple(dict.fromkeys(place for place in after if place < len(instructions))))
    return Listing(tuple(instructions), tuple(successors))


def _after(instruction: Instruction, there: list[int], joins: Mapping[str, list[int]], next_: list[int]) -> list[int]:
    """Say where control can go: there (the label named), to a barrier's join, or on."""
    name = instruction.opcode.split(".")[0]
    # Branches on a uniform or second predicate carry it as an operand, not as a guard.
    may_fall_through = instruction.guard not in ("", "PT", "UPT") or bool(re.match(r"!?U?P\d", instruction.operands))
    if name in ("BRA", "JMP"):
        return there + next_ if may_fall_through else there
    if name == "CALL":
        return there + next_
    if name in ("EXIT", "RET", "BRX", "BRXU", "KILL"):
        return next_ if may_fall_through else []
    if name == "BSYNC":
        barrier = _BARRIER.search(instruction.operands)
        return joins.get(barrier.group(0), next_) if barrier else next_
    return next_


def is_matrix(instruction: Instruction) -> bool:
    """Say whether an instruction multiplies matrices."""
    return bool(_MATRIX.match(instruction.opcode))


@dataclass(frozen=True)
class PipeClocks:
    """Clocks by pipe for one pass of one program, and the opcodes that no rule covers."""

    clocks: Mapping[str, float]
    unpriced: tuple[str, ...]


def clocks_by_pipe(body: Iterable[Instruction], target: str, num_warps: int) -> PipeClocks:
    """Count the clocks that each pipe of a multiprocessor is busy while one program executes a body once.

    Parameters
    ----------
    body : iterable of Instruction
    target : str
        A key of `MULTIPROCESSORS`.
    num_warps : int
        Warps of a program, each of which executes the body.
    """
    rates = MULTIPROCESSORS[target]
    fixed = _fixed_costs(rates)
    warp_clocks: Counter[str] = Counter()
    unpriced: set[str] = set()
    for instruction in body:
        warp_clocks["issue"] += 1 / ISSUE_SLOTS
        if instruction.guard in ("!PT", "!UPT"):
            continue
        priced = _price(instruction, rates, fixed)
        if priced is None:
            unpriced.add(instruction.opcode)
        else:
            for pipe, clocks in priced.items():
                warp_clocks[pipe] += clocks
    return PipeClocks({pipe: num_warps * clocks for pipe, clocks in warp_clocks.items()}, tuple(sorted(unpriced)))


def _fixed_costs(rates: Multiprocessor) -> dict[str, dict[str, float]]:
    """Give the clocks of one warp's instruction by pipe, for opcodes that cost the same whatever they operate on."""
    costs = {name: {} for name in _ISSUED_ONLY}
    for names, pipe, lanes in (
        (_FP32, "fma", rates.fp32_lanes),
        (_PACKED_FP32, "fma", rates.fp32_lanes / 2),
        (_ADDITION, "alu", rates.add_lanes),
        (("IADD.64",), "alu", rates.add_lanes / 2),
        (_LOGIC, "alu", rates.logic_lanes),
        (_SPECIAL, "special", SPECIAL_LANES),
        (("F2I",), "special", rates.float_to_int_lanes),
        (("SHFL",), "shuffle", SHUFFLE_LANES),
    ):
        costs |= {name: {pipe: WARP_THREADS / lanes} for name in names}
    multiply = {"fma": WARP_THREADS / rates.fp32_lanes, "imad": WARP_THREADS / INTEGER_MULTIPLY_LANES}
    return costs | dict.fromkeys(_INTEGER_MULTIPLY, multiply)


def _price(
    instruction: Instruction, rates: Multiprocessor, fixed: Mapping[str, dict[str, float]]
) -> dict[str, float] | None:
    """Give the clocks of one warp's instruction by pipe; None where its cost is not known."""
    name = instruction.opcode.split(".")[0]
    if is_matrix(instruction):
        clocks = _matrix_clocks(instruction, rates)
        return None if clocks is None else {"tensor": clocks}
    if name in _SHARED:
        return {"shared": _bytes(instruction) / SHARED_BYTES_PER_CLOCK}
    if name in _GLOBAL:
        return {"global": _bytes(instruction) / GLOBAL_BYTES_PER_CLOCK}
    if name in _PACKED_HALF:
        return {"fma": WARP_THREADS / (rates.bf162_lanes if "BF16" in instruction.opcode else rates.half2_lanes)}
    # The uniform datapath works beside the others, once per warp.
    otherwise = {} if name.startswith("U") and name not in _BULK_COPIES else None
    return fixed.get(instruction.opcode, fixed.get(name, otherwise))


def _matrix_clocks(instruction: Instruction, rates: Multiprocessor) -> float | None:
    name, _, rest = instruction.opcode.partition(".")
    shape_name = rest.split(".")[0]
    if name.endswith("GMMA"):
        shape = tuple(int(part) for part in shape_name.split("x")) if "x" in shape_name else None
        flops, share = rates.wgmma_flops, _WARPS_PER_WGMMA
    else:
        shape, flops, share = _MMA_SHAPES.get(shape_name), rates.mma_flops, 1
    if shape is None or len(shape) != 3 or not flops:
        return None
    scale = {"Q": 2.0, "I": 2.0, "O": 4.0}.get(name[0], 0.5 if "TF32" in rest else 1.0)
    if name[0] == "D":
        return None
    return 2 * shape[0] * shape[1] * shape[2] / share / (flops * scale)


def _bytes(instruction: Instruction) -> float:
    """Bytes that a warp moves; at least the one wavefront that any access takes."""
    name, *modifiers = instruction.opcode.split(".")
    if name in ("LDSM", "STSM"):
        matrices = next((int(part) for part in modifiers if part in ("2", "4")), 1)
        return matrices * 128
    lane_bytes = next((int(part) // 8 for part in modifiers if part in ("64", "128", "256")), 4)
    return max(WARP_THREADS * lane_bytes, 128)
