"""Decode batches over a latent cache, and what its kernels share: no Triton here."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton

from ...contract import CountedLoop, Traffic
from ...devices import num_multiprocessors
from ...formats.latent import ROPE_DIM
from ...launches import LaunchConfig
from ..batch import MIN_DOT_ROWS, DecodeAttention, DecodeBatch, choose_num_splits
from .e4m3 import NATIVE_CONVERSION

DEEPSEEK_SCALE = (128 + ROPE_DIM) ** -0.5
"""Factor of the scores: the head dimension before the key projection was absorbed into the query."""


@dataclass(frozen=True)
class LatentConfig(LaunchConfig):
    """A tiling with the query heads that one program serves.

    Attributes
    ----------
    block_h : int
        Query heads per program, a power of two of at least 16; the latent is read once per such block.
    e4m3_by_bits : bool
        Move the bits of e4m3 into fp16 by integer instructions.
    """

    block_h: int = MIN_DOT_ROWS
    e4m3_by_bits: bool = False


@dataclass(frozen=True)
class LatentBatch(DecodeBatch):
    """A decode batch of one KV head, whose ``head_dim`` is the width of the latent with its rotary part."""

    @property
    def latent_dim(self) -> int:
        """Compressed values: the value part of a latent."""
        return self.head_dim - ROPE_DIM

    @property
    def native_kv_bytes(self) -> int:
        """Bytes of the latents in 16 bits."""
        return 2 * sum(self.context_lens) * self.head_dim


def latent_batch(name: str, dtype: str, heads: int, context_lens: tuple[int, ...], **more: Any) -> LatentBatch:
    """Give a batch with the latent of DeepSeek-V3 unless `head_dim` says otherwise, in blocks of 64 tokens."""
    shape = {"head_dim": 576, "block_size": 64} | more
    return LatentBatch(name, dtype, heads, 1, context_lens=context_lens, **shape)


def _timing_batches() -> tuple[LatentBatch, ...]:
    """All 128 heads (attention data-parallel), and the 16 that each of eight tensor-parallel GPUs keeps."""
    large = ((128, 1024), (32, 4096), (128, 4096), (8, 32768), (32, 16384), (2, 131072))
    batches = [
        latent_batch(f"{batch}x{context}-{heads}", "bfloat16", heads, (context,) * batch)
        for batch, context in large
        for heads in (128, 16)
    ]
    small = [
        latent_batch(f"{batch}x{context}-128", "bfloat16", 128, (context,) * batch, role="small")
        for batch, context in ((1, 64), (4, 1024))
    ]
    ragged = latent_batch(
        "ragged-64", "bfloat16", 128, tuple(512 + 128 * index for index in range(64)), role="held_out"
    )
    return (*small, *batches, ragged)


COMPILE_LATENT_BATCH = latent_batch("deepseek-v3", "bfloat16", 128, (64, 128), num_splits=8)
TIMING_LATENT_BATCHES = _timing_batches()


class LatentDecodeAttention(DecodeAttention):
    """What decode attention over latents shares.

    Inputs are those of `DecodeAttention`; ``query`` is absorbed: (batch, num_query_heads, latent_dim + 64), and the
    output is (batch, num_query_heads, latent_dim), before the value projection of each head. Where fp16 is multiplied,
    ``query_fp16`` is the query in fp16, as the product that absorbs the key projection can write it.
    """

    multiplies_fp16: bool = False

    compile_case = COMPILE_LATENT_BATCH
    timing_cases: tuple[Any, ...] = TIMING_LATENT_BATCHES

    def make_inputs(self, case: LatentBatch, *, seed: int, device: str) -> dict[str, Any]:
        inputs = super().make_inputs(case, seed=seed, device=device) | {"scale": DEEPSEEK_SCALE}
        if self.multiplies_fp16:
            inputs["query_fp16"] = inputs["query"].half()
        return inputs

    def value_dim(self, case: LatentBatch) -> int:
        return case.latent_dim

    def allocate(self, case: LatentBatch, inputs: Mapping[str, Any], config: LatentConfig) -> dict[str, torch.Tensor]:
        query = inputs["query"]
        batch, heads = query.shape[:2]
        num_splits = case.num_splits or choose_num_splits(
            batch, triton.cdiv(heads, config.block_h), self.max_tokens(case), num_multiprocessors(query), config.block_n
        )
        return {
            "output": query.new_empty(batch, heads, case.latent_dim),
            "partial": query.new_empty((batch, heads, num_splits, case.latent_dim), dtype=torch.float32),
            "lse": query.new_empty((batch, heads, num_splits), dtype=torch.float32),
        }

    def max_tokens(self, case: LatentBatch) -> int:
        """Most tokens that a request attends to."""
        return max(case.context_lens)

    def attended_tokens(self, case: LatentBatch) -> int:
        """Tokens that all requests together attend to."""
        return sum(case.context_lens)

    def counted_loop(self, case: LatentBatch, config: LatentConfig) -> CountedLoop:
        # A token's latent is one KV head, and as many programs as there are blocks of query heads work on it.
        blocks = triton.cdiv(case.num_query_heads, config.block_h)
        return CountedLoop(self.split_kernel_name, "matrix_loop", units=config.block_n / blocks)

    def traffic(self, case: LatentBatch) -> Traffic:
        dtype = getattr(torch, case.dtype)
        layout = self.kv_format.layout(num_kv_heads=1, head_dim=case.head_dim, block_size=case.block_size, dtype=dtype)
        tokens = self.attended_tokens(case)
        rows = len(case.context_lens) * case.num_query_heads
        return Traffic(
            read_bytes=tokens * layout.page_bytes // case.block_size + rows * case.head_dim * dtype.itemsize,
            written_bytes=rows * case.latent_dim * dtype.itemsize,
            flops=2 * case.num_query_heads * tokens * (case.head_dim + case.latent_dim),
            units=tokens,
        )


def block_of_heads(case: LatentBatch, largest: int) -> int:
    """Query heads per program: the case's, padded to a power of two, within 16 and `largest`."""
    return min(largest, max(MIN_DOT_ROWS, triton.next_power_of_2(case.num_query_heads)))


