"""Scale new K and V, round them to fp8 and write them to their slots of the pool.

Tile names: t new token, h KV head, d dimension. Suffix `_ptr`: pointer; `_stride_x`: elements between neighbours along
x. Upper case: compile-time.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import triton
import triton.language as tl

from ...launches import Launch, LaunchConfig
from ..batch import AppendBatch, check_append_inputs
from .encode import encode_fp8


@dataclass(frozen=True)
class EncodeConfig(LaunchConfig):
    """A tiling, and how fp32 becomes fp8: in integer operations, or by the target's conversion instructions."""

    encode: Literal["bits", "convert"] = "bits"


@triton.jit
def append_fp8_kernel(
    key_ptr,
    value_ptr,
    slot_mapping_ptr,
    key_page_ptr,
    value_page_ptr,
    key_factor,
    value_factor,
    num_tokens,
    key_stride_t,
    key_stride_h,
    value_stride_t,
    value_stride_h,
    page_stride_block,
    page_stride_row,
    page_stride_h,
    CODE: tl.constexpr,
    CONVERT: tl.constexpr,
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
    key_code = encode_fp8(key.to(tl.float32) * key_factor, CODE, CONVERT)
    value_code = encode_fp8(value.to(tl.float32) * value_factor, CODE, CONVERT)
    tl.store(key_page_ptr + target[:, None] + d[None, :], key_code, mask=mask)
    tl.store(value_page_ptr + target[:, None] + d[None, :], value_code, mask=mask)


def plan_append_fp8(
    case: AppendBatch,
    inputs: Mapping[str, Any],
    buffers: Mapping[str, torch.Tensor],
    config: LaunchConfig,
    *,
    code: Literal["e4m3", "e5m2"],
) -> Launch:
    """Lay out the kernel; scales are inputs ``key_scale`` and ``value_scale``, floats or tensors of one element.

    Raises
    ------
    ValueError
        If a shape, dtype or stride does not fit.
    """
    check_append_inputs(case, inputs)
    key, value = inputs["key"], inputs["value"]
    key_page, value_page = buffers["key"].view(torch.uint8), buffers["value"].view(torch.uint8)
    if key_page.stride() != value_page.stride() or key_page.stride(-1) != 1:
        raise ValueError("K and V of the pool must have the same strides and be contiguous along a vector")
    return Launch(
        kernel=append_fp8_kernel,
        grid=(triton.cdiv(case.num_tokens, config.block_n), case.num_kv_heads),
        arguments=(
            *(key, value, inputs["slot_mapping"], key_page, value_page),
            *(1.0 / float(inputs["key_scale"]), 1.0 / float(inputs["value_scale"]), case.num_tokens),
            *key.stride()[:2],
            *value.stride()[:2],
            *key_page.stride()[:3],
        ),
        options={
            "CODE": code,
            "CONVERT": converts(config),
            "HEAD_DIM": case.head_dim,
            "BLOCK_SIZE": case.block_size,
            "BLOCK_T": config.block_n,
            "BLOCK_D": triton.next_power_of_2(case.head_dim),
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
            "enable_fp_fusion": False,  # or the rounding of subnormals would not see the rounded product
        },
    )


def converts(config: LaunchConfig) -> bool:
    """Tell whether the configuration asks for conversion instructions."""
    return isinstance(config, EncodeConfig) and config.encode == "convert"


def encode_configs(target: str, *, has_conversion: bool) -> tuple[LaunchConfig, ...]:
    """Tilings by tokens; by conversion where the target has it (sm_90 and newer)."""
    encode: Literal["bits", "convert"] = "convert" if has_conversion and target not in {"sm_80", "gfx942"} else "bits"
    return tuple(EncodeConfig(block_t, num_warps=4, num_stages=1, encode=encode) for block_t in (16, 32))
