"""Variants of decode attention over vLLM's TurboQuant presets."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ...contract import CountedLoop, Form
from ...devices import num_multiprocessors
from ...formats.turboquant import TurboQuant, hadamard
from ...launches import Launch, LaunchConfig
from ...rotation.dense.cases import dense_config
from ...rotation.dense.kernel import plan_dense_rotation
from ...rotation.fast_hadamard.cases import hadamard_config
from ...rotation.fast_hadamard.kernel import plan_fast_hadamard
from ..batch import CORRECTNESS_BATCHES, DecodeAttention, DecodeBatch, choose_num_splits
from .as_shipped import plan_as_shipped_split
from .kernel import plan_turboquant_split

_BY_NAME = {case.name: case for case in CORRECTNESS_BATCHES}
_SHARED = tuple(_BY_NAME[name] for name in ("multi-query-17-heads", "head-dim-256"))
_RAGGED = DecodeBatch("ragged-gqa", "float16", 8, 2, 128, 16, (1, 17, 0, 130), 2)
NIBBLE_CASES = (
    _BY_NAME["one-token"],
    replace(_RAGGED, name="ragged-gqa-bf16", dtype="bfloat16", head_dim=64),
    replace(_BY_NAME["all-empty"], context_lens=(0,)),
    *_SHARED,
)
"""Planes of 4 bits need a head_dim of at least 64."""
PLANE_CASES = (
    replace(_BY_NAME["one-token"], head_dim=128),
    _RAGGED,
    replace(_BY_NAME["more-splits-than-tiles"], num_splits=8),
    *_SHARED,
)
"""Planes of 1 and 2 bits need at least 128."""
SHIPPED_SPLITS = 32
"""vLLM's fixed number (``tq_max_kv_splits_for_cuda_graph``)."""
FP8_UNSUPPORTED = "type fp8e4nv not supported in this architecture"
"""What Triton says for sm_80."""


