"""Request classes: which request is of which kind, and what that changes about it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvsim.requests import IntArray
from kvsim.specs.workload import RequestClass
from kvsim.workloads.lengths import draw_lengths
from kvsim.workloads.streams import stream


def draw_classes(classes: Sequence[RequestClass], count: int, seed: int) -> IntArray | None:
    """Index of each item's class, shape (count,), by the classes' shares; None without classes."""
    if not classes:
        return None
    shares = np.cumsum([one.share for one in classes])
    drawn = stream(seed, "request_class").random(count) * shares[-1]
    found: IntArray = np.searchsorted(shares, drawn, side="right").astype(np.int64)
    return np.minimum(found, len(classes) - 1)


def own_lengths(
    classes: Sequence[RequestClass], drawn: IntArray, seed: int, messages: IntArray, outputs: IntArray
) -> tuple[IntArray, IntArray]:
    """Lengths with those of classes that have distributions of their own in place of the workload's.

    Every class draws for all requests, each from its own stream, so that a class's share or a further class changes no
    length that another class drew.
    """
    for index, one in enumerate(classes):
        members = drawn == index
        if one.input_len is not None:
            rng = stream(seed, "input_len", one.name)
            own = draw_lengths(one.input_len, len(drawn), rng, f"classes.{index}.input_len")
            messages = np.where(members, own, messages)
        if one.output_len is not None:
            rng = stream(seed, "output_len", one.name)
            own = draw_lengths(one.output_len, len(drawn), rng, f"classes.{index}.output_len")
            outputs = np.where(members, own, outputs)
    return messages, outputs


def priorities(classes: Sequence[RequestClass], drawn: IntArray | None) -> IntArray | None:
    """Priority of each request; None where all are equal."""
    values = np.array([one.priority for one in classes], dtype=np.int64)
    if drawn is None or not values.any():
        return None
    found: IntArray = values[drawn]
    return found
