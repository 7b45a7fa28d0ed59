"""The interpreter computes bf16 and fp8 by value, as a GPU does."""

import pytest

torch = pytest.importorskip("torch", reason="kernels need torch (the kernels extra)")
triton = pytest.importorskip("triton", reason="kernels need triton (the kernels extra)")
import triton.language as tl  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
SIZE = 4096


@triton.jit
def arithmetic_kernel(x_ptr, y_ptr, out_ptr, SIZE: tl.constexpr):
    n = tl.arange(0, SIZE)
    x = tl.load(x_ptr + n)
    y = tl.load(y_ptr + n)
    tl.store(out_ptr + n, x + y)
    tl.store(out_ptr + SIZE + n, x * y)
    tl.store(out_ptr + 2 * SIZE + n, tl.maximum(x, y))
    tl.store(out_ptr + 3 * SIZE + n, -x)
    tl.store(out_ptr + 4 * SIZE + n, tl.where(x < y, x, y))
    tl.store(out_ptr + 5 * SIZE + n, x * 2.0)


@triton.jit
def cast_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    n = tl.arange(0, SIZE)
    tl.store(out_ptr + n, tl.load(x_ptr + n).to(out_ptr.dtype.element_ty))


@triton.jit
def dot_kernel(x_ptr, y_ptr, out_ptr, M: tl.constexpr, K: tl.constexpr):
    m = tl.arange(0, M)
    k = tl.arange(0, K)
    x = tl.load(x_ptr + m[:, None] * K + k[None, :])
    y = tl.load(y_ptr + k[:, None] * M + m[None, :])
    tl.store(out_ptr + m[:, None] * M + m[None, :], tl.dot(x, y))


def normal(*shape, seed, device, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def cast(values, dtype):
    out = torch.empty(SIZE, dtype=dtype, device=values.device)
    cast_kernel[(1,)](values, out, SIZE=SIZE)
    return out


def test_bf16_arithmetic_rounds_to_nearest(kernel_device):
    x, y = (normal(SIZE, seed=seed, device=kernel_device, dtype=torch.bfloat16) for seed in (1, 2))
    out = torch.empty(6, SIZE, dtype=torch.bfloat16, device=kernel_device)
    arithmetic_kernel[(1,)](x, y, out, SIZE=SIZE)
    expected = torch.stack([x + y, x * y, torch.maximum(x, y), -x, torch.minimum(x, y), x * 2])
    assert torch.equal(out, expected)


def test_bf16_products_are_of_values(kernel_device):
    x = normal(16, 64, seed=3, device=kernel_device, dtype=torch.bfloat16)
    y = normal(64, 16, seed=4, device=kernel_device, dtype=torch.bfloat16)
    out = torch.empty(16, 16, device=kernel_device)
    dot_kernel[(1,)](x, y, out, M=16, K=64)
    torch.testing.assert_close(out, x.float() @ y.float(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 100.0])
def test_fp8_casts_carry_and_keep_subnormals(dtype, scale, kernel_device):
    values = (normal(SIZE, seed=5, device="cpu") * scale).clamp(-400, 400).to(kernel_device)
    assert torch.equal(cast(values, dtype).view(torch.uint8), values.to(dtype).view(torch.uint8))


@pytest.mark.parametrize("source", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("target", [torch.float16, torch.bfloat16, torch.float32])
def test_fp8_widens_exactly(source, target, kernel_device):
    codes = torch.arange(256, dtype=torch.uint8).repeat(SIZE // 256).to(kernel_device).view(source)
    wide = cast(codes, target)
    expected = codes.float().to(target)
    assert torch.equal(wide.isnan(), expected.isnan())
    assert torch.equal(wide[~wide.isnan()], expected[~expected.isnan()])


def test_a_cast_to_fp8_saturates(kernel_device):
    values = torch.full((SIZE,), 1e4, device=kernel_device)
    assert cast(values, torch.float8_e4m3fn).float().unique().tolist() == [448.0]


def test_a_cast_to_bf16_rounds_to_nearest_even(kernel_device):
    values = normal(SIZE, seed=6, device=kernel_device) * 100
    assert torch.equal(cast(values, torch.bfloat16), values.bfloat16())
