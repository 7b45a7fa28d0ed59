"""The simulator's numpy codecs and the kernels' torch formats: written apart, they read back the same bits.

Both round metadata before they choose codes, multiply by reciprocals, and send ties to even codes.
"""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="kernels need torch (the kernels extra)")
pytest.importorskip("triton", reason="kernels need triton (the kernels extra)")
pytest.importorskip("ml_dtypes", reason="codecs need ml_dtypes (the quality extra)")

from kernels.formats.block_fp4 import MxFp4, NvFp4  # noqa: E402
from kernels.formats.fp8 import Fp8  # noqa: E402
from kernels.formats.ggml import Ggml  # noqa: E402
from kernels.formats.kivi import Kivi  # noqa: E402
from kernels.formats.latent import MlaFp8  # noqa: E402
from kernels.formats.per_token_head import Int4PerTokenHead, PerTokenHead8, VllmInt4PerTokenHead  # noqa: E402
from kvsim.compression import parse_compression  # noqa: E402
from kvsim.compression.encoding.per_token_head import SIGN_SEED  # noqa: E402
from kvsim.numerics.hadamard import random_signs, rotate  # noqa: E402
from kvsim.tensors import KvTensors, LayerKv  # noqa: E402

HEADS, TOKENS, DIM, BLOCK = 3, 192, 128, 32


def _draw(seed, *shape):
    """Normal numbers with heavy channels and tokens, rounded to bf16, as a cache holds them."""
    rng = np.random.default_rng(seed)
    spread = np.exp(rng.standard_normal(shape[-1])) * np.exp(0.5 * rng.standard_normal((shape[0], shape[1], 1)))
    return torch.tensor(rng.standard_normal(shape) * spread).bfloat16().float().numpy()


def _cache(keys, values):
    nothing = np.zeros((keys.shape[0], 0, keys.shape[2]), dtype=np.float32)
    positions = np.broadcast_to(np.arange(keys.shape[1]), keys.shape[:2]).copy()
    return KvTensors((LayerKv(keys, values, positions, nothing, nothing),), None, 1.0, "drawn")


@pytest.fixture(params=[0, 1, 2])
def kv(request):
    return _cache(*(_draw(10 * request.param + part, HEADS, TOKENS, DIM) for part in (0, 1)))


def _by_codec(name, kv, samples=()):
    codec = parse_compression(name).encoding.codec()
    stored = (codec.fit(samples) if codec.needs_calibration else codec).store(kv)[0]
    return stored.keys, stored.values


def _as_blocks(vectors):
    """(H, n, D) to whole blocks, (blocks, BLOCK, H, D)."""
    return torch.tensor(np.ascontiguousarray(vectors.swapaxes(0, 1))).unflatten(0, (-1, BLOCK))


def _by_kernel_format(kv_format, keys, values):
    fields = kv_format.encode(_as_blocks(keys), _as_blocks(values))
    decoded = kv_format.decode(fields, keys.shape[-1])
    return tuple(one.flatten(0, 1).numpy().swapaxes(0, 1) for one in decoded)


