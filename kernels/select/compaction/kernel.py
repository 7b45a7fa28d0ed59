"""Compaction: copy the rows of kept tokens, as they are, from old pages to new ones.

Tile names: b request, h KV head, t kept token within a tile, w word of a row. Suffix `_ptr`: pointer; `_stride_x`:
elements between neighbours along x. Upper case: compile-time.
"""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from ...launches import Launch, LaunchConfig

WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)
"""Integers that rows may be copied as, the widest first."""


@triton.jit
def compact_rows_kernel(
    old_ptr,
    new_ptr,
    kept_ptr,
    kept_lens_ptr,
    old_table_ptr,
    new_table_ptr,
    old_stride_block,
    old_stride_token,
    old_stride_h,
    new_stride_block,
    new_stride_token,
    new_stride_h,
    kept_stride_b,
    kept_stride_h,
    kept_lens_stride_b,
    kept_lens_stride_h,
    old_table_stride_b,
    old_table_stride_h,
    new_table_stride_b,
    new_table_stride_h,
    ROW_WORDS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Copy a tile of one head's kept rows."""
    b = tl.program_id(0)
    h = tl.program_id(1)
    new_token = tl.program_id(2) * BLOCK_T + tl.arange(0, BLOCK_T)
    w = tl.arange(0, BLOCK_W)
    is_kept = new_token < tl.load(kept_lens_ptr + b * kept_lens_stride_b + h * kept_lens_stride_h)
    kept_row_ptr = kept_ptr + b.to(tl.int64) * kept_stride_b + h * kept_stride_h
    old_token = tl.load(kept_row_ptr + new_token, mask=is_kept, other=0)
    old_table_row_ptr = old_table_ptr + b.to(tl.int64) * old_table_stride_b + h * old_table_stride_h
    new_table_row_ptr = new_table_ptr + b.to(tl.int64) * new_table_stride_b + h * new_table_stride_h
    old_block = tl.load(old_table_row_ptr + old_token // BLOCK_SIZE, mask=is_kept, other=0).to(tl.int64)
    new_block = tl.load(new_table_row_ptr + new_token // BLOCK_SIZE, mask=is_kept, other=0).to(tl.int64)
    old_row = old_block * old_stride_block + (old_token % BLOCK_SIZE) * old_stride_token + h * old_stride_h
    new_row = new_block * new_stride_block + (new_token % BLOCK_SIZE) * new_stride_token + h * new_stride_h
    mask = is_kept[:, None]
    if ROW_WORDS < BLOCK_W:
        mask = mask & (w[None, :] < ROW_WORDS)
    row = tl.load(old_ptr + old_row[:, None] + w[None, :], mask=mask)
    tl.store(new_ptr + new_row[:, None] + w[None, :], row, mask=mask)


def as_words(*fields: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """View fields of one row size, (num_blocks, block_size, num_kv_heads, n), as the widest integers that fit all."""
    as_bytes = [field.view(torch.uint8) for field in fields]
    offsets = [n for field in as_bytes for n in (field.shape[-1], field.storage_offset(), *field.stride()[:-1])]
    word = next(word for word in WORDS if all(offset % word.itemsize == 0 for offset in offsets))
    return tuple(field.view(word) for field in as_bytes)


def plan_compaction(
    old: Mapping[str, torch.Tensor],
    new: Mapping[str, torch.Tensor],
    tables: Mapping[str, Any],
    num_kv_heads: int,
    config: LaunchConfig,
) -> tuple[Launch, ...]:
    """Lay out one copy per field.

    Parameters
    ----------
    old, new : mapping of name to Tensor, (num_blocks, block_size, num_kv_heads or 1, n)
        Fields of the pools, which may be one pool if the blocks differ; 1 where pages hold tokens of a single head.
    tables : mapping
        ``kept`` (batch, num_kv_heads or 1, max_kept) and ``kept_lens`` (batch, num_kv_heads or 1); ``old_table`` and
        ``new_table`` (batch, num_kv_heads or 1, max_blocks): 1 where all heads share.
    num_kv_heads : int
    config : LaunchConfig
        `block_n` is the number of rows per program.

    Raises
    ------
    ValueError
        If a shape, dtype or stride does not fit.
    """
    kept, kept_lens, old_table, new_table = (tables[name] for name in ("kept", "kept_lens", "old_table", "new_table"))
    batch = len(kept)
    shared = (1, num_kv_heads)
    requirements = {
        "kept, kept_lens and the tables must be int32": all(
            tensor.dtype == torch.int32 for tensor in (kept, kept_lens, old_table, new_table)
        ),
        "kept and the tables must be (batch, num_kv_heads or 1, n), contiguous along n": all(
            tensor.dim() == 3 and len(tensor) == batch and tensor.shape[1] in shared and tensor.stride(-1) == 1
            for tensor in (kept, old_table, new_table)
        ),
        "kept_lens must be (batch, num_kv_heads or 1)": kept_lens.dim() == 2
        and len(kept_lens) == batch
        and kept_lens.shape[1] in shared,
        "old and new must have the same fields": list(old) == list(new),
        "a field must have one dtype and row in old and new": all(
            old[name].dtype == new[name].dtype and old[name].shape[-1] == new[name].shape[-1] for name in old
        ),
        "a field must be (num_blocks, block_size, num_kv_heads or 1, n), contiguous along n": all(
            field.dim() == 4 and field.shape[2] in shared and field.stride(-1) == 1
            for field in (*old.values(), *new.values())
        ),
        "all fields must have one block size": len({field.shape[1] for field in (*old.values(), *new.values())}) == 1,
    }
    for requirement, met in requirements.items():
        if not met:
            raise ValueError(requirement)
    kept, old_table, new_table = (tensor.expand(-1, num_kv_heads, -1) for tensor in (kept, old_table, new_table))
    kept_lens = kept_lens.expand(-1, num_kv_heads)
    launches = []
    for name in old:
        source, target = (field.expand(-1, -1, num_kv_heads, -1) for field in as_words(old[name], new[name]))
        launches.append(
            Launch(
                kernel=compact_rows_kernel,
                grid=(batch, num_kv_heads, max(1, triton.cdiv(kept.shape[-1], config.block_n))),
                arguments=(
                    *(source, target, kept, kept_lens, old_table, new_table),
                    *source.stride()[:3],
                    *target.stride()[:3],
                    *kept.stride()[:2],
                    *kept_lens.stride(),
                    *old_table.stride()[:2],
                    *new_table.stride()[:2],
                ),
                options={
                    "ROW_WORDS": source.shape[-1],
                    "BLOCK_SIZE": source.shape[1],
                    "BLOCK_T": config.block_n,
                    "BLOCK_W": triton.next_power_of_2(source.shape[-1]),
                    "num_warps": config.num_warps,
                    "num_stages": config.num_stages,
                },
            )
        )
    return tuple(launches)
