"""A monotone surface over logarithmic features: a law, and what it misses, without breaking what it guarantees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt

from kvsim.calibration.laws.base import FloatArray

SUPPORT = 0.3
"""Rows' weight at which a node believes its data half: fewer rows leave it nearer to the law."""
NEIGHBOUR_ROUNDS = 4
NEIGHBOUR_VOICE = 0.1
"""Weight of rows at a neighbouring node against a node's own; its powers for those farther away."""
PASSES = 3
"""Times that rows are averaged: later passes bring back what sharing rows among nodes has smoothed away."""
MEETING_ROUNDS = 60
SETTLED_LOG = 1e-3
LEAST_WEIGHT = 0.01
"""Weight of a node without rows where neighbours in the wrong order settle."""
RIM_OCTAVES = (2.0, 4.0)
"""Nodes beyond the outermost ones, by distance: the correction shrinks to nothing at the last of them."""
SLOPE_OCTAVES = 1e-3
LARGEST_CORRECTION = 1.5
"""Logarithm: a table never moves the law by more than a factor of 4.5."""

CoreLogSeconds = Callable[[FloatArray], FloatArray]
"""Natural logarithm of a law's core at features, (rows, axes) -> (rows,)."""


@dataclass(frozen=True)
class CorrectionTable:
    """Natural logarithms of measured over law at the nodes of a regular grid: what is stored of a surface.

    Attributes
    ----------
    origin, spacing : tuple of float
        First node and distance of nodes, per axis, in octaves.
    values : array
        One value per node; an axis of one node corrects all alike.
    """

    origin: tuple[float, ...]
    spacing: tuple[float, ...]
    values: FloatArray

    @property
    def axes(self) -> list[FloatArray]:
        """Nodes per axis."""
        return [
            first + step * np.arange(count)
            for first, step, count in zip(self.origin, self.spacing, self.values.shape, strict=True)
        ]


class Surface:
    """Log seconds at nodes, interpolated: never falling along any axis, whatever the law and the table.

    Within the table the nodes are law plus correction, each at least as high as those below it. Beyond, the correction
    shrinks over the rim; beyond the rim, time grows by the law's steepest slopes upwards and stays downwards.
    """

    def __init__(self, table: CorrectionTable, core_log_seconds: CoreLogSeconds) -> None:
        inner = table.axes
        self.axes = [_with_rim(nodes) for nodes in inner]
        core = _at_nodes(core_log_seconds, self.axes)
        inside = tuple(slice(len(RIM_OCTAVES), -len(RIM_OCTAVES)) for _ in inner)
        corrected = _rising(core[inside] + table.values)
        correction = corrected - core[inside]
        for axis in range(len(inner)):
            correction = _shrink_outwards(correction, axis)
        values = core + correction
        for axis in range(len(inner)):
            values = _bounded_by_rows(values, axis)
        self.values = _rising(values)
        top = np.asarray([[nodes[-1] for nodes in self.axes]])
        self._slopes = [
            max(0.0, float((core_log_seconds(top) - core_log_seconds(top - step))[0]) / SLOPE_OCTAVES)
            for step in SLOPE_OCTAVES * np.eye(len(inner))
        ]

    def __call__(self, features: FloatArray) -> FloatArray:
        """Natural logarithm of seconds at features."""
        below, share = _cells(features, self.axes)
        result = np.zeros(len(features))
        flat, shape = self.values.ravel(), self.values.shape
        strides = [int(np.prod(shape[axis + 1 :])) for axis in range(len(shape))]
        for corner in _corners(self.axes):
            index = sum((low + side) * stride for low, side, stride in zip(below, corner, strides, strict=True))
            weight = np.ones(len(features))
            for part, side in zip(share, corner, strict=True):
                weight = weight * (part if side else 1.0 - part)
            result += weight * flat[index]
        for column, nodes, slope in zip(features.T, self.axes, self._slopes, strict=True):
            result += slope * np.maximum(column - nodes[-1], 0.0)
        return result


def _corners(axes: Sequence[FloatArray]) -> product[tuple[int, ...]]:
    return product(*((0, 1) if len(axis) > 1 else (0,) for axis in axes))


def _with_rim(nodes: FloatArray) -> FloatArray:
    rim = np.asarray(RIM_OCTAVES)
    return np.concatenate([nodes[0] - rim[::-1], nodes, nodes[-1] + rim])


def _at_nodes(core_log_seconds: CoreLogSeconds, axes: Sequence[FloatArray]) -> FloatArray:
    nodes = np.stack(np.meshgrid(*axes, indexing="ij"), -1)
    return core_log_seconds(nodes.reshape(-1, len(axes))).reshape(nodes.shape[:-1])


def _shrink_outwards(values: FloatArray, axis: int) -> FloatArray:
    """Lengthen a correction by the rim, where it falls to nothing in proportion to the distance."""
    moved = np.moveaxis(values, axis, 0)
    shares = [1.0 - octaves / RIM_OCTAVES[-1] for octaves in RIM_OCTAVES]
    parts = [*(share * moved[:1] for share in reversed(shares)), moved, *(share * moved[-1:] for share in shares)]
    return np.moveaxis(np.concatenate(parts), 0, axis)


def _bounded_by_rows(values: FloatArray, axis: int) -> FloatArray:
    """Keep the rim below the outermost nodes of the table on one side and above them on the other."""
    moved = np.moveaxis(values.copy(), axis, 0)
    width = len(RIM_OCTAVES)
    moved[:width] = np.minimum(moved[:width], moved[width])
    moved[-width:] = np.maximum(moved[-width:], moved[-width - 1])
    return np.moveaxis(moved, 0, axis)