def _equal(mine, theirs):
    for one, other in zip(mine, theirs, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("code", ["e4m3", "e5m2"])
def test_fp8_with_a_scale_of_one(code, kv):
    layer = kv.layers[0]
    _equal(_by_codec(f"fp8(dtype={code})", kv), _by_kernel_format(Fp8(code), layer.keys, layer.values))


def test_fp8_with_calibrated_scales(kv):
    layer, sample = kv.layers[0], _cache(_draw(91, HEADS, TOKENS, DIM), _draw(92, HEADS, TOKENS, DIM))
    scales = [float(np.abs(part).max() / np.float32(448)) for part in (sample.layers[0].keys, sample.layers[0].values)]
    _equal(
        _by_codec("fp8(scale=calibrated)", kv, [sample]),
        _by_kernel_format(Fp8("e4m3", *scales), layer.keys, layer.values),
    )


def test_fp8_of_a_latent(kv):
    latent = _draw(5, 1, TOKENS, 576)
    keys, values = _by_codec("fp8", _cache(latent, np.zeros((1, TOKENS, 0), dtype=np.float32)))
    theirs, _ = _by_kernel_format(MlaFp8(scale=1.0), latent, latent)
    np.testing.assert_array_equal(keys, theirs)
    assert values.shape == (1, TOKENS, 0)


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
@pytest.mark.parametrize("arrangement", ["planar", "inline"])
def test_eight_bits_per_token_and_head(dtype, arrangement, kv):
    layer = kv.layers[0]
    _equal(
        _by_codec(f"{dtype}_per_token_head", kv),
        _by_kernel_format(PerTokenHead8(dtype, arrangement), layer.keys, layer.values),
    )


def _turned(kv):
    signs = random_signs(DIM, SIGN_SEED)
    return tuple(rotate(part * signs) for part in (kv.layers[0].keys, kv.layers[0].values))


def _turned_back(decoded):
    signs = random_signs(DIM, SIGN_SEED)
    return tuple(rotate(np.ascontiguousarray(part)) * signs for part in decoded)


def test_int4_per_token_head_which_kernels_rotate_outside(kv):
    theirs = _turned_back(_by_kernel_format(Int4PerTokenHead(), *_turned(kv)))
    _equal(_by_codec("int4_per_token_head", kv), theirs)


def test_int4_with_the_integer_zero_point_of_vllm_is_nearly_as_good(kv):
    """vLLM's layout is another quantiser with the same bytes; its error must be ours within a tenth."""
    ours = _by_codec("int4_per_token_head", kv)
    vllms = _turned_back(_by_kernel_format(VllmInt4PerTokenHead(), *_turned(kv)))
    for mine, theirs, true in zip(ours, vllms, (kv.layers[0].keys, kv.layers[0].values), strict=True):
        ratio = np.sum((theirs - true) ** 2) / np.sum((mine - true) ** 2)
        assert 0.9 < ratio < 1.1


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("packing", ["interleaved", "sequential"])
def test_kivi(bits, packing, kv):
    layer = kv.layers[0]
    _equal(_by_codec(f"kivi-{bits}", kv), _by_kernel_format(Kivi(bits, packing), layer.keys, layer.values))


def test_mxfp4(kv):
    layer = kv.layers[0]
    _equal(_by_codec("mxfp4", kv), _by_kernel_format(MxFp4(), layer.keys, layer.values))


def test_nvfp4_with_calibrated_scales(kv):
    layer, sample = kv.layers[0], _cache(_draw(91, HEADS, TOKENS, DIM), _draw(92, HEADS, TOKENS, DIM))
    parts = (sample.layers[0].keys, sample.layers[0].values)
    scales = [float(np.float32(float(np.abs(part).max()) / (6.0 * 448.0))) for part in parts]
    _equal(_by_codec("nvfp4", kv, [sample]), _by_kernel_format(NvFp4(*scales), layer.keys, layer.values))


@pytest.mark.parametrize("name", ["q8_0", "q5_1", "q4_0"])
def test_llama_cpp_types_which_kernels_rotate_outside(name, kv):
    layer = kv.layers[0]
    ours = _by_codec(f"{name}(hadamard=false)", kv)
    _equal(ours, _by_kernel_format(Ggml(name), layer.keys, layer.values))


@pytest.mark.parametrize("name", ["q8_0", "q5_1", "q4_0"])
def test_llama_cpp_types_on_numbers_midway_between_codes(name):
    keys, values = (np.random.default_rng(seed).integers(-64, 65, (HEADS, TOKENS, DIM)) / 8 for seed in (3, 4))
    kv = _cache(keys.astype(np.float32), values.astype(np.float32))
    ours = _by_codec(f"{name}(hadamard=false)", kv)
    _equal(ours, _by_kernel_format(Ggml(name), kv.layers[0].keys, kv.layers[0].values))
