"""Read words and keep one word per chunk."""

# Triton passes pointers and constants through unannotated, upper-case parameters; relative imports: see kernels.

import torch
import triton
import triton.language as tl

from ...launches import Launch, LaunchConfig
from ..words import CHUNK_WORDS


@triton.jit
def stream_read_kernel(source_ptr, result_ptr, num_words, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr):
    """Reduce one chunk by exclusive or: one integer operation per word, so that only memory can be the limit."""
    p = tl.program_id(0)
    n = tl.arange(0, BLOCK_N)
    first = p.to(tl.int64) * CHUNK
    total = tl.zeros([BLOCK_N], tl.int32)
    for tile in tl.static_range(CHUNK // BLOCK_N):
        word = first + tile * BLOCK_N + n
        total = total ^ tl.load(source_ptr + word, mask=word < num_words, other=0)
    tl.store(result_ptr + p, tl.xor_sum(total, 0))


def plan_stream_read(source: torch.Tensor, result: torch.Tensor, config: LaunchConfig) -> Launch:
    """Lay out the read of `source`, int32 (num_words,), into `result`, int32, one word per chunk.

    Raises
    ------
    ValueError
        If `result` has not one word per chunk.
    """
    num_chunks = triton.cdiv(len(source), CHUNK_WORDS)
    if result.shape != (num_chunks,):
        raise ValueError("result must hold one word per chunk")
    return Launch(
        kernel=stream_read_kernel,
        grid=(num_chunks,),
        arguments=(source, result, len(source)),
        options={
            "CHUNK": CHUNK_WORDS,
            "BLOCK_N": config.block_n,
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        },
    )
