"""The comparison that every kernel is held to cannot be fooled by NaN, shape, dtype or scale."""

import pytest

torch = pytest.importorskip("torch", reason="kernels need torch (the kernels extra)")
pytest.importorskip("triton", reason="kernels need triton (the kernels extra)")

from kernels.harness.check import CODE_MISMATCHES, TOLERANCES, CheckFailed, compare, poisoned_memory  # noqa: E402


class Stub:
    """As much of a variant as a comparison asks."""

    name = "stub"

    def __init__(self, kind, dtype="float16"):
        self.comparison = lambda _result: kind
        self.compute_dtype = lambda _case: dtype


def error(actual, expected, kind="close", dtype="float16"):
    return compare(Stub(kind, dtype), None, "result", torch.as_tensor(actual), torch.as_tensor(expected))


def passes(outcome):
    return outcome.error <= outcome.tolerance


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_errors_count_relative_to_the_largest_value(dtype):
    tolerance = TOLERANCES[dtype]
    for scale in (1e-3, 1.0, 1e4):
        expected = torch.tensor([1.0, -0.5], dtype=torch.float64) * scale
        assert passes(error(expected + 0.9 * tolerance * scale, expected, dtype=dtype))
        assert not passes(error(expected + 1.1 * tolerance * scale, expected, dtype=dtype))


@pytest.mark.parametrize(
    ("actual", "expected", "agree"),
    [
        ([float("nan"), 1.0], [float("nan"), 1.0], True),
        ([float("nan"), 1.0], [0.0, 1.0], False),
        ([0.0, 1.0], [float("nan"), 1.0], False),
        ([float("-inf"), 1.0], [float("-inf"), 1.0], True),
        ([float("inf"), 1.0], [float("-inf"), 1.0], False),
        ([0.0, 0.0], [0.0, 0.0], True),
        ([0.0, 0.1], [0.0, 0.0], False),
    ],
)
def test_nan_and_infinity_agree_only_with_themselves(actual, expected, agree):
    assert passes(error(actual, expected)) is agree


def test_results_of_another_shape_are_refused():
    with pytest.raises(CheckFailed, match="shape"):
        error([1.0, 2.0], [[1.0, 2.0]])


def test_codes_may_differ_rarely_and_exact_results_never():
    expected = torch.zeros(1000, dtype=torch.uint8)
    few, many = expected.clone(), expected.clone()
    few[: int(1000 * CODE_MISMATCHES)] = 1
    many[: int(1000 * CODE_MISMATCHES) + 1] = 1
    assert passes(error(few, expected, "codes"))
    assert not passes(error(many, expected, "codes"))
    assert not passes(error(few, expected, "exact"))
    assert passes(error(expected, expected, "exact"))


def test_codes_of_another_dtype_are_refused():
    with pytest.raises(CheckFailed, match="dtype"):
        error(torch.zeros(4, dtype=torch.int8), torch.zeros(4, dtype=torch.uint8), "codes")


def test_fresh_memory_is_poisoned_only_inside():
    before = torch.are_deterministic_algorithms_enabled()
    with poisoned_memory():
        assert torch.empty(64).isnan().all()
        assert (torch.empty(64, dtype=torch.uint8) == 255).all()
    assert torch.are_deterministic_algorithms_enabled() is before
