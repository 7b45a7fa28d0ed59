"""Shapes spread over what an artefact was fitted on, and which term of a law binds there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

import numpy as np
import numpy.typing as npt

from kvsim.calibration.artefact import Predictor
from kvsim.calibration.laws.base import FloatArray, Shape
from kvsim.calibration.timings import SHAPE_COLUMNS

POWERS_OF_TWO: Final = ("num_heads", "num_kv_heads", "ranks")
MULTIPLES_OF_64: Final = ("n", "k")
LONGEST_S: Final = 0.05
"""Tables hold no longer call; the corners of a domain, such as the largest batch at the longest context, do."""
SHORTFALL: Final = 6
"""Shapes drawn for each one that is wanted, as corners are thrown away."""
STEP: Final = 1.01
BINDING_SHARE: Final = 0.5
BOUNDS: Final = ("bandwidth", "instructions", "latency")


def sample_shapes(predictor: Predictor, selector: Mapping[str, int], rows: int) -> tuple[Shape, FloatArray]:
    """Draw shapes evenly in logarithms within a predictor's domain, always the same ones; give them with seconds.

    Parameters
    ----------
    selector : mapping
        Columns that are held at a value.
    rows : int
        Shapes wanted; fewer where the domain is mostly corners.
    """
    names = SHAPE_COLUMNS[predictor.artefact.operation]
    drawn = _spread(rows * SHORTFALL, len(names))
    shape: dict[str, FloatArray] = {}
    for column, name in enumerate(names):
        low, high = predictor.artefact.domain[name]
        if name in selector:
            shape[name] = np.full(len(drawn), float(selector[name]))
        elif name == "window_tokens":
            shape[name] = np.zeros(len(drawn))
        else:
            shape[name] = _values(name, max(low, 1.0), max(high, 1.0), drawn[:, column])
    if "num_kv_heads" in shape:
        shape["num_kv_heads"] = np.minimum(shape["num_kv_heads"], shape["num_heads"])
    if "prompt_tokens" in shape:
        shape["prompt_tokens"] = np.minimum(shape["prompt_tokens"], shape["context_tokens"])
    seconds = predictor.seconds(shape)
    kept = np.flatnonzero(seconds <= LONGEST_S)[:rows]
    return {name: column[kept] for name, column in shape.items()}, seconds[kept]


def _values(name: str, low: float, high: float, share: FloatArray) -> FloatArray:
    value: FloatArray = np.exp(np.log(low) + share * (np.log(high) - np.log(low)))
    if name in POWERS_OF_TWO:
        value = np.exp2(np.rint(np.log2(value)))
    elif name in MULTIPLES_OF_64:
        value = 64.0 * np.rint(value / 64.0)
    return np.asarray(np.clip(np.rint(value), low, high))


def _spread(rows: int, columns: int) -> FloatArray:
    """Points of the unit cube by the R sequence (Roberts 2018): even, in any number of columns, without a seed."""
    ratio = 2.0
    for _ in range(64):
        ratio = (1.0 + ratio) ** (1.0 / (columns + 1))
    steps = ratio ** -np.arange(1.0, columns + 1.0)
    return np.asarray((0.5 + np.arange(1.0, rows + 1.0)[:, None] * steps) % 1.0)


def binding_terms(predictor: Predictor, shape: Shape) -> npt.NDArray[np.str_]:
    """Say what binds each shape by the law itself: ``bandwidth``, ``instructions`` or ``latency``.

    A device with 1 % more of a rate would take some share of 1 % less time. Bandwidth binds where that share is half
    or more for memory bandwidth (or the link), instructions where it is for tensor and lane rates; what is left is
    launches and what no rate explains.
    """
    facts = predictor.facts
    wider = replace(
        facts,
        bandwidth_bytes_per_s=facts.bandwidth_bytes_per_s * STEP,
        link_bytes_per_s=facts.link_bytes_per_s * STEP if facts.link_bytes_per_s else None,
    )
    faster = replace(
        facts,
        half_flops_per_s=facts.half_flops_per_s * STEP,
        flops_per_s={name: rate * STEP for name, rate in facts.flops_per_s.items()},
        lane_clocks_per_s=facts.lane_clocks_per_s * STEP,
    )
    base = np.log(predictor.seconds(shape))
    shares = [
        (base - np.log(Predictor(predictor.artefact, other).seconds(shape))) / np.log(STEP) for other in (wider, faster)
    ]
    bound = np.where(shares[0] >= BINDING_SHARE, BOUNDS[0], np.where(shares[1] >= BINDING_SHARE, BOUNDS[1], BOUNDS[2]))
    return np.asarray(bound)
