"""Shapes and tilings of merging."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...contract import Comparison, CountedLoop, Traffic, Variant
from ...launches import Launch, LaunchConfig
from .kernel import EVICTED_PER_SURVIVOR, Rule, plan_merge
from .reference import merge_reference


@dataclass(frozen=True)
class MergeBatch:
    """Requests whose KV heads evict some of their tokens.

    Attributes
    ----------
    context_lens : tuple of int
        Tokens of each request.
    kept_lens : tuple of tuple of int
        Tokens that survive of each request in each KV head.
    threshold : float
        Least cosine at which a token is merged; below it, it is dropped.
    """

    name: str
    dtype: str
    num_kv_heads: int
    head_dim: int
    context_lens: tuple[int, ...]
    kept_lens: tuple[tuple[int, ...], ...]
    threshold: float = 0.0

    @property
    def num_pairs(self) -> int:
        """Pairs of an evicted token and a survivor, summed over requests and heads."""
        return sum(
            kept * (context - kept)
            for context, lens in zip(self.context_lens, self.kept_lens, strict=True)
            for kept in lens
        )


def _timing_cases() -> tuple[MergeBatch, ...]:
    return tuple(
        MergeBatch(f"{context}-keep-{kept}", "bfloat16", 8, 128, (context,), ((kept,) * 8,))
        for context, kept in ((4096, 1024), (16384, 2048), (32768, 2048), (32768, 8192), (131072, 4096))
    )


class Merge(Variant):
    """Fold evicted tokens into their nearest survivors.

    Inputs: ``key`` and ``value`` (batch, tokens, num_kv_heads, head_dim), as prefill leaves them; ``kept`` and
    ``evicted`` int32 (batch, num_kv_heads, n), positions, with ``kept_lens`` and ``evicted_lens`` int32 (batch,
    num_kv_heads); ``threshold``. Results: ``target`` int32, as ``evicted``: the place of the survivor in ``kept``, or
    -1; ``value`` (batch, num_kv_heads, max_kept, head_dim), dense, zero beyond the survivors; with rule ``counts``
    also ``key``, and ``log_weight`` fp32 (batch, num_kv_heads, max_kept).
    """

    cost_unit = "evicted_survivor_pair"
    uses_matrix_units = True
    correctness_cases = (
        MergeBatch("one-survivor", "float16", 1, 64, (2,), ((1,),)),
        MergeBatch("ragged", "float16", 2, 64, (90, 33), ((20, 70), (32, 1))),
        MergeBatch("ragged-bf16", "bfloat16", 2, 128, (101,), ((65, 64),)),
        MergeBatch("threshold", "float16", 2, 80, (80,), ((30, 11),), threshold=0.9),
        MergeBatch("nothing-evicted-or-kept", "bfloat16", 2, 64, (40,), ((40, 0),)),
    )
    timing_cases = _timing_cases()
    compile_case = MergeBatch("llama-3-8b", "bfloat16", 8, 128, (256,), ((128,) * 8,))

    def __init__(self, rule: Rule) -> None:
        self.rule: Rule = rule
        self.operation = f"select/merge_{rule}"

    def make_inputs(self, case: MergeBatch, *, seed: int, device: str) -> dict[str, Any]:
        """Draw survivors from N(0, 1), and evicted keys near one of them, so that rounding cannot change which."""
        cpu = torch.Generator().manual_seed(seed)
        generator = torch.Generator(device=device).manual_seed(seed + 1)
        shape = (len(case.context_lens), max(case.context_lens), case.num_kv_heads, case.head_dim)
        key, value = (torch.randn(shape, generator=generator, device=device) for _ in range(2))
        kept_lens = torch.tensor(case.kept_lens, dtype=torch.int32)
        evicted_lens = torch.tensor(case.context_lens, dtype=torch.int32)[:, None] - kept_lens
        kept, evicted = (
            torch.full((*lens.shape, max(1, int(lens.max()))), -1, dtype=torch.int32)
            for lens in (kept_lens, evicted_lens)
        )
        for b, h in torch.cartesian_prod(*map(torch.arange, kept_lens.shape)).tolist():
            context, count = case.context_lens[b], int(kept_lens[b, h])
            order = torch.randperm(context, generator=cpu)
            survivors, gone = order[:count].sort().values, order[count:].sort().values
            kept[b, h, :count], evicted[b, h, : context - count] = survivors.int(), gone.int()
            if count and len(gone):
                near = survivors[torch.randint(count, gone.shape, generator=cpu)].to(device)
                # Cosines of 0.99 and 0.8: on either side of the threshold that a case may set.
                spread = torch.tensor((0.1, 0.75))[torch.randint(2, (len(gone), 1), generator=cpu)].to(device)
                key[b, gone.to(device), h] = key[b, near, h] + spread * key[b, gone.to(device), h]
        dtype = getattr(torch, case.dtype)
        lists = {"kept": kept, "kept_lens": kept_lens, "evicted": evicted, "evicted_lens": evicted_lens}
        return {
            "key": key.to(dtype),
            "value": value.to(dtype),
            "threshold": case.threshold,
            **{name: tensor.to(device) for name, tensor in lists.items()},
        }

    def reference(self, case: MergeBatch, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        return merge_reference(inputs, self.rule)

    def allocate(self, case: MergeBatch, inputs: Mapping[str, Any], config: LaunchConfig) -> dict[str, torch.Tensor]:
        key, kept, evicted = inputs["key"], inputs["kept"], inputs["evicted"]
        batch, num_kv_heads, max_kept = kept.shape

        def empty(*shape: int) -> torch.Tensor:
            return key.new_empty((batch, num_kv_heads, *shape), dtype=torch.float32)

        return {
            "target": torch.empty_like(evicted),
            "weight": empty(evicted.shape[-1]),
            "inverse_norms": empty(max_kept),
            "sums": empty(1, max_kept, case.head_dim),
            "totals": empty(1, max_kept),
            "log_weight": empty(max_kept),
            "key": key.new_empty(batch, num_kv_heads, max_kept, case.head_dim),
            "value": key.new_empty(batch, num_kv_heads, max_kept, case.head_dim),
        }

    def plan(
        self, case: MergeBatch, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig
    ) -> tuple[Launch, ...]:
        return plan_merge(inputs, buffers, self.rule, config)

    def configs(self, target: str, case: MergeBatch) -> tuple[LaunchConfig, ...]:
        if target.startswith("gfx"):
            return (LaunchConfig(32, num_warps=4, num_stages=2),)
        return (LaunchConfig(64, num_warps=8, num_stages=3), LaunchConfig(32, num_warps=4, num_stages=3))

    def counted_loop(self, case: MergeBatch, config: LaunchConfig) -> CountedLoop:
        """Count the search for the nearest survivor; the sums are a product of the same size."""
        return CountedLoop("nearest_survivor_kernel", "matrix_loop", units=EVICTED_PER_SURVIVOR * config.block_n**2)

    def traffic(self, case: MergeBatch) -> Traffic:
        row_bytes = case.head_dim * getattr(torch, case.dtype).itemsize
        tokens = sum(case.context_lens) * case.num_kv_heads
        kept = sum(map(sum, case.kept_lens))
        results = 2 if self.rule == "counts" else 1
        return Traffic(
            read_bytes=tokens * (2 * row_bytes + 4),
            written_bytes=results * kept * row_bytes + 4 * (tokens - kept) + (4 * kept if results > 1 else 0),
            flops=2 * case.head_dim * (case.num_pairs + results * (tokens - kept)),
            units=case.num_pairs,
        )

    def comparison(self, result: str) -> Comparison:
        return "exact" if result == "target" else "close"


VARIANTS = (Merge("counts"), Merge("norms"))
