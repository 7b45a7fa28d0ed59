"""A loop of conversions over registers."""

# Triton passes pointers and constants through unannotated, upper-case parameters; relative imports: see kernels.

import torch
import triton
import triton.language as tl

from ...launches import Launch, LaunchConfig

STEP_MASK = 0x3
"""Bits that change from pass to pass: none of the exponent of an fp8 code."""


@triton.jit
def conversion_kernel(
    source_ptr,
    result_ptr,
    passes,
    FROM: tl.constexpr,
    TO: tl.constexpr,
    BITS: tl.constexpr,
    STEP_MASK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Convert a tile `passes` times, its codes changed in between, and keep the exclusive or of the results' bits.

    One logical operation changes the codes and one keeps the result alive; both are far below the conversion's cost,
    except for packed conversions, whose rate this bounds from below.
    """
    offset = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    source = tl.load(source_ptr + offset)
    kept = tl.zeros([BLOCK_N], BITS)
    flip = tl.zeros([1], source.dtype)
    for _ in range(passes):
        code = source ^ flip
        value = code.to(FROM, bitcast=True) if FROM.is_floating() else code
        kept = kept ^ value.to(TO).to(BITS, bitcast=True)
        flip = (flip + 1) & STEP_MASK
    tl.store(result_ptr + offset, kept)


def plan_conversion(
    source: torch.Tensor, result: torch.Tensor, passes: int, dtypes: tuple[str, str], config: LaunchConfig
) -> Launch:
    """Lay out the conversion of `source`, int32 or int8 codes, (programs * block_n,), to `result`, bits of that shape.

    `dtypes` are Triton's names of the dtypes from and to.

    Raises
    ------
    ValueError
        If the shapes differ or do not divide into tiles, or a width does not fit.
    """
    from_dtype, to_dtype = (getattr(tl, name) for name in dtypes)
    requirements = {
        "source and result must have one shape": source.shape == result.shape,
        "the values must divide into tiles": len(source) % config.block_n == 0,
        "source must be as wide as the dtype to convert from": 8 * source.itemsize == from_dtype.primitive_bitwidth,
        "result must be as wide as the dtype to convert to": 8 * result.itemsize == to_dtype.primitive_bitwidth,
    }
    for requirement, met in requirements.items():
        if not met:
            raise ValueError(requirement)
    return Launch(
        kernel=conversion_kernel,
        grid=(len(source) // config.block_n,),
        arguments=(source, result, passes),
        options={
            "FROM": from_dtype,
            "TO": to_dtype,
            "BITS": {16: tl.int16, 32: tl.int32}[to_dtype.primitive_bitwidth],
            "STEP_MASK": STEP_MASK,
            "BLOCK_N": config.block_n,
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        },
    )
