"""Canonical Huffman codes of bounded length, with blocks that decode independently of each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvsim.numerics.entropy import Codes, Counts

LONGEST: Final = 15
"""Longest code in bits: a length takes 4 bits in a table, and a decoder looks up 2^15 entries."""
LENGTH_BITS: Final = 4

Lengths: TypeAlias = NDArray[np.int64]


def code_lengths(counts: Counts, longest: int = LONGEST) -> Lengths:
    """Lengths of the best prefix code none of which is above ``longest``; 0 where a count is 0.

    Package-merge (Larmore and Hirschberg, 1990): of coins of each symbol's weight in every denomination 2^-1 to
    2^-longest, the cheapest set worth (number of symbols - 1). Without the bound it is Huffman's.

    Raises
    ------
    ValueError
        More symbols are used than codes of that length exist.
    """
    used = np.flatnonzero(counts)
    lengths = np.zeros(len(counts), dtype=np.int64)
    if len(used) > 1 << longest:
        msg = f"{len(used)} symbols have no prefix code of at most {longest} bits"
        raise ValueError(msg)
    if len(used) < 2:
        lengths[used] = 1
        return lengths
    weights, members = counts[used].astype(np.float64), np.eye(len(used), dtype=np.int64)
    coins, owners = weights, members
    for _ in range(longest - 1):
        pairs = len(coins) // 2 * 2
        order = np.argsort(coins, kind="stable")[:pairs]
        packages = coins[order].reshape(-1, 2).sum(axis=1)
        packed = owners[order].reshape(-1, 2, len(used)).sum(axis=1)
        coins, owners = np.concatenate((weights, packages)), np.concatenate((members, packed))
    cheapest = np.argsort(coins, kind="stable")[: 2 * (len(used) - 1)]
    lengths[used] = owners[cheapest].sum(axis=0)
    return lengths


def canonical_codes(lengths: Lengths) -> Lengths:
    """Codes that follow from their lengths alone: by length, then by symbol."""
    codes = np.zeros(len(lengths), dtype=np.int64)
    code = previous = 0
    for symbol in np.lexsort((np.arange(len(lengths)), lengths)):
        length = int(lengths[symbol])
        if not length:
            continue
        code <<= length - previous
        codes[symbol], previous = code, length
        code += 1
    return codes


@dataclass(frozen=True, eq=False)
class HuffmanStream:
    """Blocks of symbols in one bit string, and where each block starts.

    Attributes
    ----------
    data : bytes
    starts : (B,)
        Bit offset of each block.
    sizes : (B,)
        Symbols of each block.
    lengths : (levels,)
        The whole table: codes are canonical.
    num_bits : int
    """

    data: NDArray[np.uint8]
    starts: Lengths
    sizes: Lengths
    lengths: Lengths
    num_bits: int


def encode(symbols: Codes, lengths: Lengths, block_size: int) -> HuffmanStream:
    """Code a row of symbols, a block starting at every ``block_size``-th."""
    widths = lengths[symbols]
    ends = np.cumsum(widths)
    first = np.arange(0, len(symbols), block_size)
    place = np.arange(int(widths.sum())) - np.repeat(ends - widths, widths)
    values = np.repeat(canonical_codes(lengths)[symbols], widths)
    bits = (values >> (np.repeat(widths, widths) - 1 - place)) & 1
    sizes = np.diff(np.append(first, len(symbols)))
    starts = (ends - widths)[first]
    return HuffmanStream(np.packbits(bits.astype(np.uint8)), starts, sizes, lengths, len(bits))


def decode(stream: HuffmanStream) -> Codes:
    """Decode all blocks side by side, one symbol of each per turn, as threads of a kernel would."""
    symbols, widths = _lookup(stream.lengths)
    # Two bytes beyond the end are read and masked; blocks shorter than the others run on into what follows.
    data = np.concatenate((stream.data, np.zeros(4, dtype=np.uint8))).astype(np.int64)
    windows = (data[:-2] << 16) | (data[1:-1] << 8) | data[2:]
    cursors, last = stream.starts.copy(), 8 * (len(windows) - 1)
    decoded = np.zeros((int(stream.sizes.max(initial=0)), len(cursors)), dtype=np.int32)
    for turn in range(len(decoded)):
        peeked = (windows[cursors >> 3] >> (24 - LONGEST - (cursors & 7))) & ((1 << LONGEST) - 1)
        decoded[turn] = symbols[peeked]
        cursors = np.minimum(cursors + widths[peeked], last)
    inside = np.arange(len(decoded))[None, :] < stream.sizes[:, None]
    return np.asarray(decoded.T[inside], dtype=np.int32)


def _lookup(lengths: Lengths) -> tuple[Lengths, Lengths]:
    """Symbol and code length by the next 15 bits; bits that no code starts with give symbol 0."""
    used = np.flatnonzero(lengths)
    order = used[np.lexsort((used, lengths[used]))]
    spans = 1 << (LONGEST - lengths[order])
    symbols = np.zeros(1 << LONGEST, dtype=np.int64)
    widths = np.ones(1 << LONGEST, dtype=np.int64)
    symbols[: spans.sum()] = np.repeat(order, spans)
    widths[: spans.sum()] = np.repeat(lengths[order], spans)
    return symbols, widths
