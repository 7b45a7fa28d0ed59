"""Operations: what each moves and computes, one pure function each.

Facts about the model and the format, not about a device. Counts may be numbers or numpy arrays over batch sizes, so
that a whole table is priced at once.
"""

from __future__ import annotations

from kvsim.ops.merging import (
    cut_clusters,
    fold_tokens,
    merge_clusters,
    nearest_survivors,
    response_profiles,
    spread_values,
)
from kvsim.ops.reading import compress_blocks, page_bounds
from kvsim.ops.scoring import (
    accumulate_attention,
    average_chunks,
    compact,
    draw_scores,
    joint_scores,
    key_similarity,
    pool_scores,
    query_statistics,
    score_expected_attention,
    score_key_directions,
    score_keys,
    score_lag_relative,
    score_leverage,
    score_with_window,
    select_top_k,
)
from kvsim.ops.signals import (
    attend_again,
    candidate_entropy,
    layer_distance,
    most_attention,
    predict_scores,
    prompt_logits,
    read_again,
)
from kvsim.ops.storing import (
    channel_energy,
    expand_in_own_basis,
    fast_hadamard,
    gather_channels,
    merge_directions,
    project_rows,
    quantize,
    randomised_svd,
    score_channels,
)
from kvsim.ops.work import Component, Numeric, OpCall, Work, compression_calls

__all__ = [
    "Component",
    "Numeric",
    "OpCall",
    "Work",
    "accumulate_attention",
    "attend_again",
    "average_chunks",
    "candidate_entropy",
    "channel_energy",
    "compact",
    "compress_blocks",
    "compression_calls",
    "cut_clusters",
    "draw_scores",
    "expand_in_own_basis",
    "fast_hadamard",
    "fold_tokens",
    "gather_channels",
    "joint_scores",
    "key_similarity",
    "layer_distance",
    "merge_clusters",
    "merge_directions",
    "most_attention",
    "nearest_survivors",
    "page_bounds",
    "pool_scores",
    "predict_scores",
    "project_rows",
    "prompt_logits",
    "quantize",
    "query_statistics",
    "randomised_svd",
    "read_again",
    "response_profiles",
    "score_channels",
    "score_expected_attention",
    "score_key_directions",
    "score_keys",
    "score_lag_relative",
    "score_leverage",
    "score_with_window",
    "select_top_k",
    "spread_values",
]
