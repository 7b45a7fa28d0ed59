"""A loop of small matrix products over registers."""

# Triton passes pointers and constants through unannotated, upper-case parameters; relative imports: see kernels.

import torch
import triton
import triton.language as tl

from ...launches import Launch, LaunchConfig

ROWS = 16
"""Query heads of a group, padded to the matrix units' rows, as in the decode attention kernels."""
DEPTH = 64
SUMS = 4
"""Accumulators of a program, each of which the tiles' product is added to in every pass."""


@triton.jit
def mma_kernel(
    a_ptr, b_ptr, result_ptr, passes, ROWS: tl.constexpr, DEPTH: tl.constexpr, BLOCK_N: tl.constexpr, ACC: tl.constexpr
):
    """Add the product of a [ROWS, DEPTH] and a [DEPTH, BLOCK_N] tile to four sums, `passes` times."""
    p = tl.program_id(0)
    m = tl.arange(0, ROWS)
    k = tl.arange(0, DEPTH)
    n = tl.arange(0, BLOCK_N)
    a = tl.load(a_ptr + p * ROWS * DEPTH + m[:, None] * DEPTH + k[None, :])
    b = tl.load(b_ptr + p * DEPTH * BLOCK_N + k[:, None] + n[None, :] * DEPTH)
    # Four sums over the same operands: Triton loads an operand from shared memory in every pass, which alone would be
    # the limit with one product per load. They start apart, so that the compiler cannot make them one.
    total_0 = tl.zeros([ROWS, BLOCK_N], ACC)
    total_1 = tl.full([ROWS, BLOCK_N], 1, ACC)
    total_2 = tl.full([ROWS, BLOCK_N], 2, ACC)
    total_3 = tl.full([ROWS, BLOCK_N], 3, ACC)
    for _ in range(passes):
        total_0 = tl.dot(a, b, total_0, out_dtype=ACC)
        total_1 = tl.dot(a, b, total_1, out_dtype=ACC)
        total_2 = tl.dot(a, b, total_2, out_dtype=ACC)
        total_3 = tl.dot(a, b, total_3, out_dtype=ACC)
    total = (total_0 + total_1) + (total_2 + total_3)
    tl.store(result_ptr + p * ROWS * BLOCK_N + m[:, None] * BLOCK_N + n[None, :], total)


def plan_mma(a: torch.Tensor, b: torch.Tensor, result: torch.Tensor, passes: int, config: LaunchConfig) -> Launch:
    """Lay out the products of `a`, (programs, ROWS, DEPTH), and `b`, (programs, block_n, DEPTH), transposed.

    Raises
    ------
    ValueError
        If shapes or dtypes do not fit.
    """
    requirements = {
        "a must be contiguous, (programs, ROWS, DEPTH)": a.shape[1:] == (ROWS, DEPTH) and a.is_contiguous(),
        "b must be contiguous, (programs, block_n, DEPTH)": b.shape == (len(a), config.block_n, DEPTH)
        and b.is_contiguous(),
        "a and b must have one dtype": a.dtype == b.dtype,
        "result must be (programs, ROWS, block_n)": result.shape == (len(a), ROWS, config.block_n),
    }
    for requirement, met in requirements.items():
        if not met:
            raise ValueError(requirement)
    return Launch(
        kernel=mma_kernel,
        grid=(len(a),),
        arguments=(a, b, result, passes),
        options={
            "ROWS": ROWS,
            "DEPTH": DEPTH,
            "BLOCK_N": config.block_n,
            "ACC": tl.int32 if a.dtype == torch.int8 else tl.float32,
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        },
    )
