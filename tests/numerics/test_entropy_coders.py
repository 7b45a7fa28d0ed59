"""Entropy coders: exact round trips, and sizes between the entropy of the model used and a stated overhead above it."""

from __future__ import annotations

import heapq
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kvsim.numerics import huffman
from kvsim.numerics.byte_coders import compressed_bits, pack, packed_width, unpack
from kvsim.numerics.entropy import (
    context_rows,
    count_rows,
    cross_entropy_bits,
    empirical_entropy,
    ideal_bits,
    quantised_frequencies,
)
from kvsim.numerics.stream_coders import (
    TABLE_BITS,
    WORD_BITS,
    AdaptiveModel,
    adaptive_bits,
    range_bits,
    range_bits_under,
    rans_bits,
    table_bits,
)

LEVELS = 16
CODES = arrays(
    np.int32,
    st.tuples(st.integers(1, 3), st.integers(1, 24), st.integers(1, 6)),
    elements=st.integers(0, LEVELS - 1),
)
COUNTS = st.lists(st.integers(0, 1000), min_size=2, max_size=24).filter(lambda counts: sum(map(bool, counts)) > 1)


def _normal_codes(seed: int, levels: int = LEVELS, tokens: int = 256) -> np.ndarray:
    rng = np.random.default_rng(seed)
    widths = rng.uniform(0.05, 0.25, size=(2, 1, 8)) * levels
    codes = np.round(rng.standard_normal((2, tokens, 8)) * widths + levels / 2)
    return np.clip(codes, 0, levels - 1).astype(np.int32)


@given(codes=CODES)
def test_conditioning_never_adds_entropy(codes: np.ndarray) -> None:
    tensor, head, channel = (empirical_entropy(codes, LEVELS, context) for context in ("tensor", "head", "channel"))
    assert -1e-12 <= channel <= head + 1e-9
    assert head <= tensor + 1e-9
    assert tensor <= np.log2(LEVELS) + 1e-9


def test_entropy_of_equally_frequent_codes_is_their_width() -> None:
    codes = np.arange(LEVELS, dtype=np.int32).reshape(1, -1, 1)
    assert empirical_entropy(codes, LEVELS) == pytest.approx(4.0)
    assert empirical_entropy(codes[:, :0], LEVELS) == 0.0


@given(counts=COUNTS)
def test_frequencies_sum_up_and_cost_little(counts: list[int]) -> None:
    array = np.array(counts)
    frequencies = quantised_frequencies(array, 1 << TABLE_BITS)
    assert frequencies.sum() == 1 << TABLE_BITS
    assert np.array_equal(frequencies > 0, array > 0)
    ideal = ideal_bits(array[None])
    cost = cross_entropy_bits(array, frequencies)
    # KL <= sum (p - q)^2 / q: each q is off by about half a unit of 2^-12, rare ones by up to one.
    assert ideal - 1e-6 <= cost <= ideal + array.sum() * len(counts) * 2.0**-TABLE_BITS * 2


def test_too_many_symbols_for_a_table_are_refused() -> None:
    with pytest.raises(ValueError, match="5 symbols do not fit"):
        quantised_frequencies(np.ones(5, dtype=np.int64), 4)


@given(counts=COUNTS)
def test_huffman_without_a_bound_is_huffman(counts: list[int]) -> None:
    array = np.array(counts)
    heap = [count for count in counts if count]
    heapq.heapify(heap)
    cost = 0
    while len(heap) > 1:
        merged = heapq.heappop(heap) + heapq.heappop(heap)
        cost += merged
        heapq.heappush(heap, merged)
    assert int(array @ huffman.code_lengths(array, 23)) == cost


@given(counts=st.lists(st.integers(1, 200), min_size=3, max_size=6))
def test_bounded_lengths_are_the_best_that_kraft_allows(counts: list[int]) -> None:
    longest, array = 3, np.array(counts)
    best = min(
        sum(c * n for c, n in zip(counts, lengths, strict=True))
        for lengths in itertools.product(range(1, longest + 1), repeat=len(counts))
        if sum(2.0**-n for n in lengths) <= 1
    )
    lengths = huffman.code_lengths(array, longest)
    assert lengths.max() <= longest
    assert int(array @ lengths) == best


@given(counts=COUNTS)
def test_canonical_codes_are_a_complete_prefix_code(counts: list[int]) -> None:
    lengths = huffman.code_lengths(np.array(counts))
    codes = huffman.canonical_codes(lengths)
    words = {f"{codes[one]:0{lengths[one]}b}" for one in np.flatnonzero(lengths)}
    assert sum(2.0 ** -len(word) for word in words) == 1.0
    assert not any(one != other and other.startswith(one) for one in words for other in words)


def test_skewed_counts_stay_within_fifteen_bits() -> None:
    fibonacci = np.array([1, 1] + [0] * 28)
    for index in range(2, 30):
        fibonacci[index] = fibonacci[index - 1] + fibonacci[index - 2]
    assert huffman.code_lengths(fibonacci, 29).max() == 29
    assert huffman.code_lengths(fibonacci).max() == huffman.LONGEST
    with pytest.raises(ValueError, match="no prefix code"):
        huffman.code_lengths(np.ones(9, dtype=np.int64), 3)


