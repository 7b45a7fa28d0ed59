"""SnapKV: what the end of the prompt looks at is what the answer will need."""

from __future__ import annotations

from typing import ClassVar, Literal

from kvsim.compression.selection.full_attention import DEFAULT_COMPRESSION_RATIO
from kvsim.compression.selection.window_scored import WindowScoredSelection


class SnapKV(WindowScoredSelection):
    """The same budget in every layer, tokens chosen per KV head (arXiv 2404.14469)."""

    names: ClassVar = {"snapkv": {"compression_ratio": DEFAULT_COMPRESSION_RATIO}}
    aliases: ClassVar = {"snap_kv": "snapkv"}
    summaries: ClassVar = {
        "snapkv": "half of the prompt removed unless set, scored by its last 64 queries; SnapKV, arXiv 2404.14469"
    }

    kind: Literal["snapkv"] = "snapkv"
