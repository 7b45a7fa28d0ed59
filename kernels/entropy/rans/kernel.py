"""Range ANS in Triton: a lane codes one channel of a segment, lanes run side by side.

The state of a lane is 32 bits, between 2^16 and 2^32; it gives out and takes in words of 16 bits. The encoder walks the
segment backwards, the decoder forwards, reading the words in reverse. Each lane has the same room of words, so the
place of every lane is known without an index (fixed rate). A lane that needs more goes uncoded to a side buffer, whose
rows are given out in order by a prefix sum, so that equal input gives equal bytes.
"""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from ...launches import Launch, LaunchConfig
from .tables import NUM_SYMBOLS, PROBABILITY_BITS, TOTAL

_PLACE_TILE = 1024


@triton.jit
def rans_encode_kernel(
    symbols_ptr,
    frequency_ptr,
    cumulative_ptr,
    words_ptr,
    states_ptr,
    num_words_ptr,
    num_lanes,
    lanes_per_table,
    TOKENS: tl.constexpr,
    ROOM: tl.constexpr,
    NUM_SYMBOLS: tl.constexpr,
    PROBABILITY_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Encode a tile of lanes of one segment; a lane that overflows has -1 words."""
    segment = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = lane < num_lanes
    table = lane // lanes_per_table * NUM_SYMBOLS
    symbols_row_ptr = symbols_ptr + segment * TOKENS * num_lanes + lane
    words_row_ptr = words_ptr + segment * ROOM * num_lanes + lane
    state = tl.full([BLOCK], 1 << 16, tl.uint32)
    count = tl.zeros([BLOCK], tl.int32)
    for step in range(TOKENS):
        symbol = tl.load(symbols_row_ptr + (TOKENS - 1 - step) * num_lanes, mask=inside, other=0).to(tl.int32)
        # Lanes beyond the end take frequency 1, which divides.
        frequency = tl.load(frequency_ptr + table + symbol, mask=inside, other=1).to(tl.uint32)
        start = tl.load(cumulative_ptr + table + symbol, mask=inside, other=0).to(tl.uint32)
        full = state >= (frequency << (32 - PROBABILITY_BITS))
        tl.store(words_row_ptr + count * num_lanes, state.to(tl.int16), mask=inside & full & (count < ROOM))
        count += full.to(tl.int32)
        state = tl.where(full, state >> 16, state)
        state = ((state // frequency) << PROBABILITY_BITS) + state % frequency + start
    tl.store(states_ptr + segment * num_lanes + lane, state.to(tl.int32, bitcast=True), mask=inside)
    tl.store(num_words_ptr + segment * num_lanes + lane, tl.where(count > ROOM, -1, count), mask=inside)


@triton.jit
def rans_place_overflow_kernel(num_words_ptr, total_lanes, num_overflows_ptr, BLOCK: tl.constexpr):
    """Turn the -1 of the i-th lane that overflows into -1 - i, and count such lanes; one program.

    Lanes beyond the side buffer's capacity are counted and keep a place that does not exist: the caller compares
    the count with the capacity and keeps such a batch uncoded.
    """
    found = 0
    for first in range(0, total_lanes, BLOCK):
        lane = first + tl.arange(0, BLOCK)
        inside = lane < total_lanes
        count = tl.load(num_words_ptr + lane, mask=inside, other=0)
        overflows = (count < 0).to(tl.int32)
        place = found + tl.cumsum(overflows, 0) - overflows
        tl.store(num_words_ptr + lane, -1 - place, mask=inside & (count < 0))
        found += tl.sum(overflows, 0)
    tl.store(num_overflows_ptr, found)


@triton.jit
def rans_store_overflow_kernel(
    symbols_ptr,
    num_words_ptr,
    overflow_ptr,
    num_lanes,
    capacity,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy the symbols of a tile's lanes that overflow to their rows of the side buffer."""
    segment = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = -1 - tl.load(num_words_ptr + segment * num_lanes + lane, mask=lane < num_lanes, other=0)
    wanted = (place >= 0) & (place < capacity)
    if tl.max(wanted.to(tl.int32), 0) > 0:
        for token in range(TOKENS):
            symbol = tl.load(symbols_ptr + (segment * TOKENS + token) * num_lanes + lane, mask=wanted, other=0)
            tl.store(overflow_ptr + place.to(tl.int64) * TOKENS + token, symbol, mask=wanted)


@triton.jit
def rans_decode_kernel(
    decoder_ptr,
    words_ptr,
    states_ptr,
    num_words_ptr,
    overflow_ptr,
    symbols_ptr,
    num_lanes,
    lanes_per_table,
    capacity,
    TOKENS: tl.constexpr,
    ROOM: tl.constexpr,
    PROBABILITY_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Decode a tile of lanes of one segment."""
    segment = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = lane < num_lanes
    table_ptr = decoder_ptr + lane // lanes_per_table * (1 << PROBABILITY_BITS)
    words_row_ptr = words_ptr + segment * ROOM * num_lanes + lane
    symbols_row_ptr = symbols_ptr + segment * TOKENS * num_lanes + lane
    state = tl.load(states_ptr + segment * num_lanes + lane, mask=inside, other=0).to(tl.uint32, bitcast=True)
    count = tl.load(num_words_ptr + segment * num_lanes + lane, mask=inside, other=0)
    place = -1 - count
    is_raw = (place >= 0) & (place < capacity)
    for token in range(TOKENS):
        slot = state & ((1 << PROBABILITY_BITS) - 1)
        entry = tl.load(table_ptr + slot, mask=inside, other=0).to(tl.uint32, bitcast=True)
        symbol = (entry & 255).to(tl.uint8)
        frequency = (entry >> 8) & 4095
        state = frequency * (state >> PROBABILITY_BITS) + (entry >> 20)
        empty = (state < (1 << 16)) & (count > 0)
        word = tl.load(words_row_ptr + (count - 1) * num_lanes, mask=inside & empty, other=0)
        state = tl.where(empty, (state << 16) | (word.to(tl.uint32) & 0xFFFF), state)
        count -= empty.to(tl.int32)
        raw = tl.load(overflow_ptr + place.to(tl.int64) * TOKENS + token, mask=inside & is_raw, other=0)
        tl.store(symbols_row_ptr + token * num_lanes, tl.where(is_raw, raw, symbol), mask=inside)


def _check(symbols: torch.Tensor, words: torch.Tensor, num_tables: int) -> None:
    num_segments, _, num_lanes = symbols.shape
    if symbols.dtype != torch.uint8 or not symbols.is_contiguous():
        raise ValueError("symbols must be contiguous uint8, (num_segments, tokens, num_lanes)")
    if words.dtype != torch.int16 or words.shape[::2] != (num_segments, num_lanes) or not words.is_contiguous():
        raise ValueError("words must be contiguous int16, (num_segments, room, num_lanes)")
    if num_lanes % num_tables:
        raise ValueError("the number of lanes must be a multiple of that of tables")


def plan_rans_encode(
    inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig
) -> tuple[Launch, Launch, Launch]:
    """Lay out the encoder of `symbols`, with one table per run of equally many lanes.

    Buffers: ``words`` int16 (num_segments, room, num_lanes), ``states`` and ``num_words`` int32 (num_segments,
    num_lanes), ``overflow`` uint8 (capacity, tokens), ``num_overflows`` int32 (1,). A lane in row i of the side buffer
    has -1 - i words. `block_n` is the tile of lanes, a power of two.

    Raises
    ------
    ValueError
        If shapes, dtypes or strides do not fit.
    """
    symbols, frequency = inputs["symbols"], inputs["frequency"]
    words, num_words, overflow = buffers["words"], buffers["num_words"], buffers["overflow"]
    _check(symbols, words, len(frequency))
    num_segments, tokens, num_lanes = symbols.shape
    tile = {"BLOCK": config.block_n, "num_warps": config.num_warps, "num_stages": config.num_stages}
    grid = (num_segments, triton.cdiv(num_lanes, config.block_n))
    encode = Launch(
        kernel=rans_encode_kernel,
        grid=grid,
        arguments=(
            *(symbols, frequency, inputs["cumulative"], words, buffers["states"], num_words),
            *(num_lanes, num_lanes // len(frequency)),
        ),
        options=tile
        | {
            "TOKENS": tokens,
            "ROOM": words.shape[1],
            "NUM_SYMBOLS": NUM_SYMBOLS,
            "PROBABILITY_BITS": PROBABILITY_BITS,
        },
    )
    place = Launch(
        kernel=rans_place_overflow_kernel,
        grid=(1,),
        arguments=(num_words, num_words.numel(), buffers["num_overflows"]),
        options={"BLOCK": _PLACE_TILE, "num_warps": 4},
    )
    store = Launch(
        kernel=rans_store_overflow_kernel,
        grid=grid,
        arguments=(symbols, num_words, overflow, num_lanes, len(overflow)),
        options=tile | {"TOKENS": tokens},
    )
    return encode, place, store


def plan_rans_decode(
    inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig
) -> tuple[Launch]:
    """Lay out the decoder: what `plan_rans_encode` wrote, back to `symbols`.

    Raises
    ------
    ValueError
        If shapes, dtypes or strides do not fit.
    """
    symbols, words, decoder = buffers["symbols"], inputs["words"], inputs["decoder"]
    if decoder.dtype != torch.int32 or decoder.shape[1] != TOTAL:
        raise ValueError(f"decoder must be int32, (num_tables, {TOTAL})")
    _check(symbols, words, len(decoder))
    num_segments, tokens, num_lanes = symbols.shape
    return (
        Launch(
            kernel=rans_decode_kernel,
            grid=(num_segments, triton.cdiv(num_lanes, config.block_n)),
            arguments=(
                *(decoder, words, inputs["states"], inputs["num_words"], inputs["overflow"], symbols),
                *(num_lanes, num_lanes // len(decoder), len(inputs["overflow"])),
            ),
            options={
                "TOKENS": tokens,
                "ROOM": words.shape[1],
                "PROBABILITY_BITS": PROBABILITY_BITS,
                "BLOCK": config.block_n,
                "num_warps": config.num_warps,
                "num_stages": config.num_stages,
            },
        ),
    )