def _rising(values: FloatArray) -> FloatArray:
    """Raise values to the largest at or below them along every axis."""
    for axis in range(values.ndim):
        values = np.maximum.accumulate(values, axis)
    return values


def _falling_back(values: FloatArray) -> FloatArray:
    """Lower values to the smallest at or above them along every axis."""
    for axis in range(values.ndim):
        values = np.flip(np.minimum.accumulate(np.flip(values, axis), axis), axis)
    return values


def _cells(features: FloatArray, axes: Sequence[FloatArray]) -> tuple[list[npt.NDArray[np.int64]], list[FloatArray]]:
    """Lower node of each row's cell, and the row's place in it from 0 to 1, per axis."""
    below, share = [], []
    for column, nodes in zip(features.T, axes, strict=True):
        place = np.clip(column, nodes[0], nodes[-1])
        lower = np.clip(np.searchsorted(nodes, place, side="right") - 1, 0, max(len(nodes) - 2, 0))
        step = nodes[np.minimum(lower + 1, len(nodes) - 1)] - nodes[lower]
        below.append(lower)
        share.append((place - nodes[lower]) / np.where(step > 0.0, step, 1.0))
    return below, share


def fit_table(
    features: FloatArray, log_seconds: FloatArray, spacing: Sequence[float], core_log_seconds: CoreLogSeconds
) -> CorrectionTable:
    """Average what a surface misses at its nodes, fill gaps from neighbours, and keep the surface from falling.

    Parameters
    ----------
    features : (rows, axes)
    log_seconds : (rows,)
        Natural logarithm of measured seconds.
    spacing : octaves between nodes, per axis
    core_log_seconds : callable
        The law.
    """
    axes = [_axis(column, step) for column, step in zip(features.T, spacing, strict=True)]
    core = _at_nodes(core_log_seconds, axes)
    origin = tuple(float(nodes[0]) for nodes in axes)
    table = CorrectionTable(origin, tuple(spacing), np.zeros_like(core))
    for _ in range(PASSES):
        left = log_seconds - Surface(table, core_log_seconds)(features)
        total, weight = _splat(features, left, axes)
        values = np.clip(table.values + _fill(total, weight), -LARGEST_CORRECTION, LARGEST_CORRECTION)
        surface = _without_falls(core + values, weight + LEAST_WEIGHT)
        table = CorrectionTable(origin, tuple(spacing), surface - core)
    return table


def _without_falls(values: FloatArray, weight: FloatArray) -> FloatArray:
    """Change values little, and least where rows are many, so that none is below one before it.

    Neighbours in the wrong order meet at their weighted mean, again and again; what is left then is settled half way
    between the least surface above and the greatest below that do not fall.
    """
    values = values.copy()
    for _ in range(MEETING_ROUNDS):
        settled = True
        for axis in range(values.ndim):
            moved, heavy = np.moveaxis(values, axis, 0), np.moveaxis(weight, axis, 0)
            for first in (0, 1):
                low, high = moved[first:-1:2], moved[first + 1 :: 2]
                low_weight, high_weight = heavy[first:-1:2], heavy[first + 1 :: 2]
                wrong = low > high + SETTLED_LOG
                if not wrong.any():
                    continue
                settled = False
                share = low_weight[wrong] / (low_weight[wrong] + high_weight[wrong])
                mean = share * low[wrong] + (1.0 - share) * high[wrong]
                low[wrong] = mean
                high[wrong] = mean
        if settled:
            break
    return np.asarray((_rising(values) + _falling_back(values)) / 2.0)


def _axis(column: FloatArray, step: float) -> FloatArray:
    low, high = float(column.min()), float(column.max())
    if high - low < SLOPE_OCTAVES:
        return np.asarray([low])
    first = np.floor(low / step + SLOPE_OCTAVES)
    count = int(np.ceil((high / step) - SLOPE_OCTAVES) - first)
    return np.asarray(step * (first + np.arange(count + 1)))


def _splat(features: FloatArray, residuals: FloatArray, axes: Sequence[FloatArray]) -> tuple[FloatArray, FloatArray]:
    """Share each row among the corners of its cell: sum of residuals and of weights per node."""
    shape = [len(axis) for axis in axes]
    total, weight = np.zeros(shape), np.zeros(shape)
    below, share = _cells(features, axes)
    for corner in _corners(axes):
        node = tuple(lower + side for lower, side in zip(below, corner, strict=True))
        part = np.prod([s if side else 1.0 - s for s, side in zip(share, corner, strict=True)], axis=0)
        np.add.at(total, node, part * residuals)
        np.add.at(weight, node, part)
    return total, weight


def _fill(total: FloatArray, weight: FloatArray) -> FloatArray:
    """Mean residual per node, shrunk where support is weak; neighbours speak, more softly the farther they are."""
    near_total, near_weight = total.copy(), weight.copy()
    sum_total, sum_weight = total.copy(), weight.copy()
    for _ in range(NEIGHBOUR_ROUNDS):
        for axis in range(total.ndim):
            near_total, near_weight = _spread(near_total, axis), _spread(near_weight, axis)
        near_total, near_weight = NEIGHBOUR_VOICE * near_total, NEIGHBOUR_VOICE * near_weight
        sum_total += near_total
        sum_weight += near_weight
    return np.asarray(sum_total / (sum_weight + SUPPORT))


def _spread(values: FloatArray, axis: int) -> FloatArray:
    """Add half of each neighbour along an axis."""
    moved = np.moveaxis(values, axis, 0)
    result = moved.copy()
    result[1:] += 0.5 * moved[:-1]
    result[:-1] += 0.5 * moved[1:]
    return np.moveaxis(result, 0, axis)
