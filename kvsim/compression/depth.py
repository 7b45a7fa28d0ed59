"""Which entry of a list belongs to which layer of a model: a plan made for it, or one in relative depth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias, TypeVar

from kvsim.compression.base import LayerView
from kvsim.errors import InvalidSpec

Depth: TypeAlias = Literal["exact", "relative"]
EntryT = TypeVar("EntryT")


def entry_at(entries: Sequence[EntryT], depth: Depth, layer: LayerView) -> EntryT:
    """Give the entry of a layer.

    ``exact``: one entry per layer. ``relative``: entry j of J holds from depth j / J of the layers up to the next one,
    whatever their number; fewer layers than entries skip some.

    Raises
    ------
    InvalidSpec
        The plan is exact, and the model has another number of layers.
    """
    reason = refused_depth(len(entries), depth, layer.num_layers)
    if reason:
        raise InvalidSpec(reason)
    return entries[layer.index * len(entries) // layer.num_layers]


def refused_depth(count: int, depth: Depth, num_layers: int) -> str | None:
    """Why a plan of ``count`` entries does not fit a model of ``num_layers`` layers, or None."""
    if depth == "relative" or count == num_layers:
        return None
    return (
        f"the plan was made for a model of {count} layers, and this one has {num_layers}; make one for it "
        "(kvsim quality plan), or give the plan in relative depth (depth: relative), which nobody has calibrated here"
    )
