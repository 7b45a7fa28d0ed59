"""Shapes and tilings of InfoKV's three kernels: entropy once per token, distance once per layer, the mixture."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...contract import CountedLoop, Traffic, Variant
from ...decode_attention.batch import DecodeBatch, choose_num_splits
from ...devices import num_multiprocessors
from ...launches import Launch, LaunchConfig
from ..batch import RAGGED, TIMING_BATCHES, draw, element_bytes
from .entropy import plan_top_k_entropy
from .mix import DIMENSION_TILE, plan_mixed_scores, plan_weighted_entropy
from .reference import mixed_scores, top_k_entropy, weighted_entropy

CANDIDATES = 256
ALPHA = 0.9
TAU = 1.0


@dataclass(frozen=True)
class LogitRows:
    """Rows of next-token logits.

    Attributes
    ----------
    spread : {'normal', 'equal', 'clustered', 'masked'}
        Independent; all equal; the largest in few columns of a tile; most of them -inf.
    """

    name: str
    dtype: str
    rows: int
    vocabulary: int
    spread: str = "normal"


class TopKEntropy(Variant):
    """Entropy of the next-token distribution over its 256 largest logits."""

    operation = "score/infokv/entropy"
    cost_unit = "token"
    correctness_cases = (
        LogitRows("odd-vocabulary", "bfloat16", 3, 5003),
        LogitRows("fewer-than-256", "float16", 2, 100),
        LogitRows("all-equal", "float16", 2, 3000, "equal"),
        LogitRows("full-columns", "float32", 1, 11000, "clustered"),
        LogitRows("full-columns-with-ties", "bfloat16", 2, 17000, "clustered"),
        LogitRows("masked", "float32", 2, 4000, "masked"),
    )
    timing_cases = tuple(LogitRows(f"{rows}x128256", "bfloat16", rows, 128_256) for rows in (1, 64, 1024, 4096))
    compile_case = LogitRows("llama-3-8b", "bfloat16", 2, 128_256)

    def make_inputs(self, case: LogitRows, *, seed: int, device: str) -> dict[str, Any]:
        logits = 3.0 * draw((case.rows, case.vocabulary), dtype="float32", seed=seed, device=device)
        if case.spread == "equal":
            logits[:] = 1.5
        if case.spread == "clustered":
            column = torch.arange(case.vocabulary, device=device) % 2048
            logits += 40.0 * (column < CANDIDATES // 8)
        if case.spread == "masked":
            logits[:, CANDIDATES // 2 :] = -torch.inf
        return {"logits": logits.to(getattr(torch, case.dtype))}

    def reference(self, case: LogitRows, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        return {"entropy": top_k_entropy(inputs["logits"], CANDIDATES)}

    def allocate(self, case: LogitRows, inputs: Mapping[str, Any], config: LaunchConfig) -> dict[str, torch.Tensor]:
        return {"entropy": torch.empty(case.rows, device=inputs["logits"].device)}

    def plan(
        self, case: LogitRows, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig
    ) -> tuple[Launch, ...]:
        return plan_top_k_entropy(inputs["logits"], buffers["entropy"], CANDIDATES, config)

    def configs(self, target: str, case: LogitRows) -> tuple[LaunchConfig, ...]:
        stages = 1 if target.startswith("gfx") else 3
        return (LaunchConfig(2048, num_warps=8, num_stages=stages), LaunchConfig(1024, num_warps=4, num_stages=stages))

    def compute_dtype(self, case: LogitRows) -> str:
        return "float32"

    def counted_loop(self, case: LogitRows, config: LaunchConfig) -> CountedLoop:
        """Count the loop over the vocabulary; a row has vocabulary / block_n passes of it."""
        return CountedLoop("top_k_entropy_kernel", "largest_loop", units=config.block_n / case.vocabulary)

    def traffic(self, case: LogitRows) -> Traffic:
        return Traffic(
            read_bytes=case.rows * case.vocabulary * element_bytes(case),
            written_bytes=4 * case.rows,
            # A comparison per logit, and exp, product and sums per candidate.
            flops=case.rows * (case.vocabulary + 5 * CANDIDATES),
            units=case.rows,
        )


@dataclass(frozen=True)
class HiddenStates:
    """Hidden states of one layer and of the last, (tokens, width)."""

    name: str
    dtype: str
    tokens: int
    width: int


class WeightedEntropy(Variant):
    """Entropy times the layer's distance to the last one."""

    operation = "score/infokv/distance"
    cost_unit = "token"
    correctness_cases = (
        HiddenStates("one-token", "float16", 1, 64),
        HiddenStates("odd-width", "bfloat16", 13, 1100),
        HiddenStates("two-programs", "float16", 19, 512),
        HiddenStates("fp32", "float32", 5, 70),
    )
    timing_cases = tuple(
        HiddenStates(f"{tokens}x4096", "bfloat16", tokens, 4096) for tokens in (4096, 16384, 65536, 131072)
    )
    compile_case = HiddenStates("llama-3-8b", "bfloat16", 64, 4096)

    def make_inputs(self, case: HiddenStates, *, seed: int, device: str) -> dict[str, Any]:
        shape = (case.tokens, case.width)
        hidden = draw(shape, dtype=case.dtype, seed=seed, device=device)
        return {
            "hidden": hidden,
            "last_hidden": (hidden + draw(shape, dtype=case.dtype, seed=seed + 1, device=device)),
            "entropy": draw((case.tokens,), dtype="float32", seed=seed + 2, device=device).abs(),
        }

    def reference(self, case: HiddenStates, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        return {"weighted": weighted_entropy(inputs["hidden"], inputs["last_hidden"], inputs["entropy"], TAU)}

    def allocate(self, case: HiddenStates, inputs: Mapping[str, Any], config: LaunchConfig) -> dict[str, torch.Tensor]:
        return {"weighted": torch.empty(case.tokens, device=inputs["hidden"].device)}

    def plan(
        self, case: HiddenStates, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig
    ) -> tuple[Launch, ...]:
        hidden, last_hidden, entropy = inputs["hidden"], inputs["last_hidden"], inputs["entropy"]
        return plan_weighted_entropy(hidden, last_hidden, entropy, buffers["weighted"], TAU, config)

    def configs(self, target: str, case: HiddenStates) -> tuple[LaunchConfig, ...]:
        stages = 1 if target.startswith("gfx") else 3
        return (LaunchConfig(8, num_warps=4, num_stages=stages), LaunchConfig(4, num_warps=4, num_stages=stages))

    def compute_dtype(self, case: HiddenStates) -> str:
        return "float32"

    def counted_loop(self, case: HiddenStates, config: LaunchConfig) -> CountedLoop:
        """Count the loop over the width; a token has width / DIMENSION_TILE passes of it."""
        return CountedLoop(
            "weighted_entropy_kernel", "largest_loop", units=config.block_n * min(1.0, DIMENSION_TILE / case.width)
        )

    def traffic(self, case: HiddenStates) -> Traffic:
        return Traffic(
            read_bytes=2 * case.tokens * case.width * element_bytes(case) + 4 * case.tokens,
            written_bytes=4 * case.tokens,
            flops=6 * case.tokens * case.width,
            units=case.tokens,
        )


class MixedScores(Variant):
    """Softmax of the weighted entropies over the tokens, mixed into the attention scores of every KV head."""

    operation = "score/infokv/mix"
    cost_unit = "token_kv_head"
    correctness_cases = (
        DecodeBatch("one-token", "float32", 4, 2, 64, 16, (1,), 1),
        DecodeBatch("ragged", "float32", 8, 2, 64, 16, RAGGED, 2),
        DecodeBatch("two-tiles", "float32", 3, 3, 64, 16, (1500, 700), 4),
    )
    timing_cases = TIMING_BATCHES
    compile_case = DecodeBatch("llama-3-8b", "bfloat16", 32, 8, 128, 16, (4096,), 8)

    def make_inputs(self, case: DecodeBatch, *, seed: int, device: str) -> dict[str, Any]:
        generator = torch.Generator(device=device).manual_seed(seed)
        batch, longest = len(case.context_lens), max(case.context_lens)
        attention = torch.rand(batch, case.num_kv_heads, longest, generator=generator, device=device)
        weighted = 5.0 * torch.rand(batch, longest, generator=generator, device=device)
        context_lens = torch.tensor(case.context_lens, dtype=torch.int32, device=device)
        beyond = torch.arange(longest, device=device) >= context_lens[:, None]
        weighted[beyond] = torch.nan
        # As an attention score leaves it: -inf beyond the context, +inf for the newest token.
        attention.masked_fill_(beyond[:, None], -torch.inf)
        for b, tokens in enumerate(case.context_lens):
            attention[b, :, max(0, tokens - 1) : tokens] = torch.inf
        return {"attention": attention, "weighted": weighted, "context_lens": context_lens}

    def reference(self, case: DecodeBatch, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        return {"scores": mixed_scores(inputs["attention"], inputs["weighted"], case.context_lens, ALPHA)}

    def allocate(self, case: DecodeBatch, inputs: Mapping[str, Any], config: LaunchConfig) -> dict[str, torch.Tensor]:
        attention = inputs["attention"]
        num_splits = case.num_splits or choose_num_splits(
            len(attention), 1, attention.shape[2], num_multiprocessors(attention), config.block_n
        )
        return {
            "scores": torch.empty_like(attention),
            "lse": torch.empty(len(attention), num_splits, device=attention.device),
        }

    def plan(
        self, case: DecodeBatch, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig
    ) -> tuple[Launch, ...]:
        return plan_mixed_scores(
            *(inputs["attention"], inputs["weighted"], inputs["context_lens"]),
            *(buffers["lse"], buffers["scores"], ALPHA, config),
        )

    def configs(self, target: str, case: DecodeBatch) -> tuple[LaunchConfig, ...]:
        return (LaunchConfig(1024, num_warps=4, num_stages=1), LaunchConfig(512, num_warps=4, num_stages=1))

    def compute_dtype(self, case: DecodeBatch) -> str:
        return "float32"

    def counted_loop(self, case: DecodeBatch, config: LaunchConfig) -> CountedLoop:
        return CountedLoop("mixed_scores_kernel", "whole", units=config.block_n)

    def traffic(self, case: DecodeBatch) -> Traffic:
        tokens, padded = sum(case.context_lens), len(case.context_lens) * max(case.context_lens)
        return Traffic(
            read_bytes=4 * tokens * (case.num_kv_heads + 1),
            written_bytes=4 * padded * case.num_kv_heads,
            flops=3 * tokens + 4 * tokens * case.num_kv_heads,
            units=tokens * case.num_kv_heads,
        )


VARIANTS = (TopKEntropy(), WeightedEntropy(), MixedScores())
