"""Projection of new tokens, expansion of outputs, and projection into slots of the KV pool."""

from collections.abc import Mapping
from typing import Any

import torch

from ..append.batch import Append, AppendBatch, check_append_inputs
from ..contract import Comparison, CountedLoop, Traffic, Variant
from ..formats.low_rank import LowRank
from ..launches import Launch
from .batch import ProjectionBatch, ProjectionConfig, tiling
from .kernel import plan_expand, plan_project
from .reference import expand_reference, project_reference

ROUNDED_BELOW = 64
"""Bytes below this make floats of every width between 0 and 2: old page contents that do not hide an error."""


class Projection(Variant):
    """What projection and expansion share: a matrix product per group of heads."""

    form = "best"
    uses_matrix_units = True
    kv_format = LowRank()
    correctness_cases = (
        ProjectionBatch("one-row", "float16", 1, 4, 32, 16),
        ProjectionBatch("odd-bf16", "bfloat16", 37, 8, 64, 24),
        ProjectionBatch("one-head-group", "float16", 19, 1, 128, 7),
        ProjectionBatch("head-dim-80", "bfloat16", 5, 2, 80, 4),
    )
    compile_case = ProjectionBatch("llama-3-8b", "bfloat16", 64, 8, 128, 32)

    def basis(self, case: ProjectionBatch, device: str) -> torch.Tensor:
        """Give the basis of K; that of V has the same shape."""
        basis = self.kv_format.key_basis(case.num_kv_heads, case.head_dim)
        return basis.to(device, getattr(torch, case.dtype))

    def counted_loop(self, case: ProjectionBatch, config: ProjectionConfig) -> CountedLoop:
        # One pass multiplies a tile of rows by a block of the inputs and a block of the outputs of its group.
        num_groups = case.num_kv_heads // self.kv_format.heads(case.num_kv_heads)
        in_features, out_features, columns = self.features(case)
        share = config.block_in * config.block_out / (in_features * out_features) / columns
        return CountedLoop("low_rank_projection_kernel", "matrix_loop", config.block_n * share * num_groups)

    def features(self, case: ProjectionBatch) -> tuple[int, int, int]:
        """Input and output features of a product, and products per group and row."""
        raise NotImplementedError


