"""How often ptxas unrolled a loop, from the virtual instructions that it was given."""

import re

from .machine_code import Body, CountedBody, Listing, counted_body, read_lines

_LABEL = re.compile(r"^\s*(\$L\w+):")
_INSTRUCTION = re.compile(r"^\s*(?:@(!?%p\d+)\s+)?([a-z][\w.:]*)\s*([^;]*);")
_MATRIX = re.compile(r"mma\.sync|wgmma\.mma_async|tcgen05\.mma")
_ANCHORS = (
    (r"mma\.sync|wgmma\.mma_async", r"[A-Z]MMA\.|[A-Z]GMMA\."),
    (r"bar\.sync", r"BAR\.SYNC"),
    (r"shfl\.sync", "SHFL"),
    (r"cp\.async\.c[ag]\.", "LDGSTS"),
    (r"ex2\.approx", r"MUFU\.EX2"),
    (r"st\.global", "STG"),
    (r"ld\.global", "LDG"),
)
"""Instructions of PTX that become one of SASS each, the most faithful first."""


def parse(text: str) -> Listing:
    """Read the first function of a PTX module."""
    instructions, labels = read_lines(text, _LABEL, _INSTRUCTION)
    successors = []
    for at, instruction in enumerate(instructions):
        after = [] if instruction.opcode.split(".")[0] in ("ret", "exit", "bra") and not instruction.guard else [at + 1]
        if instruction.opcode.split(".")[0] == "bra" and instruction.operands in labels:
            after.append(labels[instruction.operands])
        successors.append(tuple(place for place in after if place < len(instructions)))
    return Listing(tuple(instructions), tuple(successors))


def unrolled_by(text: str, body: Body, machine: CountedBody) -> int:
    """Say how many passes over the loop of a PTX module one pass over its machine code makes.

    The machine code's instructions of some kinds are counted against PTX's; the first kind that the loop has decides.
    A loop without any, and a whole program, is taken as it is.
    """
    if body == "whole":
        return 1
    virtual = counted_body(parse(text), body, lambda one: bool(_MATRIX.match(one.opcode)))
    for in_ptx, in_sass in _ANCHORS:
        asked = sum(bool(re.match(in_ptx, one.opcode)) for one in virtual.instructions)
        if asked:
            given = sum(bool(re.match(in_sass, one.opcode)) for one in machine.instructions)
            return max(1, round(given / asked))
    return 1
