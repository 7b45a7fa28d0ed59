"""ggml's blocks against llama.cpp's own implementation, and against the definition written out element by element."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsim.numerics.ggml import BITS, BLOCK, METADATA_BITS, GgmlType, quantise_blocks

SAMPLE = np.array([((7 * i * i) % 41 - 20) / 8 for i in range(BLOCK)], dtype=np.float32)
# SAMPLE as llama.cpp's Python package gguf 0.19.0 quantises it (gguf.quants.quantize), byte for byte.
STORED = {
    "q8_0": "0a2581ad330d40c7a7e07259942c195ffaed39dad426cdcd26d4da39edfa5f192c94",
    "q5_1": "e73000c11c7b497a80b6b752a8a955bcbf8ce206d44d602e",
    "q5_0": "00311c3b497270b6a652a8a955acbe7be2f6c33c6f2e",
    "q4_1": "113500c1b0635ba95c54a2566fbd718be99eb817",
    "q4_0": "0035c0635ba95c54a2566fce718beaaeb817",
}
FORMS: tuple[GgmlType, ...] = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")


def _as_llama_cpp_lays_it(block: np.ndarray, form: GgmlType) -> bytes:
    """Step, minimum, high bits, then codes: element i in the low and i + 16 in the high nibble of byte i."""
    made = quantise_blocks(block.reshape(1, BLOCK), form)
    codes = made.codes[0]
    head = struct.pack("<e", made.step[0, 0]) + (struct.pack("<e", made.minimum[0, 0]) if form.endswith("_1") else b"")
    if form == "q8_0":
        return head + (codes - 127).astype(np.int8).tobytes()
    high = np.packbits((codes >> 4).astype(np.uint8), bitorder="little").tobytes() if BITS[form] == 5 else b""
    low = codes & 15
    return head + high + (low[:16] | low[16:] << 4).astype(np.uint8).tobytes()


@pytest.mark.parametrize("form", FORMS)
def test_a_block_has_the_bytes_that_llama_cpp_writes(form: GgmlType) -> None:
    assert _as_llama_cpp_lays_it(SAMPLE, form).hex() == STORED[form]
    assert len(STORED[form]) // 2 == (BLOCK * BITS[form] + METADATA_BITS[form]) / 8


def _by_definition(block: np.ndarray, form: GgmlType) -> list[int]:
    """Codes of one block, in scalar fp32 arithmetic."""
    one: Any = np.float32
    largest = 2 ** BITS[form] - 1
    if form == "q8_0":
        step = one(max(abs(x) for x in block)) / one(127)
        inverse = one(1) / step if step else one(0)
        return [int(np.copysign(np.floor(np.abs(np.float64(x * inverse)) + 0.5), x)) + 127 for x in block]
    if form.endswith("_1"):
        low = min(block)
        step = (max(block) - low) / one(largest)
        inverse = one(1) / step if step else one(0)
        return [min(largest, int((x - low) * inverse + one(0.5))) for x in block]
    extreme = max(block, key=abs)
    half = 2 ** (BITS[form] - 1)
    step = extreme / one(-half)
    inverse = one(1) / step if step else one(0)
    return [min(largest, int(x * inverse + one(half + 0.5))) for x in block]


NUMBERS = st.one_of(
    st.integers(-64, 64).map(lambda eighth: eighth / 8),
    st.floats(-1000, 1000, width=32, allow_subnormal=False),
)


@pytest.mark.parametrize("form", FORMS)
@given(st.lists(NUMBERS, min_size=BLOCK, max_size=BLOCK))
@settings(max_examples=60, deadline=None)
def test_codes_are_the_definition_of_the_format(form: GgmlType, numbers: list[float]) -> None:
    block = np.array(numbers, dtype=np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        codes = quantise_blocks(block.reshape(1, BLOCK), form).codes[0]
        if np.abs(block).max() < 1e-30:
            return
        assert codes.tolist() == _by_definition(block, form)


@pytest.mark.parametrize("form", FORMS)
def test_an_element_is_off_by_half_a_step_at_most_but_for_the_far_end_of_symmetric_formats(form: GgmlType) -> None:
    blocks = np.random.default_rng(3).standard_normal((500, BLOCK)).astype(np.float32)
    made = quantise_blocks(blocks, form)
    off = np.abs(made.read_back() - blocks) / np.abs(made.step)
    # The fp16 step shifts the outermost codes by up to code * 2^-11 of a step.
    slack = 2 ** BITS[form] * 2.0**-11
    cut = made.codes == 2 ** BITS[form] - 1 if form in {"q4_0", "q5_0"} else np.zeros(blocks.shape, dtype=bool)
    assert (off[~cut] <= 0.5 + slack).all()
    assert (off[cut] <= 1.0 + slack).all()
