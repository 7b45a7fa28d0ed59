"""Quality risk in three layers that are never mixed: theory, measured on tensors, published."""

from __future__ import annotations

from kvsim.quality.published import published_notes, published_quality

__all__ = ["published_notes", "published_quality"]
