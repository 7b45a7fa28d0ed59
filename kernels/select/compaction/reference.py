"""Compaction in plain torch."""

from collections.abc import Mapping

import torch


def compact_reference(
    old: Mapping[str, torch.Tensor],
    new: Mapping[str, torch.Tensor],
    tables: Mapping[str, torch.Tensor],
    num_kv_heads: int,
) -> None:
    """Copy kept rows into `new`, in place; shapes as for `plan_compaction`."""
    kept, kept_lens, old_table, new_table = (tables[name] for name in ("kept", "kept_lens", "old_table", "new_table"))
    for b in range(len(kept)):
        for h in range(num_kv_heads):
            # Index 0 where heads share a table, list or pool.
            count = int(kept_lens[b, h % kept_lens.shape[1]])
            token = kept[b, h % kept.shape[1], :count].long()
            place = torch.arange(count, device=token.device)
            for name, target in new.items():
                source, size = old[name], target.shape[1]
                old_block = old_table[b, h % old_table.shape[1]].long()[token // size]
                new_block = new_table[b, h % new_table.shape[1]].long()[place // size]
                target[new_block, place % size, h % target.shape[2]] = source[
                    old_block, token % size, h % source.shape[2]
                ]
