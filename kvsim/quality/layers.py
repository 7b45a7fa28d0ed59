"""Which layers of risk there are for a strategy: what formulas, tensors and publications can say of it."""

from __future__ import annotations

from functools import lru_cache

from kvsim.compression import Compression
from kvsim.errors import NotRunnable
from kvsim.quality.published import published_quality
from kvsim.specs.base import Spec


class RiskLayers(Spec):
    """What can be asked of a strategy's risk; the three are never mixed."""

    theory: bool
    """Formulas from the encoding's error and the attention of given tensors; they need its algorithm to run, and
    say nothing of merged entries."""
    tensors: bool
    """Its algorithm runs on KV tensors, so its error can be measured."""
    why_not_on_tensors: str | None = None
    published: tuple[str, ...] = ()
    """Classes of tasks with a published score."""
    interpolated: bool = False
    """Whether those scores all lie between two published ones."""


@lru_cache(maxsize=256)
def risk_layers(compression: Compression) -> RiskLayers:
    """Say which layers there are."""
    reason = _why_not_on_tensors(compression)
    quality = published_quality(compression)
    return RiskLayers(
        theory=reason is None and not compression.selection.merges,
        tensors=reason is None,
        why_not_on_tensors=reason,
        published=tuple(sorted({note.task_class for note in quality.notes})),
        interpolated=quality.status == "interpolated",
    )


def _why_not_on_tensors(compression: Compression) -> str | None:
    try:
        compression.selection.selector()
        compression.reduction.codec()
        compression.encoding.codec()
    except NotRunnable as error:
        return str(error)
    return None
