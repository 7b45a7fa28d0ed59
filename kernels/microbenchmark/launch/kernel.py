"""A kernel that does as good as nothing."""

# Triton passes pointers and constants through unannotated, upper-case parameters; relative imports: see kernels.

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ...launches import HostCall, Launch


@triton.jit(do_not_specialize=["index"])
def empty_kernel(result_ptr, index):
    """Leave one word, so that a launch that did not happen shows."""
    tl.store(result_ptr + index, index)


def plan_launches(result: torch.Tensor) -> tuple[Launch, ...]:
    """Lay out one launch per word of `result`, int32.

    Raises
    ------
    ValueError
        If `result` is not a contiguous run of int32.
    """
    if result.dtype != torch.int32 or result.dim() != 1 or not result.is_contiguous():
        raise ValueError("result must be contiguous int32, (num_launches,)")
    return tuple(
        Launch(kernel=empty_kernel, grid=(1,), arguments=(result, index), options={"num_warps": 1})
        for index in range(len(result))
    )


def capture(name: str, launches: Sequence[Launch]) -> HostCall:
    """Capture launches as one CUDA graph; give its replay."""
    for launch in launches[:1]:
        launch.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch.run()
    return HostCall(name, graph.replay)