def with_splits(case: DecodeBatch, query: torch.Tensor, config: LaunchConfig) -> DecodeBatch:
    """Give a case whose splits fill the GPU with programs of few warps: eight warps per multiprocessor."""
    programs = num_multiprocessors(query) * max(1, 4 // config.num_warps)
    splits = case.num_splits or choose_num_splits(
        len(case.context_lens), case.num_kv_heads, max(case.context_lens), programs, config.block_n
    )
    return replace(case, num_splits=splits)


def split_configs(target: str, case: DecodeBatch, value_bits: int) -> tuple[LaunchConfig, ...]:
    """Give tilings of few warps: warps divide a slice of values, which has 32 elements, or 16 below 4 bits."""
    if case.head_dim > 128:
        return (LaunchConfig(32, num_warps=2, num_stages=2),)
    if target.startswith("gfx"):
        return (LaunchConfig(64, num_warps=1, num_stages=2), LaunchConfig(32, num_warps=2, num_stages=2))
    if value_bits < 4:
        return (LaunchConfig(64, num_warps=1, num_stages=3), LaunchConfig(32, num_warps=1, num_stages=3))
    return (LaunchConfig(64, num_warps=2, num_stages=3), LaunchConfig(128, num_warps=4, num_stages=3))


class TurboQuantDecodeAttention(DecodeAttention):
    """Our layout: planes of codes, norms, scales and zeros a tile ahead, query rotated by butterflies."""

    split_kernel_name = "decode_attention_turboquant_kernel"
    kv_format: TurboQuant

    def __init__(self, kv_format: TurboQuant) -> None:
        self.kv_format = kv_format
        three_bits = 3 in (kv_format.key_bits, kv_format.value_bits)
        self.correctness_cases = PLANE_CASES if three_bits else NIBBLE_CASES

    def allocate(self, case: DecodeBatch, inputs: Mapping[str, Any], config: LaunchConfig) -> dict[str, torch.Tensor]:
        buffers = super().allocate(with_splits(case, inputs["query"], config), inputs, config)
        if not self.kv_format.rotates_keys:
            return buffers
        query = inputs["query"]
        levels = torch.tensor(self.kv_format.codebook.levels, dtype=torch.float16, device=query.device)
        return {**buffers, "rotated_query": torch.empty_like(query, dtype=torch.float16), "levels": levels}

    def plan(
        self, case: DecodeBatch, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig
    ) -> tuple[Launch, ...]:
        launches = super().plan(case, inputs, buffers, config)
        if not self.kv_format.rotates_keys:
            return launches
        return (self.plan_rotation(case, inputs["query"], buffers["rotated_query"]), *launches)

    def plan_rotation(self, case: DecodeBatch, query: torch.Tensor, rotated: torch.Tensor) -> Launch:
        """Lay out the rotation of all query heads."""
        rows = query.reshape(-1, case.head_dim)
        return plan_fast_hadamard(rows, rotated.view(-1, case.head_dim), hadamard_config(len(rows)))

    def plan_split(
        self, case: DecodeBatch, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig
    ) -> Launch:
        return plan_turboquant_split(self.kv_format, case, inputs, buffers, config)

    def configs(self, target: str, case: DecodeBatch) -> tuple[LaunchConfig, ...]:
        return split_configs(target, case, self.kv_format.value_bits)

    def unsupported(self, target: str) -> str | None:
        return FP8_UNSUPPORTED if target == "sm_80" and not self.kv_format.rotates_keys else None


class TurboQuantAsShipped(TurboQuantDecodeAttention):
    """vLLM's merged kernel: a program per query head, products on CUDA cores, codes byte by byte."""

    form: Form = "as_shipped"
    split_kernel_name = "decode_attention_turboquant_as_shipped_kernel"
    uses_matrix_units = False

    def __init__(self, kv_format: TurboQuant) -> None:
        super().__init__(kv_format)
        self.correctness_cases = NIBBLE_CASES[:4]

    def allocate(self, case: DecodeBatch, inputs: Mapping[str, Any], config: LaunchConfig) -> dict[str, torch.Tensor]:
        buffers = super().allocate(replace(case, num_splits=case.num_splits or SHIPPED_SPLITS), inputs, config)
        if not self.kv_format.rotates_keys:
            return buffers
        rotated = torch.empty_like(inputs["query"], dtype=torch.float32)
        return {**buffers, "rotated_query": rotated, "levels": buffers["levels"].new_tensor(
            self.kv_format.codebook.levels, dtype=torch.float32
        )}  # fmt: skip

    def plan_rotation(self, case: DecodeBatch, query: torch.Tensor, rotated: torch.Tensor) -> Launch:
        matrix = hadamard(case.head_dim, str(query.device)).to(query.dtype)
        rows = query.reshape(-1, case.head_dim)
        scale = case.head_dim**-0.5
        return plan_dense_rotation(rows, matrix, rotated.view(-1, case.head_dim), dense_config(len(rows)), scale=scale)

    def plan_split(
        self, case: DecodeBatch, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig
    ) -> Launch:
        return plan_as_shipped_split(self.kv_format, case, inputs, buffers, config)

    def configs(self, target: str, case: DecodeBatch) -> tuple[LaunchConfig, ...]:
        return (LaunchConfig(16, num_warps=4, num_stages=2),)

    def counted_loop(self, case: DecodeBatch, config: LaunchConfig) -> CountedLoop:
        # A program sees one query head, so a token and KV head is done once per query head of the group.
        return CountedLoop(self.split_kernel_name, "largest_loop", units=config.block_n / case.group)


PRESETS = {
    "turboquant_k8v4": (8, 4),
    "turboquant_4bit_nc": (4, 4),
    "turboquant_k3v4_nc": (3, 4),
    "turboquant_3bit_nc": (3, 3),
}
"""Bits of keys and values."""

VARIANTS = (
    *(TurboQuantDecodeAttention(TurboQuant(preset, *bits)) for preset, bits in PRESETS.items()),
    *(
        TurboQuantDecodeAttention(TurboQuant(preset, *PRESETS[preset], codebook="lloyd_max", suffix="_lut"))
        for preset in ("turboquant_4bit_nc", "turboquant_k3v4_nc")
    ),
    *(
        TurboQuantAsShipped(TurboQuant(preset, *bits, codebook="lloyd_max", arrangement="inline"))
        for preset, bits in PRESETS.items()
    ),
)
