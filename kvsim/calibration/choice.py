"""Which kernels a set carries, and which of them ``auto`` takes: the production kernel before kvsim's own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from typing import Final

from kvsim.calibration.artefact import Artefact
from kvsim.calibration.staleness import OWN_KERNELS

FRAMEWORKS: Final = ("vllm", "sglang", "trtllm")
"""Serving engines in the order in which ``auto`` takes their kernels; libraries come after, kvsim's own last."""
EAGER: Final = "_eager"
"""End of the names of collectives timed outside a CUDA graph, which engines do not run when they decode."""
_AGES: Final = {"dev": -4, "a": -3, "b": -2, "rc": -1, "post": 1}
_PIECE: Final = re.compile(r"\d+|[a-z]+")


def default_ids(artefacts: Sequence[Artefact]) -> frozenset[str]:
    """Ids of what ``auto`` takes: one per device, operation and format.

    The framework decides first (vLLM where it has the format), then its newest version, then which of its kernels was
    timed on most shapes: tables are taken with the kernel that the framework picks for each shape.
    """

    def of_one_choice(one: Artefact) -> tuple[str, str, str, str]:
        return (one.device, one.operation, one.dtype, one.kv_dtype)

    ordered = sorted(artefacts, key=of_one_choice)
    return frozenset(max(group, key=_preference).id for _, group in groupby(ordered, key=of_one_choice))


def version_order(version: str) -> tuple[tuple[int, int], ...]:
    """Sort key of versions: 0.9 < 0.10, 1.0.dev1 < 1.0rc1 < 1.0 < 1.0.post1."""
    pieces = [(0, int(piece) + 1) if piece.isdigit() else (_AGES.get(piece, 0), 0) for piece in _PIECE.findall(version)]
    # The end is above "dev" and "rc", and below "post" and a further number.
    return (*pieces, (0, 0))


def _preference(one: Artefact) -> tuple[object, ...]:
    framework = one.kernel.partition("/")[0]
    rank = FRAMEWORKS.index(framework) if framework in FRAMEWORKS else len(FRAMEWORKS)
    is_own = one.kernel.startswith(OWN_KERNELS)
    return (
        not is_own,
        -rank,
        not one.kernel.endswith(EAGER),
        version_order(one.version),
        one.rows,
        one.kernel,
    )
