"""TurboQuant's codebooks, planes and formats: distortion, unbiasedness, norm correction, packing, rotation."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="kernel formats need torch (the kernels extra)")

from kernels.formats.lloyd_max import CUBIC, LLOYD_MAX  # noqa: E402
from kernels.formats.turboquant import (  # noqa: E402
    TurboQuant,
    TurboQuantPaper,
    gaussian_projection,
    hadamard,
    pack_planes,
    pack_stream,
    random_signs,
    unpack_planes,
    unpack_stream,
)

GAUSSIAN_DISTORTION = {1: 0.36338, 2: 0.11748, 3: 0.03455, 4: 0.00950}
"""Of unit variance, by bits: Max 1960, and the paper's section 3 to more digits."""
SPHERE_DISTORTION = {
    64: (0.3584, 0.1145, 0.0334, 0.0091),
    128: (0.36089, 0.11600, 0.03397, 0.00932),
    256: (0.3621, 0.1167, 0.0343, 0.0094),
}
"""Of a coordinate of a random unit vector times sqrt(dimension), for 1 to 4 bits, by dimension."""
PRESETS = {
    "turboquant_k8v4": (8, 4, 196),
    "turboquant_4bit_nc": (4, 4, 134),
    "turboquant_k3v4_nc": (3, 4, 118),
    "turboquant_3bit_nc": (3, 3, 102),
}
"""Bits of keys and of values, and bytes per token and head for a head of 128 (vLLM's table)."""


def density(x):
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def mass(x):
    return (1 + math.erf(x / math.sqrt(2))) / 2


def gaussian_cells(levels):
    """Give mass and first moment of N(0, 1) in each level's cell."""
    edges = [-math.inf, *((a + b) / 2 for a, b in itertools.pairwise(levels)), math.inf]
    return [(mass(high) - mass(low), density(low) - density(high)) for low, high in itertools.pairwise(edges)]


def gaussian_distortion(levels):
    cells = zip(levels, gaussian_cells(levels), strict=True)
    return 1 + sum(level * level * inside - 2 * level * moment for level, (inside, moment) in cells)


def lloyd_max(bits):
    """Iterate Lloyd's two conditions: cells by midpoints, levels by centroids."""
    levels = [6 * (code + 0.5) / 2**bits - 3 for code in range(2**bits)]
    for _ in range(4000):
        moved = [moment / inside for inside, moment in gaussian_cells(levels)]
        step = max(abs(a - b) for a, b in zip(levels, moved, strict=True))
        levels = moved
        if step < 1e-13:
            break
    return levels


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_stored_levels_are_lloyd_max(bits):
    assert LLOYD_MAX[bits].levels == pytest.approx(lloyd_max(bits), abs=1e-8)
    assert gaussian_distortion(LLOYD_MAX[bits].levels) == pytest.approx(GAUSSIAN_DISTORTION[bits], abs=6e-6)


@pytest.mark.parametrize(("bits", "excess"), [(2, 1e-6), (3, 0.0022), (4, 0.0198)])
def test_cubic_levels_cost_little(bits, excess):
    cubic = CUBIC[bits]
    assert float(torch.tensor(cubic.alpha).half()) == cubic.alpha
    best = gaussian_distortion(LLOYD_MAX[bits].levels)
    assert best <= gaussian_distortion(cubic.levels) + 1e-9 <= best * (1 + excess)


