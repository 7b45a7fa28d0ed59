"""Batches whose KV heads hold unequal numbers of tokens, in pages of one head each."""

import math
from dataclasses import dataclass, replace

import torch
import triton

from ...formats.native import Native
from ...formats.pages import Field, PageLayout
from ..batch import MAX_SPLITS, DecodeBatch, make_block_table

PROGRAMS_PER_MULTIPROCESSOR = 2


class WeightedNative(Native):
    """K and V in the model's dtype, and the natural logarithm of each entry's weight in fp32 (4 bytes).

    An entry of weight w stands for w tokens: its logit is q . k * scale + log w. Weights must be finite.
    """

    name = "native_log_weight"
    strategy = None

    def layout(self, *, num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype) -> PageLayout:
        plain = super().layout(num_kv_heads=num_kv_heads, head_dim=head_dim, block_size=block_size, dtype=dtype)
        return PageLayout((*plain.fields, Field("log_weight", torch.float32, (block_size, num_kv_heads, 1))))

    def encode(self, keys: torch.Tensor, values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Give every token weight one."""
        log_weight = torch.zeros(*keys.shape[:-1], 1, dtype=torch.float32, device=keys.device)
        return {**super().encode(keys, values), "log_weight": log_weight}


@dataclass(frozen=True)
class RaggedHeadsBatch(DecodeBatch):
    """One decode batch; `head_lens[b][h]` tokens are kept of request b by KV head h, and `context_lens` follows.

    Leave `context_lens` empty when constructing: it is the longest head of each request.
    """

    head_lens: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "context_lens", tuple(max(lens) for lens in self.head_lens))

    @property
    def num_kept(self) -> int:
        """Tokens held, summed over requests and heads."""
        return sum(map(sum, self.head_lens))

    @property
    def native_kv_bytes(self) -> int:
        """Bytes of K and V uncompressed."""
        return 2 * self.num_kept * self.head_dim * getattr(torch, self.dtype).itemsize


def make_head_block_table(case: RaggedHeadsBatch, seed: int, device: str) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Deal blocks out at random to every (request, KV head).

    Returns
    -------
    block_table : Tensor of int32, (batch, num_kv_heads, max_blocks)
    head_lens : Tensor of int32, (batch, num_kv_heads)
    unowned : int
        A block that belongs to nobody, which table entries beyond a head's blocks name.
    """
    flat = tuple(tokens for lens in case.head_lens for tokens in lens)
    # A head with pages of its own is a request of one head.
    table, lens, unowned = make_block_table(replace(case, head_lens=tuple((tokens,) for tokens in flat)), seed, device)
    batch = len(case.head_lens)
    return table.view(batch, case.num_kv_heads, -1), lens.view(batch, case.num_kv_heads), unowned


def choose_split(case: RaggedHeadsBatch, num_multiprocessors: int, block_n: int) -> int:
    """Choose the number of splits of the longest head, a power of two.

    Every split holds equally many tokens, whatever the head, so the work of a head is in proportion to what it keeps;
    the split is short enough that all heads together give two programs per multiprocessor.
    """
    longest = max(1, *case.context_lens)
    per_program = case.num_kept / (PROGRAMS_PER_MULTIPROCESSOR * num_multiprocessors)
    wanted = math.ceil(longest / max(block_n, per_program))
    return min(MAX_SPLITS, triton.next_power_of_2(wanted))
