"""Transform coding: the bit split is optimal, the fit finds the components, the error follows the bits."""

import functools

import pytest

torch = pytest.importorskip("torch", reason="kernels need torch (the kernels extra)")
pytest.importorskip("triton", reason="kernels need triton (the kernels extra)")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from kernels.transform.kvtc.basis import fit_transform  # noqa: E402
from kernels.transform.kvtc.bit_allocation import allocate_bits  # noqa: E402
from kernels.transform.kvtc.cases import RowsCase, draw_inputs  # noqa: E402
from kernels.transform.kvtc.reference import kvtc_decode_reference, kvtc_encode_reference  # noqa: E402

VARIANCES = st.lists(st.floats(0, 100) | st.just(0.0), min_size=1, max_size=7)


def least_error_by_dynamic_programming(variances, total_bits, max_bits):
    @functools.cache
    def least(index, left):
        if index == len(variances):
            return 0.0
        return min(
            variances[index] * 4.0**-bits + least(index + 1, left - bits) for bits in range(min(max_bits, left) + 1)
        )

    return least(0, total_bits)


@given(VARIANCES, st.integers(0, 20), st.integers(1, 8))
@settings(max_examples=80, deadline=None)
def test_bits_are_split_as_dynamic_programming_would(variances, total_bits, max_bits):
    bits = allocate_bits(variances, total_bits, max_bits)
    assert sum(bits) <= total_bits
    assert all(0 <= count <= max_bits for count in bits)
    error = sum(variance * 4.0**-count for variance, count in zip(variances, bits, strict=True))
    assert error == pytest.approx(least_error_by_dynamic_programming(tuple(variances), total_bits, max_bits))


@given(VARIANCES, st.integers(0, 20))
@settings(max_examples=40, deadline=None)
def test_more_variance_never_gets_fewer_bits(variances, total_bits):
    bits = allocate_bits(variances, total_bits)
    by_variance = [count for _, count in sorted(zip(variances, bits, strict=True))]
    assert by_variance == sorted(by_variance) or len(set(variances)) < len(variances)


@pytest.mark.parametrize(("variances", "total_bits"), [([1.0, -1.0], 2), ([1.0], -1)])
def test_a_negative_variance_or_budget_is_refused(variances, total_bits):
    with pytest.raises(ValueError, match="negative"):
        allocate_bits(variances, total_bits)


def relative_error(rows, transform):
    fields = {name: getattr(transform, name) for name in ("mean", "basis", "step", "levels")}
    restored = kvtc_decode_reference(kvtc_encode_reference(rows, fields), fields)
    return float((restored - rows).square().sum() / (rows - rows.mean(0)).square().sum())


def test_error_falls_with_bits_and_beats_equal_bits_without_the_transform():
    rows = draw_inputs(RowsCase("", "float32", 4096, 64, 2.0), 11, "cpu")["rows"]
    errors = [relative_error(rows, fit_transform(rows, bits)) for bits in (0.5, 1.0, 2.0, 3.0, 4.0)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 0.6
    # Uniform quantisers of a normal variable: 0.1188 at 2 bits for the best step (Max 1960); equal bits per channel
    # cannot do better on channels that look normal, the transform can.
    assert errors[2] < 0.1188


def test_the_fit_finds_the_principal_components():
    inputs = draw_inputs(RowsCase("", "float32", 20000, 16, 3.0), 4, "cpu")
    fitted = fit_transform(inputs["rows"], 3.0)
    overlap = (fitted.basis.T @ inputs["basis"])[:4, :4].diagonal().abs()
    assert (overlap > 0.97).all()
    torch.testing.assert_close(fitted.basis.T @ fitted.basis, torch.eye(fitted.basis.shape[1]), atol=1e-5, rtol=0)
    assert fitted.bits_per_channel <= 3.0