@given(codes=CODES, block=st.integers(1, 40))
def test_huffman_round_trip(codes: np.ndarray, block: int) -> None:
    row = codes.ravel()
    counts = count_rows(row[None], LEVELS)[0]
    stream = huffman.encode(row, huffman.code_lengths(counts), block)
    assert np.array_equal(huffman.decode(stream), row)
    entropy = ideal_bits(counts[None])
    assert entropy - 1e-6 <= stream.num_bits <= entropy + len(row)
    assert len(stream.starts) == -(-len(row) // block)


@pytest.mark.parametrize("levels", [2, 16, 256])
def test_rans_lies_just_above_its_tables(levels: int) -> None:
    rows = context_rows(_normal_codes(levels, levels), "head")
    segment, streams = 512, 2 * 4
    counts = count_rows(rows, levels)
    under = sum(cross_entropy_bits(one, quantised_frequencies(one, 1 << TABLE_BITS)) for one in counts)
    beside = sum(map(table_bits, counts)) + streams * WORD_BITS
    bits = rans_bits(rows, levels, segment)
    assert ideal_bits(counts) <= under
    assert under + beside - 1 <= bits <= 1.001 * under + beside + streams * 2 * WORD_BITS


def test_range_coding_lies_just_above_its_tables() -> None:
    rows = context_rows(_normal_codes(5), "channel")
    counts = count_rows(rows, LEVELS)
    ideal, tables = ideal_bits(counts), sum(map(table_bits, counts))
    assert ideal + tables <= range_bits(rows, LEVELS) <= 1.01 * ideal + tables + 3 * WORD_BITS


def test_a_law_known_beforehand_costs_its_cross_entropy() -> None:
    rows = context_rows(_normal_codes(6), "channel")
    other = count_rows(context_rows(_normal_codes(7), "channel"), LEVELS) + 1
    under = sum(cross_entropy_bits(one, law) for one, law in zip(count_rows(rows, LEVELS), other, strict=True))
    assert (
        under - 1 <= range_bits_under(rows, other / other.sum(axis=1, keepdims=True)) <= 1.001 * under + 3 * WORD_BITS
    )


def test_adaptive_coding_lies_just_above_its_predictions() -> None:
    codes = _normal_codes(8)[0]
    bits, ideal = adaptive_bits(codes, LEVELS)
    assert ideal - 1 <= bits <= 1.001 * ideal + 3 * WORD_BITS
    # Codes that are drawn independently leave nothing to predict beyond each channel's law.
    assert bits > ideal_bits(count_rows(context_rows(codes[None], "channel"), LEVELS))


def test_adaptive_predictions_are_laws_and_find_the_truth() -> None:
    model, codes = AdaptiveModel(8, LEVELS), _normal_codes(9, tokens=4096)[0]
    assert np.allclose(model.predict(), 1 / LEVELS)
    for token in codes:
        model.learn(token)
    predicted = model.predict()
    assert np.allclose(predicted.sum(axis=1), 1.0)
    assert (predicted > 0).all()
    true = count_rows(context_rows(codes[None], "channel"), LEVELS) / len(codes)
    assert np.abs(predicted - true).max() < 0.003


@given(codes=CODES)
@settings(max_examples=25)
def test_streams_round_trip_whatever_the_codes(codes: np.ndarray) -> None:
    # The coders decode what they coded and raise where it differs.
    rows = context_rows(codes, "head")
    assert rans_bits(rows, LEVELS, 7) > 0
    assert range_bits(rows, LEVELS) > 0
    assert adaptive_bits(codes[0], LEVELS)[0] >= 0


@given(codes=CODES, levels=st.sampled_from((16, 200, 256)))
def test_packing_round_trip(codes: np.ndarray, levels: int) -> None:
    row = codes.ravel()
    packed = pack(row, levels)
    assert len(packed) == -(-len(row) * packed_width(levels) // 8)
    assert np.array_equal(unpack(packed, levels, len(row)), row)


@pytest.mark.parametrize(("levels", "width"), [(2, 1), (3, 2), (4, 2), (8, 4), (16, 4), (31, 8), (256, 8)])
def test_packed_width(levels: int, width: int) -> None:
    assert packed_width(levels) == width


def test_wide_codes_do_not_fit_a_byte() -> None:
    with pytest.raises(ValueError, match="512 levels"):
        packed_width(512)


@pytest.mark.parametrize("coder", ["deflate", "zstd"])
def test_byte_coders_find_repeats_and_leave_noise(coder: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, 4096, dtype=np.uint8).tobytes()
    size = 8 * len(noise)
    assert size < compressed_bits(noise, coder) < 1.01 * size  # type: ignore[arg-type]
    assert compressed_bits(noise * 4, coder) < 1.1 * size  # type: ignore[arg-type]
