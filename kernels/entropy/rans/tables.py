"""Frequency tables of range ANS: quantised counts, and the packed table that a decoder looks symbols up in."""

import torch

PROBABILITY_BITS = 12
"""Frequencies of a table sum to 2^12 (Giesen 2014, arXiv:1402.3392, uses the same range)."""
TOTAL = 1 << PROBABILITY_BITS
NUM_SYMBOLS = 256


def quantize_counts(counts: torch.Tensor) -> torch.Tensor:
    """Scale symbol counts to frequencies that sum to 2^12, at least 1 for every symbol that occurs.

    Parameters
    ----------
    counts : Tensor of integers, (num_tables, 256)
        Each row with at least one count.

    Returns
    -------
    Tensor of int32, (num_tables, 256)
        No frequency is 2^12: a table of one symbol gives a neighbour 1, so that a state never overflows.

    Raises
    ------
    ValueError
        If a row is empty or a count negative.
    """
    counts = counts.double()
    if (counts < 0).any() or (counts.sum(1) == 0).any():
        raise ValueError("each table needs at least one count, and none negative")
    lonely = (counts > 0).sum(1) == 1
    counts = counts + torch.where(lonely[:, None] & (counts.roll(1, 1) > 0), 1e-9, 0.0)
    share = counts / counts.sum(1, keepdim=True) * TOTAL
    frequency = torch.where(counts > 0, share.floor().clamp_min(1), 0)
    # What rounding left over goes to, or comes from, the most frequent symbol: it changes its cost least.
    frequency.scatter_add_(1, frequency.argmax(1, keepdim=True), TOTAL - frequency.sum(1, keepdim=True))
    return frequency.to(torch.int32)


def cumulate(frequency: torch.Tensor) -> torch.Tensor:
    """Give the sum of the frequencies of smaller symbols, (num_tables, 256), int32."""
    return (frequency.cumsum(1) - frequency).to(torch.int32)


def pack_decoder(frequency: torch.Tensor) -> torch.Tensor:
    """Give the decoder's table, int32, (num_tables, 2^12): per slot ``symbol | frequency << 8 | offset << 20``.

    `offset` is the slot's place within its symbol, below 2^12; one 4-byte load decodes one symbol.
    """
    tables = []
    for row in frequency.long():
        symbol = torch.repeat_interleave(torch.arange(NUM_SYMBOLS, device=row.device), row)
        offset = torch.arange(TOTAL, device=row.device) - (row.cumsum(0) - row)[symbol]
        packed = symbol | row[symbol] << 8 | offset << 20
        tables.append(torch.where(packed >= 1 << 31, packed - (1 << 32), packed))
    return torch.stack(tables).to(torch.int32)


def cross_entropy_bits(counts: torch.Tensor, frequency: torch.Tensor) -> float:
    """Bits that the counted symbols cost under the tables: what an ideal coder would write."""
    used = counts > 0
    probability = frequency.double()[used] / TOTAL
    return float(-(counts.double()[used] * probability.log2()).sum())
