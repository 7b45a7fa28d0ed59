"""Laws of the bounds: against brute force, against each other, and their shape."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsim.errors import InvalidSpec
from kvsim.limit.rate_distortion import Spectrum, isotropic_bits, isotropic_distortion, sphere_distortion

RATES = np.linspace(0.0, 10.0, 81)
variances = st.lists(st.floats(1e-6, 1e4), min_size=1, max_size=12)


def brute_force(values: list[float], bits: float) -> float:
    """Spend the bits in tiny steps, each where it lowers the error most."""
    errors = np.array(values)
    step = bits * len(values) / 20_000
    for _ in range(20_000):
        errors[errors.argmax()] *= 4.0**-step
    return float(errors.mean())


@pytest.mark.parametrize("bits", [0.3, 1.0, 2.7, 6.0])
@pytest.mark.parametrize("values", [[1.0], [4.0, 1.0], [9.0, 1.0, 0.01, 0.01], [5.0, 2.0, 2.0, 0.5, 0.0]])
def test_water_filling_is_what_spending_bits_one_by_one_gives(values: list[float], bits: float) -> None:
    assert Spectrum.of(values).distortion(bits) == pytest.approx(brute_force(values, bits), rel=2e-3)


@given(values=variances, bits=st.floats(0.0, 12.0))
def test_bits_invert_distortion(values: list[float], bits: float) -> None:
    spectrum = Spectrum.of(values)
    assert spectrum.bits(spectrum.distortion(bits)) == pytest.approx(bits, abs=1e-6)


@given(values=variances)
def test_error_falls_and_is_convex_in_bits(values: list[float]) -> None:
    errors = np.array([Spectrum.of(values).distortion(bits) for bits in RATES])
    assert errors[0] == pytest.approx(np.mean(values))
    assert (np.diff(errors) < 0).all()
    assert (np.diff(errors, 2) > -1e-9 * errors[0]).all()


@given(size=st.integers(1, 40), bits=st.floats(0.0, 12.0))
def test_equal_variances_give_the_isotropic_line(size: int, bits: float) -> None:
    spectrum = Spectrum.of(np.ones(size))
    assert spectrum.distortion(bits) == pytest.approx(isotropic_distortion(bits), rel=1e-9)
    assert isotropic_bits(isotropic_distortion(bits)) == pytest.approx(bits, abs=1e-9)


@given(values=variances, bits=st.floats(0.0, 10.0))
def test_unequal_variances_never_lie_above_the_isotropic_line(values: list[float], bits: float) -> None:
    relative = np.array(values) / np.mean(values)
    assert Spectrum.of(relative).distortion(bits) <= isotropic_distortion(bits) * (1 + 1e-9)


@given(parts=st.lists(variances, min_size=2, max_size=4), bits=st.floats(0.0, 8.0))
def test_dividing_bits_freely_is_no_worse_than_evenly(parts: list[list[float]], bits: float) -> None:
    spectra = [Spectrum.of(part) for part in parts]
    evenly = sum(one.distortion(bits) * one.size for one in spectra) / sum(one.size for one in spectra)
    assert Spectrum.joined(spectra).distortion(bits) <= evenly * (1 + 1e-9)


def test_a_channel_that_never_varies_costs_nothing() -> None:
    assert Spectrum.of([1.0, 0.0]).distortion(3.0) == pytest.approx(4.0**-6 / 2)
    assert Spectrum.of([0.0, 0.0]).distortion(0.0) == 0.0
    assert Spectrum.of([0.0]).bits(0.0) == 0.0
    assert Spectrum.of([1.0]).bits(0.0) == np.inf


def test_two_points_on_a_circle_and_a_line_of_arcs() -> None:
    """M arcs of a circle: the mean of an arc of half-angle t lies sin(t)/t from the centre."""
    for words in (2, 4, 16, 1024):
        angle = np.pi / words
        exact = 1 - (np.sin(angle) / angle) ** 2
        assert sphere_distortion(np.log2(words) / 2, 2) == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_half_spheres_have_the_mean_of_a_coordinates_size(dim: int) -> None:
    rng = np.random.default_rng(0)
    first = np.abs(rng.standard_normal((200_000, 1)))
    norms = np.sqrt(first[:, 0] ** 2 + rng.chisquare(dim - 1, 200_000))
    mean = (first[:, 0] / norms).mean()
    assert sphere_distortion(1 / dim, dim) == pytest.approx(1 - mean**2, rel=1e-4)


@pytest.mark.parametrize("bits", [1.0, 2.0, 3.0, 4.0, 8.0])
def test_the_finite_floor_tends_to_four_to_the_minus_bits(bits: float) -> None:
    gaps = [abs(np.log2(sphere_distortion(bits, dim) / isotropic_distortion(bits))) for dim in (32, 128, 512, 2048)]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 0.02


def test_no_scalar_codebook_beats_the_finite_floor() -> None:
    """Errors of Lloyd-Max on the coordinate law of 128 dimensions (TurboQuant's algorithm, recomputed)."""
    for bits, error in ((1, 0.36089), (2, 0.11600), (3, 0.03397), (4, 0.00932)):
        assert error > sphere_distortion(bits, 128)


def test_wrong_input_says_what_is_allowed() -> None:
    with pytest.raises(InvalidSpec, match="not negative"):
        Spectrum.of([1.0, -0.1])
    with pytest.raises(InvalidSpec, match="at least 2 dimensions"):
        sphere_distortion(1.0, 1)
