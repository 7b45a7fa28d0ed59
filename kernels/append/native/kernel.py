"""Copy new K and V to their slots of the pool.

Tile names: t new token, h KV head, d dimension. Suffix `_ptr`: pointer; `_stride_x`: elements between neighbours along
x. Upper case: compile-time.
"""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from ...launches import Launch, LaunchConfig
from ..batch import AppendBatch, check_append_inputs


@triton.jit
def append_native_kernel(
    key_ptr,
    value_ptr,
    slot_mapping_ptr,
    key_page_ptr,
    value_page_ptr,
    num_tokens,
    key_stride_t,
    key_stride_h,
    value_stride_t,
    value_stride_h,
    page_stride_block,
    page_stride_row,
    page_stride_h,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write one head of a tile of tokens; a token in slot -1 is not written."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    h = tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    slot = tl.load(slot_mapping_ptr + t, mask=t < num_tokens, other=-1)
    mask = (slot >= 0)[:, None] & (d[None, :] < HEAD_DIM)
    target = slot // BLOCK_SIZE * page_stride_block + slot % BLOCK_SIZE * page_stride_row + h * page_stride_h
    t = t.to(tl.int64)
    key = tl.load(key_ptr + (t * key_stride_t + h * key_stride_h)[:, None] + d[None, :], mask=mask, other=0.0)
    value = tl.load(value_ptr + (t * value_stride_t + h * value_stride_h)[:, None] + d[None, :], mask=mask, other=0.0)
    tl.store(key_page_ptr + target[:, None] + d[None, :], key, mask=mask)
    tl.store(value_page_ptr + target[:, None] + d[None, :], value, mask=mask)


def plan_append_native(
    case: AppendBatch, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig
) -> Launch:
    """Lay out the copy; raise ValueError where a shape, dtype or stride does not fit."""
    check_append_inputs(case, inputs)
    key, value = inputs["key"], inputs["value"]
    key_page, value_page = buffers["key"], buffers["value"]
    if not key.dtype == key_page.dtype == value_page.dtype:
        raise ValueError("new K and V and the pool must have one dtype")
    if key_page.stride() != value_page.stride() or key_page.stride(-1) != 1:
        raise ValueError("K and V of the pool must have the same strides and be contiguous along a vector")
    return Launch(
        kernel=append_native_kernel,
        grid=(triton.cdiv(case.num_tokens, config.block_n), case.num_kv_heads),
        arguments=(
            *(key, value, inputs["slot_mapping"], key_page, value_page, case.num_tokens),
            *key.stride()[:2],
            *value.stride()[:2],
            *key_page.stride()[:3],
        ),
        options={
            "HEAD_DIM": case.head_dim,
            "BLOCK_SIZE": case.block_size,
            "BLOCK_T": config.block_n,
            "BLOCK_D": triton.next_power_of_2(case.head_dim),
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        },
    )