def bf16_configs(target: str, case: LatentBatch) -> tuple[LatentConfig, ...]:
    """Tilings over latents in 16 bits.

    A tile of 32 latents is 36 KiB, so sm_120 and gfx942 keep 16 heads per program. Of the others, sm_90 has room for 64
    heads, which run on its asynchronous matrix instructions; on sm_100 those (tcgen05) would need more shared memory
    than there is.
    """
    if target.startswith("gfx"):
        return (LatentConfig(32, num_warps=4, num_stages=2, block_h=MIN_DOT_ROWS),)
    block_h = MIN_DOT_ROWS if target == "sm_120" else block_of_heads(case, 64 if target == "sm_90" else 32)
    if block_h == 64:
        return (LatentConfig(32, num_warps=8, num_stages=3, block_h=block_h),)
    if block_h == 32:
        return (LatentConfig(64, num_warps=8, num_stages=2, block_h=block_h),)
    return tuple(LatentConfig(32, num_warps=4, num_stages=stages, block_h=block_h) for stages in (3, 2))


def converts_e4m3(target: str) -> bool:
    """Whether a target has an instruction for e4m3 to fp16."""
    return target in NATIVE_CONVERSION


def fp16_query(inputs: Mapping[str, Any]) -> torch.Tensor:
    """Give the query for products with e4m3 values; raise ValueError where it is missing or does not fit."""
    query = inputs.get("query_fp16")
    if query is None or query.dtype != torch.float16 or query.shape != inputs["query"].shape or query.stride(-1) != 1:
        raise ValueError("query_fp16 must be the query in fp16, contiguous along head_dim")
    return query


def check_latent_inputs(case: LatentBatch, inputs: Mapping[str, Any], config: LatentConfig) -> None:
    """Raise ValueError, naming the first rule broken, unless a latent kernel can run the case."""
    query, latent = inputs["query"], inputs["fields"]["latent"]
    requirements = {
        "block_h must be a power of two of at least 16": config.block_h >= MIN_DOT_ROWS
        and config.block_h & (config.block_h - 1) == 0,
        "latent_dim must be a power of two of at least 16": case.latent_dim >= MIN_DOT_ROWS
        and case.latent_dim & (case.latent_dim - 1) == 0,
        "queries must have 16 bits per value": query.dtype.itemsize == 2,
        "latent must be (num_blocks, block_size, 1, width), contiguous along the width": latent.ndim == 4
        and latent.shape[1:3] == (case.block_size, 1)
        and latent.stride(-1) == 1,
    }
    for requirement, met in requirements.items():
        if not met:
            raise ValueError(requirement)
