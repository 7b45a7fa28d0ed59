"""Copy words."""

# Triton passes pointers and constants through unannotated, upper-case parameters; relative imports: see kernels.

import torch
import triton
import triton.language as tl

from ...launches import Launch, LaunchConfig
from ..words import CHUNK_WORDS


@triton.jit
def copy_kernel(source_ptr, target_ptr, num_words, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr):
    """Copy one chunk."""
    n = tl.arange(0, BLOCK_N)
    first = tl.program_id(0).to(tl.int64) * CHUNK
    for tile in tl.static_range(CHUNK // BLOCK_N):
        word = first + tile * BLOCK_N + n
        mask = word < num_words
        tl.store(target_ptr + word, tl.load(source_ptr + word, mask=mask, other=0), mask=mask)


def plan_copy(source: torch.Tensor, target: torch.Tensor, config: LaunchConfig) -> Launch:
    """Lay out the copy of `source`, int32 (num_words,), to `target`.

    Raises
    ------
    ValueError
        If the two differ in shape or dtype.
    """
    if target.shape != source.shape or target.dtype != source.dtype:
        raise ValueError("source and target must have one shape and dtype")
    return Launch(
        kernel=copy_kernel,
        grid=(triton.cdiv(len(source), CHUNK_WORDS),),
        arguments=(source, target, len(source)),
        options={
            "CHUNK": CHUNK_WORDS,
            "BLOCK_N": config.block_n,
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        },
    )
