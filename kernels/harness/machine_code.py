"""Machine code as a list of instructions with a flow graph, and the loops in it."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Body = Literal["matrix_loop", "largest_loop", "whole"]


@dataclass(frozen=True)
class Instruction:
    """One instruction: the mnemonic with its modifiers, the operands as written, the guard or an empty string."""

    opcode: str
    operands: str = ""
    guard: str = ""


@dataclass(frozen=True)
class Listing:
    """A kernel's instructions in the order of their addresses.

    Attributes
    ----------
    successors : tuple of tuple of int
        Where control can go after each instruction, as indices.
    """

    instructions: tuple[Instruction, ...]
    successors: tuple[tuple[int, ...], ...]


def read_lines(
    text: str, label: re.Pattern[str], instruction: re.Pattern[str]
) -> tuple[list[Instruction], dict[str, int]]:
    """Read instructions in order, and which one each label stands before.

    `label` matches a line and groups its name; `instruction` groups guard, mnemonic and operands.
    """
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if named := label.match(line):
            labels[named.group(1)] = len(instructions)
        elif found := instruction.match(line):
            guard, opcode, operands = found.groups()
            instructions.append(Instruction(opcode, operands.strip(), guard or ""))
    return instructions, labels


@dataclass(frozen=True)
class CountedBody:
    """The instructions that one pass executes, and how many loops inside are counted as if they ran once."""

    instructions: tuple[Instruction, ...]
    inner_loops: int


def reachable(listing: Listing) -> frozenset[int]:
    """Give the instructions that the kernel's entry can reach: no padding, no trap loop behind the last exit."""
    found: set[int] = set()
    open_ends = [0] if listing.instructions else []
    while open_ends:
        at = open_ends.pop()
        if at not in found:
            found.add(at)
            open_ends.extend(listing.successors[at])
    return frozenset(found)


def natural_loops(listing: Listing) -> tuple[frozenset[int], ...]:
    """Find the natural loops, largest first; loops with one header are one loop.

    A jump backwards is a loop only where its target dominates it: compilers also put unlikely code behind the exit and
    jump back from there (Aho, Lam, Sethi, Ullman: Compilers, section 9.6).
    """
    order = _reverse_postorder(listing)
    dominator = _immediate_dominators(listing, order)
    position = {at: place for place, at in enumerate(order)}
    predecessors: dict[int, list[int]] = {at: [] for at in order}
    for at in order:
        for after in listing.successors[at]:
            predecessors[after].append(at)
    loops: dict[int, set[int]] = {}
    for at in order:
        for header in listing.successors[at]:
            if position[header] <= position[at] and _dominates(dominator, header, at):
                loops.setdefault(header, {header}).update(_reaching(predecessors, at, header))
    return tuple(sorted((frozenset(loop) for loop in loops.values()), key=lambda loop: (-len(loop), min(loop))))


def _reverse_postorder(listing: Listing) -> list[int]:
    order: list[int] = []
    seen = {0}
    stack = [(0, iter(listing.successors[0]))] if listing.instructions else []
    while stack:
        at, rest = stack[-1]
        for after in rest:
            if after not in seen:
                seen.add(after)
                stack.append((after, iter(listing.successors[after])))
                break
        else:
            order.append(at)
            stack.pop()
    return order[::-1]


def _immediate_dominators(listing: Listing, order: Sequence[int]) -> dict[int, int]:
    """Iterate to the fixed point in reverse postorder (Cooper, Harvey and Kennedy, 2001)."""
    position = {at: place for place, at in enumerate(order)}
    predecessors: dict[int, list[int]] = {at: [] for at in order}
    for at in order:
        for after in listing.successors[at]:
            predecessors[after].append(at)
    dominator = {order[0]: order[0]} if order else {}
    changed = True
    while changed:
        changed = False
        for at in order[1:]:
            common = -1
            for before in predecessors[at]:
                if before not in dominator:
                    continue
                other = before
                while common not in (-1, other):
                    if position[common] > position[other]:
                        common = dominator[common]
                    else:
                        other = dominator[other]
                common = other
            if dominator.get(at) != common:
                dominator[at] = common
                changed = True
    return dominator


def _dominates(dominator: dict[int, int], header: int, at: int) -> bool:
    while at not in (header, dominator[at]):
        at = dominator[at]
    return at == header


def _reaching(predecessors: dict[int, list[int]], end: int, header: int) -> set[int]:
    """Give what reaches the end of a loop without passing its header."""
    found: set[int] = set()
    open_ends = [end]
    while open_ends:
        at = open_ends.pop()
        if at not in found and at != header:
            found.add(at)
            open_ends.extend(predecessors[at])
    return found


def counted_body(listing: Listing, body: Body, is_matrix: Callable[[Instruction], bool]) -> CountedBody:
    """Pick the instructions to count; raise ValueError where the kernel has no such loop.

    ``matrix_loop`` is the largest of the innermost loops that hold a matrix instruction, ``largest_loop`` the one with
    the most instructions, ``whole`` all that the entry reaches. A loop inside the body is counted once: its trip count
    is not in the machine code.
    """
    loops = natural_loops(listing)
    if body == "whole":
        chosen = reachable(listing)
    elif body == "largest_loop":
        if not loops:
            raise ValueError("the machine code has no loop")
        chosen = loops[0]
    else:
        with_matrix = [loop for loop in loops if any(is_matrix(listing.instructions[at]) for at in loop)]
        innermost = [loop for loop in with_matrix if not any(other < loop for other in with_matrix)]
        if not innermost:
            raise ValueError("no loop of the machine code holds a matrix instruction")
        chosen = innermost[0]
    inner = sum(loop < chosen or (body == "whole" and loop <= chosen) for loop in loops)
    return CountedBody(tuple(listing.instructions[at] for at in sorted(chosen)), inner)
