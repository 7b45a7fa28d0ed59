"""Range ANS in plain torch with 64-bit integers, all lanes at once, one token after another."""

import torch

from .tables import PROBABILITY_BITS, TOTAL

_LOW_STATE = 1 << 16


def rans_encode_reference(
    symbols: torch.Tensor, frequency: torch.Tensor, cumulative: torch.Tensor, room: int, capacity: int
) -> dict[str, torch.Tensor]:
    """Encode `symbols`, uint8, (num_segments, tokens, num_lanes), with one table per run of equal many lanes.

    Returns
    -------
    dict
        ``words`` int16 (num_segments, room, num_lanes), zero where unused; ``states`` int32; ``num_words`` int32,
        -1 - i for the i-th lane that needs more than `room` words; ``overflow`` uint8 (capacity, tokens), the
        symbols of those lanes; ``num_overflows`` int32 (1,).
    """
    num_segments, tokens, num_lanes = symbols.shape
    table = torch.arange(num_lanes, device=symbols.device) // (num_lanes // len(frequency))
    state = torch.full((num_segments, num_lanes), _LOW_STATE, dtype=torch.int64, device=symbols.device)
    count = torch.zeros_like(state)
    words = torch.zeros(num_segments, tokens, num_lanes, dtype=torch.int64, device=symbols.device)
    for token in reversed(range(tokens)):
        symbol = symbols[:, token].long()
        f, start = frequency[table, symbol].long(), cumulative[table, symbol].long()
        full = state >= f << (32 - PROBABILITY_BITS)
        place = words.gather(1, count[:, None])
        words.scatter_(1, count[:, None], torch.where(full[:, None], (state & 0xFFFF)[:, None], place))
        count += full
        state = torch.where(full, state >> 16, state)
        state = ((state // f) << PROBABILITY_BITS) + state % f + start
    overflows = (count > room).flatten()
    place = overflows.cumsum(0) - 1
    overflow = torch.zeros(capacity, tokens, dtype=torch.uint8, device=symbols.device)
    kept = symbols.transpose(1, 2).reshape(-1, tokens)[overflows][:capacity]
    overflow[: len(kept)] = kept
    return {
        "words": torch.nn.functional.pad(words, (0, 0, 0, max(0, room - tokens)))[:, :room].to(torch.int16),
        "states": state.to(torch.int32),
        "num_words": torch.where(overflows, -1 - place, count.flatten()).view_as(count).to(torch.int32),
        "overflow": overflow,
        "num_overflows": overflows.sum(dtype=torch.int32)[None],
    }


def rans_decode_reference(
    words: torch.Tensor,
    states: torch.Tensor,
    num_words: torch.Tensor,
    overflow: torch.Tensor,
    frequency: torch.Tensor,
) -> torch.Tensor:
    """Decode to symbols, uint8, (num_segments, tokens, num_lanes)."""
    num_segments, num_lanes = states.shape
    table = torch.arange(num_lanes, device=words.device) // (num_lanes // len(frequency))
    cumulative = frequency.long().cumsum(1)
    state, count = states.long() & 0xFFFFFFFF, num_words.long()
    symbols = torch.empty(num_segments, overflow.shape[1], num_lanes, dtype=torch.uint8, device=words.device)
    for token in range(overflow.shape[1]):
        slot = state & (TOTAL - 1)
        bounds = cumulative[table].expand(num_segments, -1, -1).contiguous()
        symbol = torch.searchsorted(bounds, slot[..., None], right=True).squeeze(-1)
        f = frequency.long()[table, symbol]
        state = f * (state >> PROBABILITY_BITS) + slot - (cumulative[table, symbol] - f)
        empty = (state < _LOW_STATE) & (count > 0)
        word = words.long().gather(1, (count - 1).clamp_min(0)[:, None])[:, 0] & 0xFFFF
        state = torch.where(empty, (state << 16) | word, state)
        count -= empty.long()
        symbols[:, token] = symbol
    is_raw = num_words < 0
    symbols.transpose(1, 2)[is_raw] = overflow[(-1 - num_words[is_raw]).long()]
    return symbols
