"""Shapes and tilings of weighted atoms."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...contract import Comparison, CountedLoop, Traffic, Variant
from ...devices import num_multiprocessors
from ...launches import Launch, LaunchConfig
from .kernel import plan_weighted_atoms
from .reference import weighted_atoms_reference

PROGRAMS_PER_MULTIPROCESSOR = 2
MAX_PARTS = 32
FEATURE_STEP = 1 / 8
"""Features are drawn on this grid, so that distances are exact and ties real, whatever the order of sums."""


@dataclass(frozen=True)
class AtomsBatch:
    """Rows of tokens, one per (request or chunk of one, KV head), to be replaced by weighted atoms.

    Attributes
    ----------
    row_lens : tuple of tuple of int
        Tokens of each request in each KV head.
    num_atoms : int
        Atoms of each row; a row of fewer tokens gets as many atoms as tokens.
    num_rounds : int
        Rounds of choosing before the rest fills up.
    num_parts : int or None
        Programs per row; None: as many as fill the GPU.
    """

    name: str
    dtype: str
    head_dim: int
    num_features: int
    row_lens: tuple[tuple[int, ...], ...]
    num_atoms: int
    num_rounds: int = 4
    num_parts: int | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens, summed over rows."""
        return sum(map(sum, self.row_lens))


def _timing_cases() -> tuple[AtomsBatch, ...]:
    return tuple(
        AtomsBatch(f"{chunks}x{tokens}-to-{atoms}", "bfloat16", 128, 64, ((tokens,) * 8,) * chunks, atoms)
        for chunks, tokens, atoms in (
            (1, 4096, 128),
            (1, 32768, 128),
            (1, 32768, 256),
            (16, 2048, 128),
            (64, 2048, 128),
        )
    )


