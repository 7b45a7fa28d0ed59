"""Write new latents to their slots, as they are, in e4m3 with one scale, or as ``fp8_ds_mla``.

Tile names: t token, c compressed dimension, g group of 128 of them, r rotary dimension. Suffix `_ptr`: pointer;
`_stride_x`: elements between neighbours along x. Upper case: compile-time.
"""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from ...decode_attention.mla.e4m3 import fp32_to_e4m3
from ...formats.latent import E4M3_MAX, ROPE_DIM, SCALE_GROUP, SMALLEST_SCALE
from ...launches import Launch
from .batch import LatentAppendBatch, LatentAppendConfig


@triton.jit
def append_latent_kernel(
    latent_ptr,
    rope_ptr,
    slot_mapping_ptr,
    output_ptr,
    inverse_scale,
    num_tokens,
    latent_stride_t,
    rope_stride_t,
    output_stride_block,
    output_stride_token,
    LATENT_DIM: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    E4M3_MAX: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    IS_E4M3: tl.constexpr,
    BY_BITS: tl.constexpr,
):
    """Copy a tile of tokens, in e4m3 times `inverse_scale`; compressed values first, rotary ones behind."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.arange(0, LATENT_DIM)
    r = tl.arange(0, ROPE_DIM)
    slot = tl.load(slot_mapping_ptr + t, mask=t < num_tokens, other=-1)
    mask = slot[:, None] >= 0
    latent = tl.load(latent_ptr + t[:, None].to(tl.int64) * latent_stride_t + c[None, :], mask=mask, other=0.0)
    rope = tl.load(rope_ptr + t[:, None].to(tl.int64) * rope_stride_t + r[None, :], mask=mask, other=0.0)
    if IS_E4M3:
        scaled = tl.clamp(latent.to(tl.float32) * inverse_scale, -E4M3_MAX, E4M3_MAX)
        latent = fp32_to_e4m3(scaled, BY_BITS)
        rope = fp32_to_e4m3(tl.clamp(rope.to(tl.float32) * inverse_scale, -E4M3_MAX, E4M3_MAX), BY_BITS)
    row_ptr = output_ptr + (slot // BLOCK_SIZE) * output_stride_block + (slot % BLOCK_SIZE) * output_stride_token
    tl.store(row_ptr[:, None] + c[None, :], latent, mask=mask)
    tl.store(row_ptr[:, None] + LATENT_DIM + r[None, :], rope, mask=mask)


@triton.jit
def append_fp8_ds_mla_kernel(
    latent_ptr,
    rope_ptr,
    slot_mapping_ptr,
    code_ptr,
    scale_ptr,
    output_rope_ptr,
    num_tokens,
    latent_stride_t,
    rope_stride_t,
    code_stride_block,
    code_stride_token,
    scale_stride_block,
    scale_stride_token,
    output_rope_stride_block,
    output_rope_stride_token,
    GROUP: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    E4M3_MAX: tl.constexpr,
    SMALLEST_SCALE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BY_BITS: tl.constexpr,
):
    """Scale each group of a tile's tokens by its largest value over 448 and round to e4m3; copy the rotary values."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    g = tl.arange(0, NUM_GROUPS)
    c = g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    r = tl.arange(0, ROPE_DIM)
    slot = tl.load(slot_mapping_ptr + t, mask=t < num_tokens, other=-1)
    mask = slot >= 0
    token = t.to(tl.int64)
    latent = tl.load(
        latent_ptr + token[:, None, None] * latent_stride_t + c[None, :, :], mask=mask[:, None, None], other=0.0
    ).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(latent), 2) * (1.0 / E4M3_MAX), SMALLEST_SCALE)
    scaled = tl.clamp(tl.div_rn(latent, tl.broadcast_to(scale[:, :, None], latent.shape)), -E4M3_MAX, E4M3_MAX)
    rope = tl.load(rope_ptr + token[:, None] * rope_stride_t + r[None, :], mask=mask[:, None], other=0.0)

    block = slot // BLOCK_SIZE
    row = slot % BLOCK_SIZE
    code_row_ptr = code_ptr + block * code_stride_block + row * code_stride_token
    scale_row_ptr = scale_ptr + block * scale_stride_block + row * scale_stride_token
    rope_row_ptr = output_rope_ptr + block * output_rope_stride_block + row * output_rope_stride_token
    codes = fp32_to_e4m3(scaled, BY_BITS)
    tl.store(code_row_ptr[:, None, None] + c[None, :, :], codes, mask=mask[:, None, None])
    tl.store(scale_row_ptr[:, None] + g[None, :], scale, mask=mask[:, None])
    tl.store(rope_row_ptr[:, None] + r[None, :], rope, mask=mask[:, None])