class Project(Projection):
    """Coordinates of new tokens, K or V; Palu folds this into the weights of the K and V projections instead."""

    operation = "low_rank_projection/project"
    cost_unit = "token_group"
    timing_cases = tuple(
        ProjectionBatch(f"llama-3-8b-{tokens}", "bfloat16", tokens, 8, 128, 32) for tokens in (1, 16, 128, 2048, 16384)
    )

    def features(self, case: ProjectionBatch) -> tuple[int, int, int]:
        heads = self.kv_format.heads(case.num_kv_heads)
        return heads * case.head_dim, self.kv_format.rank(case.num_kv_heads, case.head_dim), 1

    def counted_loop(self, case: ProjectionBatch, config: ProjectionConfig) -> CountedLoop:
        in_features, out_features, _ = self.features(case)
        share = config.block_in * config.block_out / (in_features * out_features)
        return CountedLoop("low_rank_projection_kernel", "matrix_loop", config.block_n * share)

    def make_inputs(self, case: ProjectionBatch, *, seed: int, device: str) -> dict[str, Any]:
        generator = torch.Generator(device=device).manual_seed(seed)
        basis = self.basis(case, device)
        rows = torch.randn(case.num_tokens, len(basis), basis.shape[-1], generator=generator, device=device)
        return {"rows": rows.to(basis.dtype), "basis": basis}

    def reference(self, case: ProjectionBatch, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        return {"coordinates": project_reference(inputs["rows"], inputs["basis"])}

    def allocate(
        self, case: ProjectionBatch, inputs: Mapping[str, Any], config: ProjectionConfig
    ) -> dict[str, torch.Tensor]:
        rows, basis = inputs["rows"], inputs["basis"]
        return {"coordinates": rows.new_empty(*rows.shape[:2], basis.shape[1])}

    def plan(
        self,
        case: ProjectionBatch,
        inputs: Mapping[str, Any],
        buffers: Mapping[str, torch.Tensor],
        config: ProjectionConfig,
    ) -> tuple[Launch, ...]:
        return (plan_project(inputs["rows"], inputs["basis"], buffers["coordinates"], config),)

    def configs(self, target: str, case: ProjectionBatch) -> tuple[ProjectionConfig, ...]:
        return (tiling(target, case.num_tokens),)

    def traffic(self, case: ProjectionBatch) -> Traffic:
        in_features, out_features, _ = self.features(case)
        units = case.num_tokens * case.num_kv_heads // self.kv_format.heads(case.num_kv_heads)
        basis_values = units // case.num_tokens * in_features * out_features
        element_bytes = getattr(torch, case.dtype).itemsize
        return Traffic(
            read_bytes=(units * in_features + basis_values) * element_bytes,
            written_bytes=units * out_features * element_bytes,
            flops=2 * units * in_features * out_features,
            units=units,
        )


class Expand(Projection):
    """Values of each query head from its weighted sum of coordinates, once per step."""

    operation = "low_rank_projection/expand"
    cost_unit = "query_head"
    timing_cases = tuple(
        ProjectionBatch(f"llama-3-8b-{batch}", "bfloat16", batch, 8, 128, 32) for batch in (1, 8, 64, 256)
    )

    def features(self, case: ProjectionBatch) -> tuple[int, int, int]:
        return self.kv_format.rank(case.num_kv_heads, case.head_dim), case.head_dim, 1

    def counted_loop(self, case: ProjectionBatch, config: ProjectionConfig) -> CountedLoop:
        rank, head_dim, _ = self.features(case)
        share = config.block_in * config.block_out / (rank * head_dim)
        return CountedLoop("low_rank_projection_kernel", "matrix_loop", config.block_n * share)

    def make_inputs(self, case: ProjectionBatch, *, seed: int, device: str) -> dict[str, Any]:
        generator = torch.Generator(device=device).manual_seed(seed)
        basis = self.basis(case, device)
        shape = (case.num_tokens, case.num_query_heads, basis.shape[1])
        return {"coordinates": torch.randn(shape, generator=generator, device=device).to(basis.dtype), "basis": basis}

    def reference(self, case: ProjectionBatch, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        return {"output": expand_reference(inputs["coordinates"], inputs["basis"], case.num_kv_heads)}

    def allocate(
        self, case: ProjectionBatch, inputs: Mapping[str, Any], config: ProjectionConfig
    ) -> dict[str, torch.Tensor]:
        return {"output": inputs["coordinates"].new_empty(case.num_tokens, case.num_query_heads, case.head_dim)}

    def plan(
        self,
        case: ProjectionBatch,
        inputs: Mapping[str, Any],
        buffers: Mapping[str, torch.Tensor],
        config: ProjectionConfig,
    ) -> tuple[Launch, ...]:
        return (plan_expand(inputs["coordinates"], inputs["basis"], buffers["output"], config, case.num_kv_heads),)

    def configs(self, target: str, case: ProjectionBatch) -> tuple[ProjectionConfig, ...]:
        return (tiling(target, case.num_tokens * case.group),)

    def traffic(self, case: ProjectionBatch) -> Traffic:
        rank, head_dim, _ = self.features(case)
        units = case.num_tokens * case.num_query_heads
        element_bytes = getattr(torch, case.dtype).itemsize
        return Traffic(
            read_bytes=(units * rank + case.num_kv_heads * rank * head_dim) * element_bytes,
            written_bytes=units * head_dim * element_bytes,
            flops=2 * units * rank * head_dim,
            units=units,
        )


class LowRankAppend(Append):
    """Project new K (before RoPE) and V of each group of heads straight into their slots, one launch each."""

    kv_format = LowRank()
    uses_matrix_units = True
    correctness_cases = (
        AppendBatch("one-token", "float16", 4, 32, 16, 1),
        AppendBatch("odd-bf16", "bfloat16", 8, 64, 16, 37, num_padding=2),
        AppendBatch("one-head", "float16", 1, 128, 48, 19),
        AppendBatch("all-padding", "float16", 2, 64, 16, 3, num_padding=3),
    )

    def make_inputs(self, case: AppendBatch, *, seed: int, device: str) -> dict[str, Any]:
        inputs = super().make_inputs(case, seed=seed, device=device)
        bases = {
            name: basis.to(inputs["key"])
            for name, basis in (
                ("key_basis", self.kv_format.key_basis(case.num_kv_heads, case.head_dim)),
                ("value_basis", self.kv_format.value_basis(case.num_kv_heads, case.head_dim)),
            )
        }
        return inputs | bases | {"pages": inputs["pages"] % ROUNDED_BELOW}

    def plan(
        self,
        case: AppendBatch,
        inputs: Mapping[str, Any],
        buffers: Mapping[str, torch.Tensor],
        config: ProjectionConfig,
    ) -> tuple[Launch, ...]:
        check_append_inputs(case, inputs)
        num_groups = case.num_kv_heads // self.kv_format.heads(case.num_kv_heads)
        return tuple(
            plan_project(
                inputs[name].view(case.num_tokens, num_groups, -1),
                inputs[f"{name}_basis"],
                buffers[name],
                config,
                inputs["slot_mapping"],
            )
            for name in ("key", "value")
        )

    def configs(self, target: str, case: AppendBatch) -> tuple[ProjectionConfig, ...]:
        return (tiling(target, case.num_tokens),)

    def comparison(self, result: str) -> Comparison:
        """By value: the fields hold rounded sums, whose order is the kernel's."""
        return "close"

    def compute_dtype(self, case: AppendBatch) -> str:
        return case.dtype

    def counted_loop(self, case: AppendBatch, config: ProjectionConfig) -> CountedLoop:
        # Two launches per token, one each for K and V; a token and KV head is its share of a group in both.
        heads = self.kv_format.heads(case.num_kv_heads)
        rank = self.kv_format.rank(case.num_kv_heads, case.head_dim)
        share = config.block_in * config.block_out / (heads * case.head_dim * rank)
        return CountedLoop("low_rank_projection_kernel", "matrix_loop", config.block_n * share * heads / 2)

    def traffic(self, case: AppendBatch) -> Traffic:
        stored = super().traffic(case)
        tokens = case.num_tokens - case.num_padding
        rank = self.kv_format.rank(case.num_kv_heads, case.head_dim)
        values = 2 * case.num_kv_heads * case.head_dim * rank
        return Traffic(
            read_bytes=stored.read_bytes + values * getattr(torch, case.dtype).itemsize,
            written_bytes=stored.written_bytes,
            flops=2 * tokens * values,
            units=stored.units,
        )


VARIANTS = (Project(), Expand(), LowRankAppend())
