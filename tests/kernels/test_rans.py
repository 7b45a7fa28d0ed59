"""Range ANS: tables, sizes against the entropy and against constriction, and round trips."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="kernels need torch (the kernels extra)")
pytest.importorskip("triton", reason="kernels need triton (the kernels extra)")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from kernels.entropy.rans.cases import VARIANTS, SegmentsCase, draw_symbols, make_tables  # noqa: E402
from kernels.entropy.rans.reference import rans_decode_reference, rans_encode_reference  # noqa: E402
from kernels.entropy.rans.tables import (  # noqa: E402
    NUM_SYMBOLS,
    TOTAL,
    cross_entropy_bits,
    cumulate,
    pack_decoder,
    quantize_counts,
)
from kernels.harness.check import run  # noqa: E402
from kernels.launches import LaunchConfig  # noqa: E402

# Triton 3.6's interpreter turns one-element arrays into loop bounds.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
COUNTS = st.lists(st.integers(0, 10**6), min_size=NUM_SYMBOLS, max_size=NUM_SYMBOLS).filter(any)
FEW_COUNTS = st.dictionaries(st.integers(0, NUM_SYMBOLS - 1), st.integers(1, 10**9), min_size=1, max_size=6)


def _row(few):
    row = torch.zeros(1, NUM_SYMBOLS, dtype=torch.int64)
    for symbol, count in few.items():
        row[0, symbol] = count
    return row


@given(FEW_COUNTS | COUNTS.map(lambda counts: dict(enumerate(counts))))
@settings(max_examples=60, deadline=None)
def test_frequencies_sum_to_the_range_and_spare_no_symbol(few):
    counts = _row({symbol: count for symbol, count in few.items() if count})
    frequency = quantize_counts(counts)
    assert frequency.sum() == TOTAL
    assert (frequency[counts > 0] > 0).all()
    assert (frequency >= 0).all()
    assert frequency.max() < TOTAL


@given(FEW_COUNTS)
@settings(max_examples=30, deadline=None)
def test_the_decoders_table_inverts_the_frequencies(few):
    frequency = quantize_counts(_row(few))
    packed = pack_decoder(frequency)[0].long() & 0xFFFFFFFF
    symbol, width, offset = packed & 255, (packed >> 8) & 4095, packed >> 20
    assert torch.equal(width, frequency[0, symbol].long())
    assert torch.equal(cumulate(frequency)[0, symbol] + offset, torch.arange(TOTAL))
    assert (offset < width).all()


@pytest.mark.parametrize("counts", [torch.zeros(1, NUM_SYMBOLS), -torch.ones(1, NUM_SYMBOLS)])
def test_tables_without_counts_are_refused(counts):
    with pytest.raises(ValueError, match="at least one count"):
        quantize_counts(counts)


@given(
    segments=st.integers(1, 3),
    tokens=st.integers(1, 40),
    tables=st.integers(1, 4),
    lanes=st.integers(1, 8),
    skew=st.floats(0.1, 40.0),
    seed=st.integers(0, 999),
)
@settings(max_examples=40, deadline=None)
def test_what_is_encoded_is_decoded(segments, tokens, tables, lanes, skew, seed):
    case = SegmentsCase("", segments, tokens, tables * lanes, tables, 256, skew)
    symbols = draw_symbols(case, seed, "cpu")
    made = make_tables(case, symbols)
    for room in (tokens, max(1, tokens // 3)):
        capacity = segments * lanes * tables
        coded = rans_encode_reference(symbols, made["frequency"], made["cumulative"], room, capacity)
        decoded = rans_decode_reference(
            coded["words"], coded["states"], coded["num_words"], coded["overflow"], made["frequency"]
        )
        assert torch.equal(decoded, symbols)


def _coded_bits(case, symbols, made):
    coded = rans_encode_reference(symbols, made["frequency"], made["cumulative"], case.tokens, 0)
    assert int(coded["num_overflows"]) == 0
    return 16 * int(coded["num_words"].sum()), 32 * coded["states"].numel()


def test_size_is_that_of_the_entropy_and_of_constriction():
    constriction = pytest.importorskip("constriction", reason="the CPU reference coder (pip install constriction)")
    case = SegmentsCase("", 1, 4096, 8, 1, 16, 1.5)
    symbols = draw_symbols(case, 5, "cpu")
    made = make_tables(case, symbols)
    counts = torch.bincount(symbols.flatten().int(), minlength=NUM_SYMBOLS)[None]
    ideal_bits = cross_entropy_bits(counts, made["frequency"])
    word_bits, state_bits = _coded_bits(case, symbols, made)
    # A lane's state holds 16 to 32 bits of its message; words hold the rest.
    assert ideal_bits - state_bits <= word_bits <= ideal_bits * 1.001 + state_bits

    probabilities = made["frequency"][0].double().numpy() / TOTAL
    used = int(np.flatnonzero(probabilities).max()) + 1
    model = constriction.stream.model.Categorical(probabilities[:used], perfect=False)
    coder = constriction.stream.stack.AnsCoder()
    message = symbols.flatten().numpy().astype(np.int32)
    coder.encode_reverse(message, model)
    assert coder.num_valid_bits() == pytest.approx(ideal_bits, rel=0.002)
    assert word_bits + state_bits == pytest.approx(coder.num_valid_bits(), rel=0.003)
    assert np.array_equal(coder.decode(model, len(message)), message)


def test_a_batch_that_overflows_the_side_buffer_is_counted(kernel_device):
    case = SegmentsCase("", 1, 16, 32, 1, 256, 60.0, room=2)
    variant = VARIANTS[0]
    inputs = variant.make_inputs(case, seed=3, device=kernel_device)
    config = LaunchConfig(block_n=32, num_warps=4, num_stages=1)
    buffers = variant.allocate(case, inputs, config)
    small = buffers | {"overflow": buffers["overflow"][:4].clone()}
    for launch in variant.plan(case, inputs, small, config):
        launch.run()
    assert int(small["num_overflows"]) == 32
    assert torch.equal(small["overflow"], inputs["symbols"][0].T[:4])


def test_decoder_and_encoder_agree_in_triton(kernel_device):
    encode, decode = VARIANTS
    case = SegmentsCase("", 2, 40, 48, 2, 16, 1.5, room=7)
    config = LaunchConfig(block_n=16, num_warps=4, num_stages=1)
    inputs = encode.make_inputs(case, seed=8, device=kernel_device)
    coded = run(encode, case, inputs, config)
    assert 0 < int(coded["num_overflows"]) < 96
    decoded = run(decode, case, {**inputs, **coded}, config)
    assert torch.equal(decoded["symbols"], inputs["symbols"])