@pytest.mark.parametrize("dim", SPHERE_DISTORTION)
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_lloyd_max_of_the_sphere_is_near(dim, bits):
    """The levels of the finite dimension have the table's distortion, and those of N(0, 1) at most 3 % more."""
    x = torch.linspace(-1, 1, 40_001, dtype=torch.float64)
    weight = (1 - x * x).clamp_min(0) ** ((dim - 3) / 2)
    weight /= weight.sum()
    scaled = x * math.sqrt(dim)
    counted = torch.cat((torch.zeros(1, dtype=torch.float64), weight.cumsum(0)))
    summed = torch.cat((torch.zeros(1, dtype=torch.float64), (weight * scaled).cumsum(0)))

    def cells(levels):
        edge = torch.searchsorted(scaled, (levels[1:] + levels[:-1]) / 2)
        edge = torch.cat((torch.tensor([0]), edge, torch.tensor([len(x)])))
        return counted[edge].diff(), summed[edge].diff()

    def distortion(levels):
        inside, moment = cells(levels)
        return float((weight * scaled**2).sum() + (levels**2 * inside - 2 * levels * moment).sum())

    gaussian = torch.tensor(LLOYD_MAX[bits].levels, dtype=torch.float64)
    levels = gaussian
    for _ in range(100):
        inside, moment = cells(levels)
        levels = moment / inside
    optimum = distortion(levels)
    assert optimum == pytest.approx(SPHERE_DISTORTION[dim][bits - 1], abs=6e-5)
    assert optimum <= distortion(gaussian) <= 1.03 * optimum


@given(st.sampled_from([1, 2, 3, 4]), st.sampled_from([16, 64, 128]), st.randoms(use_true_random=False))
@settings(max_examples=25, deadline=None)
def test_planes_and_streams_are_bijective(bits, dim, random):
    codes = torch.tensor([[random.randrange(2**bits) for _ in range(dim)] for _ in range(3)], dtype=torch.uint8)
    planes = pack_planes(codes, bits)
    assert sum(plane.shape[-1] for plane in planes.values()) == dim * bits // 8
    assert torch.equal(unpack_planes(planes, bits), codes)
    stream = pack_stream(codes, bits)
    assert stream.shape[-1] == dim * bits // 8
    assert torch.equal(unpack_stream(stream, bits), codes)
    # The other way round: every plane is the packing of some codes.
    drawn = {part: torch.randint(0, 256, plane.shape, dtype=torch.uint8) for part, plane in planes.items()}
    again = pack_planes(unpack_planes(drawn, bits), bits)
    assert all(torch.equal(again[part], plane) for part, plane in drawn.items())


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_hadamard_is_its_own_inverse(dim):
    matrix = hadamard(dim, "cpu")
    assert torch.equal(matrix, matrix.T)
    assert torch.equal(matrix @ matrix, dim * torch.eye(dim))
    assert set(random_signs(dim, "cpu").tolist()) == {-1.0, 1.0}


def test_hadamard_needs_a_power_of_two():
    with pytest.raises(ValueError, match="power of two"):
        hadamard(96, "cpu")


