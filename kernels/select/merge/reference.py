"""Merging in plain torch."""

from collections.abc import Mapping
from typing import Any

import torch

from ..group_means import NO_GROUP

_LEAST_NORM = 1e-6


def merge_reference(inputs: Mapping[str, Any], rule: str) -> dict[str, torch.Tensor]:
    """Merge each evicted token into its nearest survivor, in fp32; inputs and results as for `Merge`.

    Rule ``counts``: keys and values of a survivor become the mean over it and what merged into it, and its log-weight
    the logarithm of their number. Rule ``norms``: only values are averaged, the survivor's with weight 1 and an
    evicted one's with max(cosine, 0) |v_e| / (|v_e| + |v_s| + 1e-6).
    """
    key, value, kept, evicted = (inputs[name] for name in ("key", "value", "kept", "evicted"))
    batch, num_kv_heads = kept.shape[:2]
    device = key.device
    target = torch.full(evicted.shape, NO_GROUP, dtype=torch.int32, device=device)
    means = {name: torch.zeros(*kept.shape, key.shape[-1], device=device) for name in ("key", "value")}
    log_weight = torch.zeros(kept.shape, device=device)
    for b in range(batch):
        for h in range(num_kv_heads):
            kept_len, evicted_len = int(inputs["kept_lens"][b, h]), int(inputs["evicted_lens"][b, h])
            if not kept_len:
                continue
            survivors, gone = kept[b, h, :kept_len].long(), evicted[b, h, :evicted_len].long()
            keys, values = key[b, :, h].float(), value[b, :, h].float()
            unit = keys / keys.norm(dim=-1, keepdim=True).clamp(min=_LEAST_NORM)
            # The first of equals: argmax of torch promises no order.
            cosine = unit[gone] @ unit[survivors].T
            top = cosine.amax(-1)
            nearest = (cosine == top[:, None]).int().argmax(-1)
            merged = top >= inputs["threshold"]
            target[b, h, :evicted_len] = torch.where(merged, nearest, NO_GROUP).int()
            weight = merged.float()
            if rule == "norms":
                norm, target_norm = values[gone].norm(dim=-1), values[survivors][nearest].norm(dim=-1)
                weight *= top.clamp(min=0) * norm / (norm + target_norm + _LEAST_NORM)
            total = torch.ones(kept_len, device=device).index_add(0, nearest, weight)
            log_weight[b, h, :kept_len] = total.log()
            for name, rows in (("key", keys), ("value", values)):
                summed = rows[survivors].index_add(0, nearest, weight[:, None] * rows[gone])
                means[name][b, h, :kept_len] = summed / total[:, None]
    if rule == "norms":
        return {"target": target, "value": means["value"]}
    return {"target": target, **means, "log_weight": log_weight}
