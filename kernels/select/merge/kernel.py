"""Merge: the nearest survivor of each evicted token by cosine of keys, then means per survivor.

Tile names: row a (request, KV head) b, h, e evicted token within a tile, s survivor within a tile, d dimension. Suffix
`_ptr`: pointer; `_stride_x`: elements between neighbours along x. Upper case: compile-time.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
import triton
import triton.language as tl

from ...launches import Launch, LaunchConfig
from ..group_means import Items, load_positions, plan_group_means

Rule = Literal["counts", "norms"]
EVICTED_PER_SURVIVOR = 2
"""A tile's evicted tokens per survivor: more share one load of the survivors."""
EPSILON = tl.constexpr(1e-6)
"""Least norm, as in kvpress."""


@triton.jit
def inverse_norms(vectors):
    """Give 1 / |v| of each row."""
    wide = vectors.to(tl.float32)
    return 1.0 / tl.maximum(tl.sqrt(tl.sum(wide * wide, 1)), EPSILON)


@triton.jit
def survivor_norms_kernel(
    key_ptr,
    kept_ptr,
    kept_lens_ptr,
    inverse_norms_ptr,
    num_kv_heads,
    max_kept,
    key_stride_b,
    key_stride_token,
    key_stride_h,
    HEAD_DIM: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write the inverse norm of each survivor's key."""
    row = tl.program_id(0)
    s = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_D)
    kept_len = tl.load(kept_lens_ptr + row)
    kept_row = row.to(tl.int64) * max_kept
    token = load_positions(kept_ptr + kept_row, s, kept_len, LISTED=True).to(tl.int64)
    head_ptr = key_ptr + (row // num_kv_heads).to(tl.int64) * key_stride_b + (row % num_kv_heads) * key_stride_h
    mask = (s[:, None] < kept_len) & (d[None, :] < HEAD_DIM)
    key = tl.load(head_ptr + (token * key_stride_token)[:, None] + d[None, :], mask=mask, other=0.0)
    tl.store(inverse_norms_ptr + kept_row + s, inverse_norms(key), mask=s < kept_len)


@triton.jit
def nearest_survivor_kernel(
    key_ptr,
    value_ptr,
    kept_ptr,
    kept_lens_ptr,
    evicted_ptr,
    evicted_lens_ptr,
    inverse_norms_ptr,
    target_ptr,
    weight_ptr,
    threshold,
    num_kv_heads,
    max_kept,
    max_evicted,
    key_stride_b,
    key_stride_token,
    key_stride_h,
    value_stride_b,
    value_stride_token,
    value_stride_h,
    WEIGH_BY_NORMS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Find the survivor of largest cosine for each evicted token, the first of equals; write it and its weight."""
    row = tl.program_id(0)
    b = (row // num_kv_heads).to(tl.int64)
    h = row % num_kv_heads
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    s = tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_D)
    kept_len = tl.load(kept_lens_ptr + row)
    evicted_len = tl.load(evicted_lens_ptr + row)
    key_head_ptr = key_ptr + b * key_stride_b + h * key_stride_h
    evicted_row = row.to(tl.int64) * max_evicted
    kept_row = row.to(tl.int64) * max_kept
    evicted_token = load_positions(evicted_ptr + evicted_row, e, evicted_len, LISTED=True).to(tl.int64)
    evicted_mask = (e[:, None] < evicted_len) & (d[None, :] < HEAD_DIM)
    evicted_key = tl.load(
        key_head_ptr + (evicted_token * key_stride_token)[:, None] + d[None, :], mask=evicted_mask, other=0.0
    )

    # The maximum is kept per column of the tile, and columns are compared once, after the loop.
    best = tl.full([BLOCK_E, BLOCK_S], float("-inf"), tl.float32)
    best_tile = tl.zeros([BLOCK_E, BLOCK_S], tl.int32)
    token = load_positions(kept_ptr + kept_row, s, kept_len, LISTED=True)
    for tile in range(0, kept_len, BLOCK_S):
        survivor = tile + s
        key_offset = token.to(tl.int64) * key_stride_token
        token = load_positions(kept_ptr + kept_row, survivor + BLOCK_S, kept_len, LISTED=True)
        survivor_mask = (survivor[:, None] < kept_len) & (d[None, :] < HEAD_DIM)
        survivor_key = tl.load(key_head_ptr + key_offset[:, None] + d[None, :], mask=survivor_mask, other=0.0)
        inverse_norm = tl.load(inverse_norms_ptr + kept_row + survivor, mask=survivor < kept_len, other=0.0)
        # A multiply-add costs less than a mask: places beyond the survivors get -inf.
        beyond = tl.where(survivor < kept_len, 0.0, float("-inf"))
        product = tl.dot(evicted_key, tl.trans(survivor_key), input_precision="ieee")
        similarity = product * inverse_norm[None, :] + beyond[None, :]
        better = similarity > best
        best = tl.where(better, similarity, best)
        best_tile = tl.where(better, tile, best_tile)
    top = tl.max(best, 1)
    place = tl.where(best == top[:, None], best_tile + s[None, :], 2147483647)
    target = tl.min(place, 1)
    cosine = top * inverse_norms(evicted_key)
    merged = (e < evicted_len) & (kept_len > 0) & (cosine >= threshold)

    weight = tl.full([BLOCK_E], 1.0, tl.float32)
    if WEIGH_BY_NORMS:
        target_token = tl.load(kept_ptr + kept_row + target, mask=merged, other=0).to(tl.int64)
        value_head_ptr = value_ptr + b * value_stride_b + h * value_stride_h
        mask = merged[:, None] & (d[None, :] < HEAD_DIM)
        evicted_value = tl.load(
            value_head_ptr + (evicted_token * value_stride_token)[:, None] + d[None, :], mask=mask, other=0.0
        ).to(tl.float32)
        target_value = tl.load(
            value_head_ptr + (target_token * value_stride_token)[:, None] + d[None, :], mask=mask, other=0.0
        ).to(tl.float32)
        evicted_norm = tl.sqrt(tl.sum(evicted_value * evicted_value, 1))
        target_norm = tl.sqrt(tl.sum(target_value * target_value, 1))
        weight = tl.maximum(cosine, 0.0) * evicted_norm / (evicted_norm + target_norm + EPSILON)
    tl.store(target_ptr + evicted_row + e, tl.where(merged, target, -1), mask=e < max_evicted)
    tl.store(weight_ptr + evicted_row + e, tl.where(merged, weight, 0.0), mask=e < max_evicted)


def plan_merge(
    inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], rule: Rule, config: LaunchConfig
) -> tuple[Launch, ...]:
    """Lay out norms of survivors, nearest survivors, and the sums and means of values and (rule ``counts``) of keys.

    Raises
    ------
    ValueError
        If a shape, dtype or stride does not fit.
    """
    key, value, kept, evicted = (inputs[name] for name in ("key", "value", "kept", "evicted"))
    kept_lens, evicted_lens = inputs["kept_lens"], inputs["evicted_lens"]
    batch, _, num_kv_heads, head_dim = key.shape
    heads = (batch, num_kv_heads)
    requirements = {
        "key and value must be (batch, tokens, num_kv_heads, head_dim) of one dtype": key.shape == value.shape
        and key.dtype == value.dtype,
        "key and value must be contiguous along head_dim": key.stride(-1) == value.stride(-1) == 1,
        "kept and evicted must be contiguous int32, (batch, num_kv_heads, n)": all(
            tensor.dtype == torch.int32 and tensor.is_contiguous() and tensor.shape[:-1] == heads
            for tensor in (kept, evicted)
        ),
        "lens must be contiguous int32, (batch, num_kv_heads)": all(
            tensor.dtype == torch.int32 and tensor.is_contiguous() and tensor.shape == heads
            for tensor in (kept_lens, evicted_lens)
        ),
    }
    for requirement, met in requirements.items():
        if not met:
            raise ValueError(requirement)
    max_kept, max_evicted = kept.shape[-1], evicted.shape[-1]
    target, weight, norms = buffers["target"], buffers["weight"], buffers["inverse_norms"]
    block_d = max(16, triton.next_power_of_2(head_dim))
    block_e = EVICTED_PER_SURVIVOR * config.block_n
    norms_launch = Launch(
        kernel=survivor_norms_kernel,
        grid=(batch * num_kv_heads, triton.cdiv(max_kept, config.block_n)),
        arguments=(key, kept, kept_lens, norms, num_kv_heads, max_kept, *key.stride()[:3]),
        options={"HEAD_DIM": head_dim, "BLOCK_S": config.block_n, "BLOCK_D": block_d, "num_warps": config.num_warps},
    )
    nearest_launch = Launch(
        kernel=nearest_survivor_kernel,
        grid=(batch * num_kv_heads, triton.cdiv(max_evicted, block_e)),
        arguments=(
            *(key, value, kept, kept_lens, evicted, evicted_lens, norms, target, weight),
            *(float(inputs["threshold"]), num_kv_heads, max_kept, max_evicted),
            *key.stride()[:3],
            *value.stride()[:3],
        ),
        options={
            "WEIGH_BY_NORMS": rule == "norms",
            "HEAD_DIM": head_dim,
            "BLOCK_E": block_e,
            "BLOCK_S": config.block_n,
            "BLOCK_D": block_d,
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        },
    )
    items = Items(evicted_lens, target, evicted, None if rule == "counts" else weight)
    shared = (items, kept_lens, kept)
    scratch = (buffers["sums"], buffers["totals"])
    launches = [norms_launch, nearest_launch]
    if rule == "counts":
        launches += plan_group_means(key, *shared, (*scratch, buffers["key"], buffers["log_weight"]), config)
    launches += plan_group_means(value, *shared, (*scratch, buffers["value"], buffers["log_weight"]), config)
    return tuple(launches)