def draw(*, dim=128, vectors=2048, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(3 * torch.randn(vectors // 16, 16, 1, dim, generator=generator) for _ in range(2))


def round_trip(kv_format, keys, values):
    dim = keys.shape[-1]
    layout = kv_format.layout(num_kv_heads=1, head_dim=dim, block_size=16, dtype=torch.bfloat16)
    pages = layout.allocate(len(keys))
    layout.store(pages, kv_format.encode(keys, values))
    return kv_format.decode(layout.views(pages), dim)


def relative_error(found, wanted):
    return float((found - wanted).square().sum() / wanted.square().sum())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_algorithm_1_has_the_codebooks_distortion(bits):
    keys, values = draw()
    for found, wanted in zip(round_trip(TurboQuantPaper("mse", bits), keys, values), (keys, values), strict=True):
        # A quarter of a million coordinates: the mean is good to below 1 %; on the sphere it is a little less.
        expected = gaussian_distortion(CUBIC[bits].levels)
        assert 0.97 * expected < relative_error(found, wanted) < 1.01 * expected


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_algorithm_2_is_unbiased_within_its_variance(bits):
    """Over many vectors with one projection the mean error of a unit query is zero, its variance pi/2 D(b-1) / d."""
    keys, values = draw(vectors=4096)
    keys = keys / keys.norm(dim=-1, keepdim=True)
    found, _ = round_trip(TurboQuantPaper("prod", bits), keys, values)
    query = keys.roll(1, 0)
    error = ((found - keys) * query).sum(-1).flatten()
    signal = (keys * query).sum(-1).flatten()
    dim = keys.shape[-1]
    levels = (CUBIC if bits > 2 else LLOYD_MAX)[bits - 1].levels
    variance = math.pi / 2 * gaussian_distortion(levels) / dim
    assert abs(float(error.mean())) < 4 * math.sqrt(variance / len(error))
    assert float(error.var()) < 1.06 * variance
    slope = float((error * signal).mean() / signal.square().mean())
    assert abs(slope) < 4 * math.sqrt(variance * dim / len(error))


def test_algorithm_1_shrinks_inner_products():
    """Its slope is 1 - D; that of Algorithm 2, tested above, is 1."""
    keys, values = draw()
    found, _ = round_trip(TurboQuantPaper("mse", 2), keys, values)
    slope = float((found * keys).sum() / keys.square().sum())
    assert slope == pytest.approx(1 - GAUSSIAN_DISTORTION[2], abs=0.005)


@pytest.mark.parametrize("arrangement", ["planar", "inline"])
@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_vllms_bytes_and_keep_the_norm(preset, arrangement):
    key_bits, value_bits, token_head_bytes = PRESETS[preset]
    kv_format = TurboQuant(preset, key_bits, value_bits, arrangement=arrangement)
    layout = kv_format.layout(num_kv_heads=8, head_dim=128, block_size=16, dtype=torch.bfloat16)
    assert layout.page_bytes == 16 * 8 * token_head_bytes
    keys, values = draw(vectors=1024)
    found_keys, found_values = round_trip(kv_format, keys, values)
    if kv_format.rotates_keys:
        # fp16 rounds the norm by at most 2**-11.
        assert torch.allclose(found_keys.norm(dim=-1), keys.norm(dim=-1), rtol=6e-4)
        expected = gaussian_distortion(CUBIC[key_bits].levels)
        assert 0.95 * expected < relative_error(found_keys, keys) < 1.04 * expected
    steps = 2**value_bits - 1
    half_step = (values.amax(-1) - values.amin(-1)) / steps / 2
    assert ((found_values - values).abs().amax(-1) < 1.02 * half_step + 0.01).all()


def test_both_arrangements_decode_to_the_same_but_for_rounding():
    keys, values = draw(vectors=256)
    planar = round_trip(TurboQuant("turboquant_3bit_nc", 3, 3, codebook="lloyd_max"), keys, values)
    inline = round_trip(
        TurboQuant("turboquant_3bit_nc", 3, 3, codebook="lloyd_max", arrangement="inline"), keys, values
    )
    for one, other in zip(planar, inline, strict=True):
        assert torch.allclose(one, other, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("kv_format", [TurboQuant("turboquant_4bit_nc", 4, 4), TurboQuantPaper("prod", 3)])
def test_zero_vectors_stay_finite(kv_format):
    zeros = torch.zeros(1, 16, 1, 128)
    keys, values = round_trip(kv_format, zeros, zeros)
    assert not keys.any()
    assert torch.allclose(values, zeros, atol=1e-6)


@pytest.mark.parametrize(("algorithm", "bits", "expected"), [("mse", 4, 132), ("mse", 2, 68), ("prod", 3, 102)])
def test_paper_bytes(algorithm, bits, expected):
    layout = TurboQuantPaper(algorithm, bits).layout(num_kv_heads=8, head_dim=128, block_size=16, dtype=torch.bfloat16)
    assert layout.page_bytes == 16 * 8 * expected


def test_projection_is_exact_in_fp16_and_gaussian():
    projection = gaussian_projection(256, "cpu")
    assert projection.dtype == torch.float16
    assert abs(float(projection.float().mean())) < 0.02
    assert float(projection.float().var()) == pytest.approx(1, abs=0.03)


def test_odd_head_dims_are_refused():
    with pytest.raises(ValueError, match="multiple of 16"):
        TurboQuant("turboquant_4bit_nc", 4, 4).layout(num_kv_heads=1, head_dim=72, block_size=16, dtype=torch.float16)