class WeightedAtoms(Variant):
    """Replace the tokens of each row by the means of balanced clusters.

    Inputs: ``features`` (batch, num_kv_heads, max_tokens, num_features) and ``centres`` (batch, num_kv_heads,
    num_atoms, num_features), in which distance is measured; ``key`` and ``value`` (batch, max_tokens, num_kv_heads,
    head_dim); ``row_lens`` int32 (batch, num_kv_heads). Results: ``assignment`` int32 (batch, num_kv_heads,
    max_tokens), -1 beyond a row's end; ``atom_key`` and ``atom_value`` (batch, num_kv_heads, num_atoms, head_dim) and
    ``log_weight`` fp32 (batch, num_kv_heads, num_atoms), zero for atoms that a short row leaves out.
    """

    operation = "select/weighted_atoms"
    cost_unit = "token_kv_head"
    uses_matrix_units = True
    correctness_cases = (
        AtomsBatch("one-token", "float16", 64, 16, ((1,),), 1, num_parts=1),
        AtomsBatch("ragged", "float16", 64, 16, ((150, 33), (64, 5)), 16, num_parts=2),
        AtomsBatch("ragged-bf16", "bfloat16", 128, 32, ((131, 0),), 24, num_parts=2),
        AtomsBatch("one-round", "float16", 80, 20, ((100,),), 7, num_rounds=1, num_parts=2),
        AtomsBatch("all-near-one-centre", "bfloat16", 64, 16, ((90, 90),), 5, num_rounds=3, num_parts=1),
    )
    timing_cases = _timing_cases()
    compile_case = AtomsBatch("llama-3-8b", "bfloat16", 128, 64, ((512,) * 8,), 128, num_parts=2)

    def make_inputs(self, case: AtomsBatch, *, seed: int, device: str) -> dict[str, Any]:
        """Draw features on a coarse grid; centres are the features of random tokens, or one token's, repeated."""
        generator = torch.Generator(device=device).manual_seed(seed)
        dtype = getattr(torch, case.dtype)
        row_lens = torch.tensor(case.row_lens, dtype=torch.int32, device=device)
        batch, num_kv_heads = row_lens.shape
        max_tokens = max(1, int(row_lens.max()))

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=device)

        features = normal(batch, num_kv_heads, max_tokens, case.num_features)
        features = (features / FEATURE_STEP).round() * FEATURE_STEP
        token = torch.randint(max_tokens, (case.num_atoms,), generator=generator, device=device)
        centres = features[:, :, token]
        if case.name == "all-near-one-centre":
            # Far from all tokens in one direction: everyone prefers the first, which they cannot all have.
            centres = centres[:, :, :1] - torch.arange(case.num_atoms, device=device)[:, None]
        beyond = torch.arange(max_tokens, device=device) >= row_lens[..., None]
        features[beyond] = float("nan")
        rows = {name: normal(batch, num_kv_heads, max_tokens, case.head_dim) for name in ("key", "value")}
        for row in rows.values():
            row[beyond] = float("nan")
        return {
            "features": features.to(dtype),
            "centres": centres.to(dtype).contiguous(),
            "row_lens": row_lens,
            **{name: row.transpose(1, 2).contiguous().to(dtype) for name, row in rows.items()},
        }

    def reference(self, case: AtomsBatch, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        return weighted_atoms_reference(inputs, case.num_rounds)

    def allocate(self, case: AtomsBatch, inputs: Mapping[str, Any], config: LaunchConfig) -> dict[str, torch.Tensor]:
        features, key = inputs["features"], inputs["key"]
        batch, num_kv_heads, max_tokens, _ = features.shape
        num_rows, num_atoms = batch * num_kv_heads, case.num_atoms
        wanted = math.ceil(PROGRAMS_PER_MULTIPROCESSOR * num_multiprocessors(features) / num_rows)
        num_parts = case.num_parts or max(1, min(wanted, math.ceil(max_tokens / config.block_n), MAX_PARTS))
        heads = (batch, num_kv_heads)

        def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=features.device)

        return {
            "assignment": empty(*heads, max_tokens),
            "choice": empty(*heads, max_tokens),
            "seats": empty(case.num_rounds, num_rows, num_atoms),
            "counts": empty(num_rows, num_parts, num_atoms),
            "waiting": empty(num_rows, num_parts),
            "sums": empty(*heads, num_parts, num_atoms, case.head_dim, dtype=torch.float32),
            "totals": empty(*heads, num_parts, num_atoms, dtype=torch.float32),
            "atom_key": empty(*heads, num_atoms, case.head_dim, dtype=key.dtype),
            "atom_value": empty(*heads, num_atoms, case.head_dim, dtype=key.dtype),
            "log_weight": empty(*heads, num_atoms, dtype=torch.float32),
        }

    def plan(
        self, case: AtomsBatch, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig
    ) -> tuple[Launch, ...]:
        return plan_weighted_atoms(inputs, buffers, case.num_rounds, config)

    def configs(self, target: str, case: AtomsBatch) -> tuple[LaunchConfig, ...]:
        if target.startswith("gfx"):
            return (LaunchConfig(32, num_warps=4, num_stages=2),)
        return (LaunchConfig(32, num_warps=4, num_stages=3), LaunchConfig(64, num_warps=8, num_stages=3))

    def counted_loop(self, case: AtomsBatch, config: LaunchConfig) -> CountedLoop:
        """Count the choosing of centres; every token passes it once a round."""
        return CountedLoop("propose_kernel", "matrix_loop", units=config.block_n / case.num_rounds)

    def traffic(self, case: AtomsBatch) -> Traffic:
        itemsize = getattr(torch, case.dtype).itemsize
        rows = sum(map(len, case.row_lens))
        atoms = rows * case.num_atoms
        feature_bytes = case.num_features * itemsize
        return Traffic(
            read_bytes=case.num_tokens * (feature_bytes + 2 * case.head_dim * itemsize) + atoms * feature_bytes,
            written_bytes=atoms * (2 * case.head_dim * itemsize + 4) + 4 * case.num_tokens,
            flops=2 * case.num_tokens * (case.num_atoms * case.num_features + case.head_dim),
            units=case.num_tokens,
        )

    def comparison(self, result: str) -> Comparison:
        return "exact" if result == "assignment" else "close"


VARIANTS = (WeightedAtoms(),)
