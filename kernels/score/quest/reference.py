"""Quest's page criticality and page bounds in plain torch."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...formats.page_bounds import page_bounds
from ..reference import pad_scores


def used_rows(block_table: torch.Tensor, context_lens: Sequence[int], num_blocks: int, block_size: int) -> torch.Tensor:
    """Say which rows of a pool hold a token, bool, (num_blocks, block_size)."""
    used = torch.zeros(num_blocks, block_size, dtype=torch.bool, device=block_table.device)
    for b, tokens in enumerate(context_lens):
        blocks = block_table[b, : -(-tokens // block_size)].long()
        position = torch.arange(len(blocks) * block_size, device=used.device).view(-1, block_size)
        used[blocks] = position < tokens
    return used


def quest_scores(inputs: Mapping[str, Any], page_size: int, length: int) -> torch.Tensor:
    """Bound every logit of a page from above; give the group's largest bound, +inf for the newest page."""
    rows = []
    for b, query in enumerate(inputs["query"]):
        pages = -(-int(inputs["context_lens"][b]) // page_size)
        blocks = inputs["block_table"][b, :pages].long()
        lowest, highest = (inputs["bounds"][name][blocks].float() for name in ("key_min", "key_max"))
        grouped = query.float().view(lowest.shape[1], 1, -1, query.shape[-1])
        # Products are shaped (num_kv_heads, pages, group, head_dim).
        products = [grouped * bound.transpose(0, 1)[:, :, None] for bound in (lowest, highest)]
        score = torch.maximum(*products).sum(-1).amax(-1) * inputs["scale"]
        if pages:
            score[:, -1] = math.inf
        rows.append(score)
    return pad_scores(rows, length)


def updated_bounds(inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Compute the bounds of all pages that hold a token anew; other pages' bounds stay as they are."""
    keys = inputs["fields"]["key"]
    used = used_rows(inputs["block_table"], inputs["context_lens"].tolist(), *keys.shape[:2])
    fresh = page_bounds(keys, used)
    held = used.any(1)[:, None, None]
    return {name: torch.where(held, fresh[name], inputs["bounds"][name]) for name in fresh}
