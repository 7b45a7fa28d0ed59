"""Variants of decode attention over the paper's Algorithms 1 and 2."""

from collections.abc import Mapping
from typing import Any

import torch

from ...formats.turboquant import TurboQuantPaper, gaussian_projection, random_signs
from ...launches import Launch, LaunchConfig
from ...rotation.dense.cases import dense_config
from ...rotation.dense.kernel import plan_dense_rotation
from ...rotation.fast_hadamard.cases import hadamard_config
from ...rotation.fast_hadamard.kernel import plan_fast_hadamard
from ..batch import DecodeAttention, DecodeBatch
from ..combine import plan_combine
from ..turboquant.cases import NIBBLE_CASES, PLANE_CASES, split_configs, with_splits
from .kernel import plan_turboquant_paper_split


class TurboQuantPaperDecodeAttention(DecodeAttention):
    """Rotate the query (and project it), attend in the rotated space, combine, rotate the output back."""

    split_kernel_name = "decode_attention_turboquant_paper_kernel"
    kv_format: TurboQuantPaper

    def __init__(self, kv_format: TurboQuantPaper) -> None:
        self.kv_format = kv_format
        only_nibbles = kv_format.key_bits == kv_format.bits == 4
        self.correctness_cases = NIBBLE_CASES if only_nibbles else PLANE_CASES

    def allocate(self, case: DecodeBatch, inputs: Mapping[str, Any], config: LaunchConfig) -> dict[str, torch.Tensor]:
        query = inputs["query"]
        buffers = super().allocate(with_splits(case, query, config), inputs, config)
        buffers["rotated_query"] = torch.empty_like(query, dtype=torch.float16)
        buffers["rotated_output"] = torch.empty_like(query, dtype=torch.float32)
        if self.kv_format.has_signs:
            buffers["projected_query"] = torch.empty_like(query, dtype=torch.float16)
        return buffers

    def plan(
        self, case: DecodeBatch, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig
    ) -> tuple[Launch, ...]:
        def rows(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.reshape(-1, case.head_dim)

        device = str(inputs["query"].device)
        signs = random_signs(case.head_dim, device)
        tiling = hadamard_config(len(rows(inputs["query"])))
        rotated = rows(buffers["rotated_query"])
        before = [plan_fast_hadamard(rows(inputs["query"]), rotated, tiling, signs_first=signs)]
        if self.kv_format.has_signs:
            projection = gaussian_projection(case.head_dim, device)
            before.append(
                plan_dense_rotation(rotated, projection, rows(buffers["projected_query"]), dense_config(len(rotated)))
            )
        rotated_output = buffers["rotated_output"]
        return (
            *before,
            plan_turboquant_paper_split(self.kv_format, case, inputs, buffers, config),
            plan_combine(buffers["partial"], buffers["lse"], rotated_output),
            plan_fast_hadamard(rows(rotated_output), rows(buffers["output"]), tiling, signs_last=signs),
        )

    def configs(self, target: str, case: DecodeBatch) -> tuple[LaunchConfig, ...]:
        tilings = split_configs(target, case, self.kv_format.bits)
        if target.startswith("gfx") or case.head_dim > 128:
            return tilings
        if self.kv_format.has_signs and self.kv_format.bits < 4:
            # Two queries and all sums leave no register free in tiles of 64, where some are spilled.
            return (LaunchConfig(16, num_warps=1, num_stages=2), *tilings)
        if target == "sm_120" and self.kv_format.bits == 4:
            # Tiles of 64 spill 8 bytes there.
            return (LaunchConfig(32, num_warps=1, num_stages=3), *tilings)
        return tilings


VARIANTS = tuple(
    TurboQuantPaperDecodeAttention(TurboQuantPaper(algorithm, bits))
    for algorithm in ("mse", "prod")
    for bits in (2, 3, 4)
)