def check_latent_append_inputs(case: LatentAppendBatch, inputs: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the first rule broken, unless the tensors fit the case."""
    latent, rope, slots = inputs["latent"], inputs["rope"], inputs["slot_mapping"]
    requirements = {
        "latent must be (num_tokens, latent_dim), a power of two": latent.shape == (case.num_tokens, case.latent_dim)
        and case.latent_dim & (case.latent_dim - 1) == 0,
        f"rope must be (num_tokens, {ROPE_DIM})": rope.shape == (case.num_tokens, ROPE_DIM),
        "latent and rope must have one dtype": latent.dtype == rope.dtype,
        "latent and rope must be contiguous along their last dimension": latent.stride(-1) == rope.stride(-1) == 1,
        "slot_mapping must be int64, one per token": slots.dtype == torch.int64 and slots.shape == (case.num_tokens,),
    }
    for requirement, met in requirements.items():
        if not met:
            raise ValueError(requirement)


def plan_append_latent(
    case: LatentAppendBatch,
    inputs: Mapping[str, Any],
    output: torch.Tensor,
    config: LatentAppendConfig,
    scale: float,
) -> Launch:
    """Lay out the copy into `output`, (num_blocks, block_size, 1, latent_dim + 64), in its dtype.

    Raises
    ------
    ValueError
        If a shape, dtype or stride does not fit.
    """
    check_latent_append_inputs(case, inputs)
    latent, rope = inputs["latent"], inputs["rope"]
    is_e4m3 = output.dtype == torch.float8_e4m3fn
    if not is_e4m3 and output.dtype != latent.dtype:
        raise ValueError("the cache must have the dtype of the latent, or e4m3")
    if output.shape[1:] != (case.block_size, 1, case.head_dim) or output.stride(-1) != 1:
        raise ValueError("the cache must be (num_blocks, block_size, 1, latent_dim + 64), contiguous along the last")
    by_bits = is_e4m3 and config.e4m3_by_bits
    return Launch(
        kernel=append_latent_kernel,
        grid=(triton.cdiv(case.num_tokens, config.block_n),),
        arguments=(
            *(latent, rope, inputs["slot_mapping"], output.view(torch.uint8) if by_bits else output),
            *(1.0 / scale, case.num_tokens, latent.stride(0), rope.stride(0), *output.stride()[:2]),
        ),
        options={
            "LATENT_DIM": case.latent_dim,
            "ROPE_DIM": ROPE_DIM,
            "E4M3_MAX": E4M3_MAX,
            "BLOCK_SIZE": case.block_size,
            "BLOCK_T": config.block_n,
            "IS_E4M3": is_e4m3,
            "BY_BITS": by_bits,
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        },
    )


def plan_append_fp8_ds_mla(
    case: LatentAppendBatch,
    inputs: Mapping[str, Any],
    fields: Mapping[str, torch.Tensor],
    config: LatentAppendConfig,
) -> Launch:
    """Lay out the quantisation into the three fields of ``fp8_ds_mla``.

    Raises
    ------
    ValueError
        If a shape, dtype or stride does not fit.
    """
    check_latent_append_inputs(case, inputs)
    latent, rope = inputs["latent"], inputs["rope"]
    codes, scale, output_rope = fields["latent"], fields["latent_scale"], fields["rope"]
    if case.latent_dim % SCALE_GROUP:
        raise ValueError(f"latent_dim must be a multiple of {SCALE_GROUP}")
    if codes.dtype != torch.float8_e4m3fn or scale.dtype != torch.float32 or output_rope.dtype != rope.dtype:
        raise ValueError("codes must be e4m3, scales float32, and rotary values in the dtype of the latent")
    return Launch(
        kernel=append_fp8_ds_mla_kernel,
        grid=(triton.cdiv(case.num_tokens, config.block_n),),
        arguments=(
            *(latent, rope, inputs["slot_mapping"]),
            *(codes.view(torch.uint8) if config.e4m3_by_bits else codes, scale, output_rope),
            *(case.num_tokens, latent.stride(0), rope.stride(0)),
            *codes.stride()[:2],
            *scale.stride()[:2],
            *output_rope.stride()[:2],
        ),
        options={
            "GROUP": SCALE_GROUP,
            "NUM_GROUPS": case.latent_dim // SCALE_GROUP,
            "ROPE_DIM": ROPE_DIM,
            "E4M3_MAX": E4M3_MAX,
            "SMALLEST_SCALE": SMALLEST_SCALE,
            "BLOCK_SIZE": case.block_size,
            "BLOCK_T": config.block_n,
            "BY_BITS": config.e4m3_by_bits,
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        },
    )
