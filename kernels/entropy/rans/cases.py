"""Shapes of range ANS: segments of tokens, one lane per channel."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...contract import Comparison, CountedLoop, Traffic, Variant
from ...launches import Launch, LaunchConfig
from .kernel import plan_rans_decode, plan_rans_encode
from .reference import rans_decode_reference, rans_encode_reference
from .tables import NUM_SYMBOLS, PROBABILITY_BITS, cumulate, pack_decoder, quantize_counts

OVERFLOW_SHARE = 1 / 64
"""Room of the side buffer, in lanes per lane."""
DEVIATIONS = 4.0
"""How far above its mean a lane's room lies, in standard deviations of its length."""


@dataclass(frozen=True)
class SegmentsCase:
    """Codes of a quantiser: `num_segments` runs of `tokens`, each with `num_lanes` channels.

    Attributes
    ----------
    alphabet : int
        Codes in use, 16 for a 4-bit quantiser.
    skew : float
        How peaked the codes are: the standard deviation of the quantised normal variable, in steps.
    """

    name: str
    num_segments: int
    tokens: int
    num_lanes: int
    num_tables: int
    alphabet: int
    skew: float
    room: int | None = None


def draw_symbols(case: SegmentsCase, seed: int, device: str) -> torch.Tensor:
    """Draw rounded normal codes around the middle of the alphabet, wider in later tables."""
    generator = torch.Generator(device=device).manual_seed(seed)
    shape = (case.num_segments, case.tokens, case.num_lanes)
    width = case.skew * (1 + torch.arange(case.num_lanes, device=device) // (case.num_lanes // case.num_tables))
    normal = torch.randn(shape, generator=generator, device=device) * width
    return (normal + case.alphabet / 2).floor().clamp(0, case.alphabet - 1).to(torch.uint8)


def make_tables(case: SegmentsCase, symbols: torch.Tensor) -> dict[str, torch.Tensor]:
    """Count the symbols of each table's lanes; give frequencies, their sums, and the decoder's table."""
    lanes = symbols.view(-1, case.num_tables, case.num_lanes // case.num_tables).transpose(0, 1)
    counts = torch.stack([torch.bincount(lane.flatten().int(), minlength=NUM_SYMBOLS) for lane in lanes])
    frequency = quantize_counts(counts)
    return {"frequency": frequency, "cumulative": cumulate(frequency), "decoder": pack_decoder(frequency)}


def choose_room(case: SegmentsCase, symbols: torch.Tensor, frequency: torch.Tensor) -> int:
    """Words that a lane gets: mean plus a few standard deviations of what its symbols cost, at most 16 bits each."""
    if case.room is not None:
        return case.room
    table = torch.arange(case.num_lanes, device=symbols.device) // (case.num_lanes // case.num_tables)
    bits = -(frequency.double() / (1 << PROBABILITY_BITS)).log2()[table[None, None], symbols[: 1 << 10].long()]
    lane_bits = bits.sum(1)
    wanted = lane_bits.mean() + DEVIATIONS * lane_bits.std(unbiased=False)
    return min(case.tokens, math.ceil(wanted.item() / 16) + 1)


class _Rans(Variant):
    cost_unit = "symbol"
    correctness_cases = (
        SegmentsCase("one-lane", 1, 5, 1, 1, 16, 2.0),
        SegmentsCase("odd-lanes-two-tables", 2, 33, 70, 2, 16, 1.5),
        SegmentsCase("one-symbol", 1, 16, 4, 1, 1, 1.0),
        SegmentsCase("bytes", 1, 24, 32, 4, 256, 30.0),
        SegmentsCase("lanes-that-overflow", 2, 32, 64, 2, 16, 1.5, room=6),
    )
    timing_cases = tuple(
        SegmentsCase(f"{segments}x256x1024", segments, 256, 1024, 8, 16, 2.0) for segments in (4, 32, 256)
    )
    compile_case = SegmentsCase("4-bit", 1, 16, 256, 8, 16, 2.0)

    def configs(self, target: str, case: SegmentsCase) -> tuple[LaunchConfig, ...]:
        return (LaunchConfig(block_n=128, num_warps=4, num_stages=1), LaunchConfig(256, num_warps=4, num_stages=1))

    def comparison(self, result: str) -> Comparison:
        return "exact"

    def compute_dtype(self, case: SegmentsCase) -> str:
        return "float32"

    def traffic(self, case: SegmentsCase) -> Traffic:
        """Count the codes on one side and their Gaussian entropy on the other."""
        symbols = case.num_segments * case.tokens * case.num_lanes
        widths = [case.skew * (1 + table) for table in range(case.num_tables)]
        bits = [max(0.0, min(8.0, 0.5 * math.log2(2 * math.pi * math.e * width**2))) for width in widths]
        coded = math.ceil(symbols * min(math.log2(max(2, case.alphabet)), sum(bits) / len(bits)) / 8)
        return self._direction(symbols, coded)

    def _direction(self, plain_bytes: int, coded_bytes: int) -> Traffic:
        raise NotImplementedError


class RansEncode(_Rans):
    """Encode codes; every result is compared exactly."""

    operation = "entropy/rans_encode"

    def make_inputs(self, case: SegmentsCase, *, seed: int, device: str) -> dict[str, Any]:
        symbols = draw_symbols(case, seed, device)
        tables = make_tables(case, symbols)
        return {"symbols": symbols, **tables, "room": choose_room(case, symbols, tables["frequency"])}

    def reference(self, case: SegmentsCase, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        tables = (inputs["frequency"], inputs["cumulative"])
        return rans_encode_reference(inputs["symbols"], *tables, inputs["room"], _capacity(case))

    def allocate(self, case: SegmentsCase, inputs: Mapping[str, Any], config: LaunchConfig) -> dict[str, torch.Tensor]:
        symbols = inputs["symbols"]
        lanes = (case.num_segments, case.num_lanes)
        return {
            # Unused words and rows are zero, so that equal input gives equal bytes.
            "words": symbols.new_zeros((case.num_segments, inputs["room"], case.num_lanes), dtype=torch.int16),
            "states": symbols.new_empty(lanes, dtype=torch.int32),
            "num_words": symbols.new_empty(lanes, dtype=torch.int32),
            "overflow": symbols.new_zeros(_capacity(case), case.tokens),
            "num_overflows": symbols.new_empty(1, dtype=torch.int32),
        }

    def plan(
        self, case: SegmentsCase, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig
    ) -> tuple[Launch, ...]:
        return plan_rans_encode(inputs, buffers, config)

    def counted_loop(self, case: SegmentsCase, config: LaunchConfig) -> CountedLoop:
        return CountedLoop("rans_encode_kernel", "largest_loop", units=config.block_n)

    def _direction(self, plain_bytes: int, coded_bytes: int) -> Traffic:
        return Traffic(plain_bytes, coded_bytes, 0, plain_bytes)


class RansDecode(_Rans):
    """Decode what the reference encoded."""

    operation = "entropy/rans_decode"

    def make_inputs(self, case: SegmentsCase, *, seed: int, device: str) -> dict[str, Any]:
        symbols = draw_symbols(case, seed, device)
        tables = make_tables(case, symbols)
        room = choose_room(case, symbols, tables["frequency"])
        coded = rans_encode_reference(symbols, tables["frequency"], tables["cumulative"], room, _capacity(case))
        return {**coded, **tables}

    def reference(self, case: SegmentsCase, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        coded = (inputs[name] for name in ("words", "states", "num_words", "overflow", "frequency"))
        return {"symbols": rans_decode_reference(*coded)}

    def allocate(self, case: SegmentsCase, inputs: Mapping[str, Any], config: LaunchConfig) -> dict[str, torch.Tensor]:
        shape = (case.num_segments, case.tokens, case.num_lanes)
        return {"symbols": inputs["overflow"].new_empty(shape)}

    def plan(
        self, case: SegmentsCase, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig
    ) -> tuple[Launch, ...]:
        return plan_rans_decode(inputs, buffers, config)

    def counted_loop(self, case: SegmentsCase, config: LaunchConfig) -> CountedLoop:
        return CountedLoop("rans_decode_kernel", "largest_loop", units=config.block_n)

    def _direction(self, plain_bytes: int, coded_bytes: int) -> Traffic:
        return Traffic(coded_bytes, plain_bytes, 0, plain_bytes)


def _capacity(case: SegmentsCase) -> int:
    if case.room is not None:
        return case.num_segments * case.num_lanes
    return math.ceil(case.num_segments * case.num_lanes * OVERFLOW_SHARE)


VARIANTS = (RansEncode(), RansDecode())
