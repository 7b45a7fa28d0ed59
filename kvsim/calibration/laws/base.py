"""What a law is: seconds of an operation as a formula of its shape, a device's facts and a few parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvsim.calibration.facts import DeviceFacts

FloatArray = npt.NDArray[np.float64]
Shape = Mapping[str, FloatArray]
"""Columns of ``timings.SHAPE_COLUMNS`` by name, equally long."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of a law: positive, fitted on its logarithm.

    ``start`` is where a fit begins; ``low`` and ``high`` bound it. Efficiencies are shares of a datasheet rate, so they
    carry over to another device; times (``_s``) do too, as they are properties of launches.
    """

    name: str
    start: float
    low: float
    high: float


class Law(ABC):
    """A formula: ``seconds = per_item(shape) + core(features)``.

    ``core`` depends on the shape only through ``features``, is positive and never falls along any of them, so a
    correction table over the features keeps the whole monotone. ``per_item_seconds`` grows with the batch alone.
    """

    name: str
    """Stored in artefacts; a changed formula takes a new name."""
    operation: str
    parameters: tuple[Parameter, ...]
    features: tuple[str, ...]
    """Names of the correction table's axes, each a base-2 logarithm."""
    spacing: tuple[float, ...]
    """Octaves between the table's nodes, per axis."""
    per_item_parameters: tuple[str, ...] = ()
    """Parameters of ``per_item_seconds``, which calls from cache share with cold ones."""
    categories: tuple[str, ...] = ()
    """What is fitted apart, value by value, because kernels differ in kind: names of ``category_values``."""
    optional_categories: tuple[str, ...] = ()
    """What is fitted apart where that predicts held-out shapes better."""

    @abstractmethod
    def feature_values(self, shape: Shape, facts: DeviceFacts) -> FloatArray:
        """Features of each row, (rows, len(features))."""

    @abstractmethod
    def core_seconds(
        self, features: FloatArray, parameters: Mapping[str, float], facts: DeviceFacts, key: Mapping[str, str]
    ) -> FloatArray:
        """Seconds by features, (rows,); ``key`` are the fit's KEY_COLUMNS."""

    def category_values(self, shape: Shape) -> dict[str, FloatArray]:
        """Categories of each row, optional ones too: whole numbers, those named ``is_...`` 0 or 1."""
        return {name: shape[name] for name in self.categories}

    def category_distance(self, selector: Mapping[str, int], shape: Shape) -> FloatArray:
        """How unlike rows are to those of a category: octaves of sizes count twice, another kind once."""
        total = np.zeros(len(next(iter(shape.values()))))
        for name, values in self.category_values(shape).items():
            if name not in selector:
                continue
            if name.startswith("is_"):
                total += values != selector[name]
            else:
                total += 2.0 * np.abs(np.log2(np.maximum(values, 1e-9) / selector[name]))
        return total

    def per_item_seconds(self, shape: Shape, parameters: Mapping[str, float]) -> FloatArray:
        """Seconds outside the core that grow with the batch; none unless the law has such a term."""
        return np.zeros(len(next(iter(shape.values()))))

    def working_set_bytes(self, features: FloatArray, key: Mapping[str, str]) -> FloatArray | None:
        """Bytes that a repeated call finds in cache if they fit; None where repeats are always cold."""
        return None


def smooth_maximum(exponent: float, *terms: FloatArray) -> FloatArray:
    """p-norm of positive terms, computed without overflow."""
    largest = np.maximum.reduce(terms)
    total = sum((term / largest) ** exponent for term in terms)
    return np.asarray(largest * np.asarray(total) ** (1.0 / exponent))
