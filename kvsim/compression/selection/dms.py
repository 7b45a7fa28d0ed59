"""DMS: a model trained to say of each token, per head, whether it will be needed once it leaves a window."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import PositiveInt

from kvsim.compression.selection.delayed import DelayedEviction
from kvsim.compression.selector import Selector
from kvsim.errors import NotRunnable
from kvsim.specs.prior import Prior


class Dms(DelayedEviction):
    """Dynamic Memory Sparsification: learned eviction, carried out ``window_size`` tokens later (arXiv 2506.05345).

    Priced as a model trained so. The decision is read from a channel of the model's own queries, so it costs nothing
    beside the bookkeeping. Training aims at a compression ratio (4x or 8x); what comes out depends on the text.
    """

    names: ClassVar = {"dms-4x": {"compression_ratio": 0.75}, "dms-8x": {"compression_ratio": 0.875}}
    aliases: ClassVar = {"dms": "dms-8x"}
    summaries: ClassVar = {
        "dms-4x": "one of 4 tokens older than 512 stays; must be trained so; DMS, arXiv 2506.05345",
        "dms-8x": "one of 8 tokens older than 512 stays; must be trained so; DMS, arXiv 2506.05345",
    }
    freed_in: ClassVar = "NVIDIA/Model-Optimizer, experimental/dms (paged cache), and shisa-ai/FastDMS"

    kind: Literal["dms"] = "dms"
    window_size: PositiveInt = 512
    """Newest tokens that always stay (``dms_window_size`` of NVIDIA/Model-Optimizer)."""

    @property
    def expected_share(self) -> Prior | None:
        return _as_trained(self.compression_ratio) if self.evicts else None

    def selector(self) -> Selector:
        """Raise NotRunnable: no algorithm turns a plain model into one."""
        reason = "what to evict must be trained into the model (arXiv 2506.05345, 1,000 steps); only its cost is known"
        raise NotRunnable(self.kind, reason)


def _as_trained(compression_ratio: float) -> Prior:
    """The share that training aims at; no band of what texts make of it is published."""
    kept = 1 - compression_ratio
    source = "the ratio that training aims at, arXiv 2506.05345; no band is published"
    return Prior(value=kept, low=kept, high=kept, source=source)
