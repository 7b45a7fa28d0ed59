"""Decode batches that attend to chosen tokens of a latent cache."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..batch import make_block_table
from ..mla.batch import LatentBatch, LatentDecodeAttention
from .reference import sparse_latent_attention_reference

NO_TOKEN = -1


@dataclass(frozen=True)
class TopkBatch(LatentBatch):
    """A decode batch of latents, of which each request attends to `topk` or, if it has fewer, to all.

    Attributes
    ----------
    topk : int
        Slots per request; those without a token hold -1 and lie anywhere in the list.
    """

    topk: int = 2048


def topk_batch(name: str, dtype: str, heads: int, context_lens: tuple[int, ...], **more: Any) -> TopkBatch:
    """Give a batch with the latent of DeepSeek-V3 unless `head_dim` says otherwise, in blocks of 64 tokens."""
    shape = {"head_dim": 576, "block_size": 64} | more
    return TopkBatch(name, dtype, heads, 1, context_lens=context_lens, **shape)


def _timing_batches() -> tuple[TopkBatch, ...]:
    """The indexer's 2,048 tokens out of contexts up to 128k; all 128 heads, and 16 of eight tensor-parallel GPUs."""
    batches = [
        topk_batch(f"{batch}x{context}-{heads}", "bfloat16", heads, (context,) * batch)
        for batch, context in ((1, 131072), (8, 32768), (32, 16384), (64, 32768), (128, 8192))
        for heads in (128, 16)
    ]
    short = topk_batch("32x1024-128", "bfloat16", 128, (1024,) * 32, role="held_out")
    small = topk_batch("1x2048-128", "bfloat16", 128, (2048,), role="small")
    return (small, *batches, short)


CORRECTNESS_TOPK_BATCHES = (
    topk_batch("one-token", "float16", 16, (1,), topk=1, num_splits=1),
    topk_batch("fewer-than-topk-bf16", "bfloat16", 20, (5, 0, 70), block_size=16, topk=65, num_splits=2),
    topk_batch("deepseek-fp16", "float16", 32, (100, 90), topk=67, num_splits=2),
    topk_batch("more-splits-than-tiles", "bfloat16", 3, (40,), block_size=48, topk=33, num_splits=8),
    topk_batch("all-empty", "bfloat16", 3, (0, 0), topk=16, num_splits=2),
)
COMPILE_TOPK_BATCH = topk_batch("deepseek-v3.2", "bfloat16", 128, (64, 128), topk=2048, num_splits=8)
TIMING_TOPK_BATCHES = _timing_batches()


class TopkDecodeAttention(LatentDecodeAttention):
    """What decode attention over chosen tokens shares.

    Inputs are those of `LatentDecodeAttention`, and ``slots``, int32 (batch, topk): block id times block size plus row
    of each chosen token, -1 for none. The block table is not read.
    """

    operation = "decode_attention/topk"
    correctness_cases: tuple[Any, ...] = CORRECTNESS_TOPK_BATCHES
    timing_cases: tuple[Any, ...] = TIMING_TOPK_BATCHES
    compile_case: Any = COMPILE_TOPK_BATCH

    def make_inputs(self, case: TopkBatch, *, seed: int, device: str) -> dict[str, Any]:
        return super().make_inputs(case, seed=seed, device=device) | {"slots": choose_slots(case, seed).to(device)}

    def reference(self, case: TopkBatch, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        keys, values = self.kv_format.decode(inputs["fields"], case.head_dim)
        shared = (inputs["slots"], inputs["scale"])
        return {"output": sparse_latent_attention_reference(inputs["query"], keys, values, *shared)}

    def max_tokens(self, case: TopkBatch) -> int:
        return case.topk

    def attended_tokens(self, case: TopkBatch) -> int:
        return sum(min(tokens, case.topk) for tokens in case.context_lens)


def choose_slots(case: TopkBatch, seed: int) -> torch.Tensor:
    """Choose tokens of each request at random, and put them and the -1 into random places."""
    block_table, _, _ = make_block_table(case, seed, "cpu")
    generator = torch.Generator().manual_seed(seed + 3)
    slots = torch.full((len(case.context_lens), case.topk), NO_TOKEN, dtype=torch.int32)
    for b, tokens in enumerate(case.context_lens):
        chosen = torch.randperm(tokens, generator=generator)[: case.topk]
        places = torch.randperm(case.topk, generator=generator)[: len(chosen)]
        rows = block_table[b, chosen // case.block_size] * case.block_size + chosen % case.block_size
        slots[b, places] = rows.int()
    return slots
